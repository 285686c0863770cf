// The rows of x that each expert's tokens have, one after the other, for moe_wide.cuh: boxes of the copy engine are of rows that
// follow one another. Measured beside warps that gather while others multiply, with tiles of 128 rows: Mixtral's prompts are a
// fifth faster so, those of Qwen3-30B-A3B, whose rows are half as long, as fast at 8,192 tokens and a tenth slower at 2,048.
#pragma once
#include "mii/moe_mma.cuh"

namespace mii {

constexpr int kGatherThreads = 256, kGatherCtas = 5;  // of a CTA; of a multiprocessor

// out[row] = x[token of the row], a warp a row, from the last one to the first, so that the first ones are the youngest in L2.
template <typename T>
__global__ void __launch_bounds__(kGatherThreads, kGatherCtas) moe_gather(const MoeArgs<T> a, T* out, int64_t out_stride) {
  constexpr int kAtOnce = 8;
  wait_for_previous();
  start_next();
  const int lane = threadIdx.x % kWarp, warps = gridDim.x * (kGatherThreads / kWarp), chunks = a.k / 8;
  const int tiles = a.tiles[0].x;
  const int4 last = tiles == 0 ? int4{} : a.tiles[tiles];
  int row = last.y + last.z - 1 - static_cast<int>(blockIdx.x * (kGatherThreads / kWarp) + threadIdx.x / kWarp);
  int next = row < 0 ? 0 : a.pairs[row];
  for (; row >= 0; row -= warps) {
    const auto* from = reinterpret_cast<const uint4*>(a.x + next / a.top_k * a.x_stride);
    auto* to = reinterpret_cast<uint4*>(out + row * out_stride);
    if (row >= warps) next = a.pairs[row - warps];
    for (int first = lane; first < chunks; first += kAtOnce * kWarp) {
      uint4 values[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i * kWarp < chunks) values[i] = from[first + i * kWarp];
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i * kWarp < chunks) __stcs(to + first + i * kWarp, values[i]);
      }
    }
  }
}

}  // namespace mii
