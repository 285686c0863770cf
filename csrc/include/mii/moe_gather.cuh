// The rows of x that each expert's tokens have, one after the other, for moe_wide.cuh: boxes of the copy engine are of rows that
// follow one another. Measured beside warps that gather while others multiply: Mixtral's prompts are a fifth faster so, those
// of Qwen3-30B-A3B, whose rows are half as long, as fast at 8,192 tokens and a tenth slower at 2,048.
#pragma once
#include "mii/moe_mma.cuh"

namespace mii {

constexpr int kGatherThreads = 256, kGatherCtas = 5;  // of a CTA; of a multiprocessor

// out[row] = x[token of the row], for the rows of the list's tiles, which have up to kMoeTileRows each. A warp copies a row.
template <typename T>
__global__ void __launch_bounds__(kGatherThreads) moe_gather(const MoeArgs<T> a, T* out, int64_t out_stride) {
  constexpr int kAtOnce = 8;
  wait_for_previous();
  start_next();
  const int lane = threadIdx.x % kWarp, warps = gridDim.x * (kGatherThreads / kWarp);
  const int places = a.tiles[0].x * kMoeTileRows, chunks = a.k / 8;
  for (int place = blockIdx.x * (kGatherThreads / kWarp) + threadIdx.x / kWarp; place < places; place += warps) {
    const int4 tile = a.tiles[1 + place / kMoeTileRows];
    const int row = place % kMoeTileRows;
    if (row >= tile.z) continue;
    const auto* from = reinterpret_cast<const uint4*>(a.x + source_row<T, true>(a, tile.y + row) * a.x_stride);
    auto* to = reinterpret_cast<uint4*>(out + (tile.y + row) * out_stride);
    for (int first = lane; first < chunks; first += kAtOnce * kWarp) {
      uint4 values[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i * kWarp < chunks) values[i] = from[first + i * kWarp];
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i * kWarp < chunks) to[first + i * kWarp] = values[i];
      }
    }
  }
}

}  // namespace mii
