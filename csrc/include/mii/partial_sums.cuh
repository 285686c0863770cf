// Partial sums that a CTA leaves to another one of its launch, 16 bytes a thread, as words that say by themselves whether
// they are there: a place holds zeros until they come, and again once they were taken; a sum of +0 is written as -0, which
// adds up to the same. So nothing has to be released or counted, and nobody waits for anything but the sums.
//
// Which CTA of those that share a tile adds them up: the one that has its first unit (stream_runs.cuh). A run begins with
// what is left of a tile that others began, and ends with the beginning of one that others finish; so what a CTA waits for at
// its end is what those after it did first, and none waits for one before it.
// All CTAs of the launch have to be on the card at the same time.
#pragma once
#include "mii/attention_mma.cuh"
#include "mii/peer_words.cuh"

namespace mii {

__device__ __forceinline__ uint64_t sum_words(float low, float high) {
  constexpr uint32_t kMinusZero = 0x80000000u;
  const uint32_t a = __float_as_uint(low), b = __float_as_uint(high);
  return uint64_t(b == 0 ? kMinusZero : b) << 32 | (a == 0 ? kMinusZero : a);
}
__device__ __forceinline__ bool are_sums(uint64_t words) {
  return static_cast<uint32_t>(words) != 0 && static_cast<uint32_t>(words >> 32) != 0;
}

// place(g): where this thread's sums of group g lie.
template <int Groups, typename Place>
__device__ __forceinline__ void leave_sums(const float (&sums)[Groups][4], Place&& place) {
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
    store_words(place(g), sum_words(sums[g][0], sums[g][1]), sum_words(sums[g][2], sums[g][3]));
  }
}

// sums += what another CTA leaves, once it is there.
template <int Groups, typename Place>
__device__ __forceinline__ void take_sums(float (&sums)[Groups][4], Place&& place) {
  uint64_t words[Groups][2];
  for (bool there = false; !there;) {
#pragma unroll
    for (int g = 0; g < Groups; ++g) load_words(place(g), words[g][0], words[g][1]);
    there = true;
#pragma unroll
    for (int g = 0; g < Groups; ++g) there = there && are_sums(words[g][0]) && are_sums(words[g][1]);
  }
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
    store_words(place(g), 0, 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[g][i] += __uint_as_float(static_cast<uint32_t>(words[g][i / 2] >> 32 * (i % 2)));
  }
}

// This CTA's part in a tile that it shares with others: true where it has the whole sums then. place(cta, g): where this
// thread's sums of group g lie that a CTA leaves.
template <int Groups, typename Runs, typename Place>
__device__ __forceinline__ bool merge_by_words(float (&sums)[Groups][4], const Runs& runs, int tile, Place&& place) {
  const int cta = static_cast<int>(blockIdx.x);
  if (runs.begin(cta) > tile * runs.steps) {
    leave_sums(sums, [&](int g) { return place(cta, g); });
    return false;
  }
  const int last = runs.cta_of((tile + 1) * runs.steps - 1);
  for (int other = cta + 1; other <= last; ++other) take_sums(sums, [&](int g) { return place(other, g); });
  return true;
}

}  // namespace mii
