// The rows of x that each expert's tokens have, one after the other, for moe_wide.cuh: boxes of the copy engine are of rows that
// follow one another. Measured beside warps that gather while others multiply, with tiles of 128 rows: Mixtral's prompts are a
// fifth faster so, those of Qwen3-30B-A3B, whose rows are half as long, as fast at 8,192 tokens and a tenth slower at 2,048.
//
// A token's row is read once and written to all rows that are the token's: 120 us for 8,192 tokens of Qwen3-30B-A3B on an H200,
// where a read for each of them took 142.
#pragma once
#include "mii/moe_mma.cuh"

namespace mii {

constexpr int kGatherThreads = 256, kGatherCtas = 5;  // of a CTA; of a multiprocessor
constexpr int kGatherChunks = 4;                      // of 16 bytes, of a lane

template <typename T>
struct MoeGatherArgs {
  T* out;                 // by row
  const T* x;             // by token
  const int32_t* places;  // by pair: its row
  const int4* tiles;      // as in MoeArgs
  int64_t out_stride, x_stride;
  int k, top_k;
};

// out[row of a pair] = x[token of the pair]: a warp a piece of a token's row.
template <typename T>
__global__ void __launch_bounds__(kGatherThreads, kGatherCtas) moe_gather(const MoeGatherArgs<T> a) {
  constexpr int kPiece = kGatherChunks * kWarp, kWarps = kGatherThreads / kWarp;
  wait_for_previous();
  start_next();
  const int lane = threadIdx.x % kWarp, chunks = a.k / 8, pieces = (chunks + kPiece - 1) / kPiece;
  const int tiles = a.tiles[0].x;
  const int4 last = tiles == 0 ? int4{} : a.tiles[tiles];
  const int units = (last.y + last.z) / a.top_k * pieces;
  for (int unit = blockIdx.x * kWarps + threadIdx.x / kWarp; unit < units; unit += gridDim.x * kWarps) {
    const int token = unit / pieces, first = unit % pieces * kPiece + lane;
    const int place = lane < a.top_k ? a.places[token * a.top_k + lane] : 0;
    const auto* from = reinterpret_cast<const uint4*>(a.x + token * a.x_stride);
    uint4 values[kGatherChunks];
#pragma unroll
    for (int i = 0; i < kGatherChunks; ++i) {
      if (first + i * kWarp < chunks) values[i] = from[first + i * kWarp];
    }
    for (int choice = 0; choice < a.top_k; ++choice) {
      auto* to = reinterpret_cast<uint4*>(a.out + __shfl_sync(kFullMask, place, choice) * a.out_stride);
#pragma unroll
      for (int i = 0; i < kGatherChunks; ++i) {
        if (first + i * kWarp < chunks) __stcs(to + first + i * kWarp, values[i]);
      }
    }
  }
}

}  // namespace mii
