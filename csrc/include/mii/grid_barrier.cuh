// A meeting of all CTAs of a grid, which have to be on the card at the same time.
#pragma once
#include "mii/attention_mma.cuh"
#include "mii/peer_words.cuh"

namespace mii {

constexpr uint32_t kGridTurn = 0x80000000u;

// All threads of a CTA come with both calls, and hand on what the first one returned. What any thread of the grid wrote
// before the first, every one reads after the second.
//
// Each CTA adds one to the counter, the first one what the others lack to 2^31: the top bit turns over when the last has
// come, and nothing has to be set back for the next launch.
MII_DEVICE uint32_t arrive_at_grid(uint32_t* counter) {
  __syncthreads();
  if (threadIdx.x != 0) return 0;
  __threadfence();
  return atomicAdd(counter, blockIdx.x == 0 ? kGridTurn - (gridDim.x - 1) : 1u);
}
MII_DEVICE void wait_for_grid(const uint32_t* counter, uint32_t before) {
  if (threadIdx.x == 0) {
    while (((load_state(counter) ^ before) & kGridTurn) == 0) {
    }
    __threadfence();
  }
  __syncthreads();
}

}  // namespace mii
