// A meeting of all CTAs of a grid, which have to be on the card at the same time.
#pragma once
#include "mii/attention_mma.cuh"
#include "mii/peer_words.cuh"

namespace mii {

constexpr uint32_t kGridTurn = 0x80000000u;

// Each CTA adds one to the counter, the first one what the others lack to 2^31: the top bit turns over when the last has
// come, and nothing has to be set back for the next launch.
//
// By one thread of a CTA, after a barrier with those whose writes the others shall see; returns what the counter was.
MII_DEVICE uint32_t arrive_once(uint32_t* counter) {
  __threadfence();
  return atomicAdd(counter, blockIdx.x == 0 ? kGridTurn - (gridDim.x - 1) : 1u);
}
// `before`: the counter at any time before this CTA came.
MII_DEVICE void wait_for_turn(const uint32_t* counter, uint32_t before) {
  while (((load_state(counter) ^ before) & kGridTurn) == 0) {
  }
  __threadfence();
}

// All threads of a CTA come with both calls, and hand on what the first one returned. What any thread of the grid wrote
// before the first, every one reads after the second.
MII_DEVICE uint32_t arrive_at_grid(uint32_t* counter) {
  __syncthreads();
  return threadIdx.x == 0 ? arrive_once(counter) : 0;
}
MII_DEVICE void wait_for_grid(const uint32_t* counter, uint32_t before) {
  if (threadIdx.x == 0) wait_for_turn(counter, before);
  __syncthreads();
}

}  // namespace mii
