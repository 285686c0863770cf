// Sums of two cards whose numbers the copy engines carry, so that no multiprocessor has to: contracts in abi/ranks.h.
//
// A copy lies in this card's memory when the word at kCopiedAt says its round: the other rank's stream writes it there after
// the copy, and rounds come in their order.
#pragma once
#include "mii/norm.cuh"
#include "mii/peers.cuh"

namespace mii {

template <typename T>
struct Copied {
  const T* theirs;  // what the other rank's copy brings
  char* memory;     // this rank's
  int32_t* lost;    // the host's copy
  uint64_t patience;
  uint32_t round;
  int other;  // rank
};

// By all threads of a CTA: until the copy is there, or its rank is given up.
template <typename T>
__device__ __forceinline__ void await_copy(const Copied<T>& copied) {
  if (threadIdx.x == 0) {
    Patience patience(reinterpret_cast<PeerState*>(copied.memory), copied.lost, copied.patience);
    const char* said = copied.memory + kCopiedAt;
    for (unsigned tries = 1; static_cast<int32_t>(load_said(said) - copied.round) < 0; ++tries) {
      if (!patience.more(tries, 1u << copied.other)) break;
    }
  }
  __syncthreads();
}

// A pack of what has come, which no cache of a multiprocessor may have from an earlier round.
template <typename T>
__device__ __forceinline__ Pack<T> load_copied(const T* address) {
  const uint4 bits = __ldcg(reinterpret_cast<const uint4*>(address));
  Pack<T> pack;
  *reinterpret_cast<uint4*>(&pack) = bits;
  return pack;
}

// a + b, which is b + a: both ranks find the same.
template <typename T>
__device__ __forceinline__ Pack<T> sum_of_two(const Pack<T>& mine, const Pack<T>& theirs) {
  float a[kPack<T>], b[kPack<T>];
  unpack(a, mine);
  unpack(b, theirs);
#pragma unroll
  for (int e = 0; e < kPack<T>; ++e) a[e] += b[e];
  return make_pack<T>(a);
}

constexpr int kCopiedSumThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kCopiedSumThreads) copied_sum_packs(const __grid_constant__ Copied<T> copied, T* x,
                                                                      int64_t packs) {
  wait_for_previous();
  start_next();
  const int64_t index = int64_t(blockIdx.x) * kCopiedSumThreads + threadIdx.x;
  Pack<T> mine;
  if (index < packs) mine = load_pack<kPack<T>>(x + index * kPack<T>);
  await_copy(copied);
  if (index >= packs) return;
  store_pack(x + index * kPack<T>, sum_of_two(mine, load_copied(copied.theirs + index * kPack<T>)));
}

// A row for each CTA, whose threads hold Packs packs each, as in norm_rows.
template <typename T, int Packs>
__global__ void __launch_bounds__(norm_threads(Packs, false)) copied_sum_norm_rows(const __grid_constant__ Copied<T> copied,
                                                                                   const __grid_constant__ NormArgs<T> norm) {
  __shared__ float scratch[kWarp];
  const int thread = threadIdx.x, threads = blockDim.x, count = norm.width / kPack<T>;
  const int64_t row = blockIdx.x;
  wait_for_previous();
  start_next();
  Pack<T> v[Packs], added[Packs];
  T* residual = norm.residual + row * norm.width;
  load_held<T>(v, norm.x + row * norm.width, thread, threads, count);
  load_held<T>(added, residual, thread, threads, count);
  await_copy(copied);
#pragma unroll
  for (int p = 0; p < Packs; ++p) {
    const int i = thread + p * threads;
    if (i < count) v[p] = sum_of_two(v[p], load_copied(copied.theirs + row * norm.width + i * kPack<T>));
  }
  add_held<T>(residual, v, added, thread, threads, count);
  norm_held<T>(norm, row, v, thread, threads, count, [&](float value) { return block_sum(value, scratch); });
}

}  // namespace mii
