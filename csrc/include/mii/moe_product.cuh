// What the experts' products share: their arguments, where rows come from and go to, and the simple kernel.
//
// Equations in mii/ops/moe.py, structs in abi/moe.h (MiiMoeLinear). Every kernel takes its work from the list of tiles that
// mii_moe_route left on the device; grids depend on nothing but the card and upper bounds.
#pragma once
#include "mii/abi/moe.h"
#include "mii/activation.cuh"
#include "mii/attention_mma.cuh"
#include "mii/dynamic_shared.cuh"

namespace mii {

template <typename T>
struct MoeArgs {
  T* out;
  const T* x;
  const T* weight;            // [experts][(Up ? 2 : 1) * n, k]
  const float* pair_weights;  // down
  const int32_t* pairs;
  const int4* tiles;          // the first is (their number, ..), the others (expert, first row, rows, 0)
  int64_t x_stride, out_stride;
  int n, k, top_k, activation;  // n: columns of out
  int tile_parts = 1;           // moe_mma: a tile of the list is so many of its own
};

// The row of x that a row of the list reads: its token's, or (down) itself.
template <typename T, bool Up>
MII_DEVICE int64_t source_row(const MoeArgs<T>& a, int row) {
  return Up ? a.pairs[row] / a.top_k : row;
}

// ---- the simple kernel --------------------------------------------------------------------------------------------
// A warp computes one column of up to kSimpleRows rows of a tile, lanes along k. Takes every format, size and stride.
constexpr int kSimpleThreads = 256;
constexpr int kSimpleRows = 8;

template <typename T, bool Up>
MII_DEVICE void simple_column(const MoeArgs<T>& a, const int4 tile, int first, int column) {
  const int lane = threadIdx.x % kWarp, rows = min(kSimpleRows, tile.z - first);
  const T* gate = a.weight + (int64_t(tile.x) * (Up ? 2 : 1) * a.n + column) * a.k;
  const T* up = gate + int64_t(a.n) * a.k;
  const T* x[kSimpleRows];
  float sums[kSimpleRows] = {}, ups[kSimpleRows] = {};
#pragma unroll
  for (int r = 0; r < kSimpleRows; ++r) {
    x[r] = a.x + source_row<T, Up>(a, tile.y + first + min(r, rows - 1)) * a.x_stride;
  }
  for (int k = lane; k < a.k; k += kWarp) {
    const float g = to_float(gate[k]), u = Up ? to_float(up[k]) : 0.0f;
#pragma unroll
    for (int r = 0; r < kSimpleRows; ++r) {
      if (r >= rows) continue;
      const float value = to_float(x[r][k]);
      sums[r] += g * value;
      if constexpr (Up) ups[r] += u * value;
    }
  }
  float sum = 0.0f, gated = 0.0f;  // of row `lane`
#pragma unroll
  for (int r = 0; r < kSimpleRows; ++r) {
    const float total = warp_sum(sums[r]), other = Up ? warp_sum(ups[r]) : 0.0f;
    if (lane == r) sum = total, gated = other;
  }
  if (lane >= rows) return;
  const int row = tile.y + first + lane;
  if constexpr (Up) {
    a.out[row * a.out_stride + column] = from_float<T>(activate_one<T>(sum, a.activation) * gated);
  } else {
    const int pair = a.pairs[row];
    a.out[pair * a.out_stride + column] = from_float<T>(sum * a.pair_weights[pair]);
  }
}

template <typename T, bool Up>
__global__ void __launch_bounds__(kSimpleThreads, 4) moe_simple(const MoeArgs<T> a) {
  wait_for_previous();
  start_next();
  const int64_t units = int64_t(a.tiles[0].x) * a.n, warps = int64_t(gridDim.x) * (kSimpleThreads / kWarp);
  for (int64_t unit = int64_t(blockIdx.x) * (kSimpleThreads / kWarp) + threadIdx.x / kWarp; unit < units; unit += warps) {
    const int4 tile = a.tiles[1 + unit / a.n];
    for (int first = 0; first < tile.z; first += kSimpleRows) {
      simple_column<T, Up>(a, tile, first, static_cast<int>(unit % a.n));
    }
  }
}

}  // namespace mii
