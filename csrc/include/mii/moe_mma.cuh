// Experts' products of many rows each on tensor cores, by mma.sync: sm_80 and later.
//
// A CTA computes tiles of 128 rows by 128 weight rows, in steps of 64 of k that pass through shared memory by cp.async;
// rows of x are gathered on the way. For moe_up the weight rows are those of gate and up, eight of each in turn, so that
// both halves of an output meet in one thread. The CTA goes from tile to tile without draining: the first steps of the next
// one are under way while the last ones of this one are multiplied and its sums stored.
//
// Tiles are taken in bands of kMoeBand row tiles by all columns, rows first: CTAs that run together then share both the
// rows and the weights in the L2 cache.
#pragma once
#include "mii/moe_stream.cuh"

namespace mii {

constexpr int kMoeTileRows = 128;
constexpr int kMoeBand = 16;

// The order of the work: item -> tile of rows, tile of columns.
struct MoeItems {
  int groups, columns, band = kMoeBand;

  MII_DEVICE int count() const { return groups * columns; }
  MII_DEVICE int2 at(int item) const {
    const int first = item / (band * columns) * band, rest = item - first * columns;
    const int rows = min(band, groups - first);
    return make_int2(first + rest % rows, rest / rows);
  }
};

// The tile of rows `index`, of up to kMoeTileRows, perhaps of none.
template <typename T>
MII_DEVICE int4 mma_tile(const MoeArgs<T>& a, int index) {
  const int4 tile = a.tiles[1 + index / a.tile_parts];
  const int first = index % a.tile_parts * kMoeTileRows;
  return make_int4(tile.x, tile.y + first, max(0, min(kMoeTileRows, tile.z - first)), 0);
}

struct MoeMmaShape {
  static constexpr int kStages = 3;
  static constexpr int kRowBytes = kMoeTileRows * kUnitDepth * 2;
  static constexpr int kStageBytes = kRowBytes + kUnitRows * kUnitDepth * 2;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kThreads = kMoeThreads;  // 8 warps: 4 along the rows by 2 along the weight rows
};

// The loading side: what is copied next.
template <typename T, bool Up>
struct MoeTileLoader {
  static constexpr int kCopies = kMoeTileRows / 32;

  const MoeArgs<T>& a;
  MoeItems items;
  int item, step = 0, steps;
  WeightUnit<T, Up> weight;
  const T* rows[kCopies];  // null: past the tile's rows

  MII_DEVICE MoeTileLoader(const MoeArgs<T>& args, const MoeItems& items_, int first, int steps_)
      : a(args), items(items_), item(first), steps(steps_) {
    if (item < items.count()) find();
  }
  // Copies the next step, if there is one, and moves on.
  MII_DEVICE void load(uint32_t stage) {
    if (item >= items.count()) return;
    const int chunk = threadIdx.x % 8, k = step * kUnitDepth + chunk * 8;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const bool valid = rows[i] != nullptr && k < a.k;
      copy_async(stage + HeadRows<kUnitDepth>::offset(threadIdx.x / 8 + 32 * i, chunk), valid ? rows[i] + k : a.x, valid);
    }
    weight.load(a, stage + MoeMmaShape::kRowBytes, step);
    if (++step < steps) return;
    step = 0;
    item += gridDim.x;
    if (item < items.count()) find();
  }

 private:
  MII_DEVICE void find() {
    const int2 at = items.at(item);
    const int4 tile = mma_tile(a, at.x);
    weight.set(a, tile.x, at.y);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = threadIdx.x / 8 + 32 * i;
      rows[i] = row < tile.z ? a.x + source_row<T, Up>(a, tile.y + row) * a.x_stride : nullptr;
    }
  }
};

// sums += 32 rows by 64 weight rows of this warp over one step.
template <typename T>
MII_DEVICE void multiply_step(float (&sums)[2][8][4], uint32_t stage, int warp_row, int warp_column) {
  using Rows = HeadRows<kUnitDepth>;
  const int lane = threadIdx.x % kWarp;
  const uint32_t x = stage + Rows::lane_offset(warp_row * 32 + lane % 16, lane / 16);
  // One load brings the fragments of two groups of eight weight rows: lanes 0-7 and 8-15 point to the left and right
  // chunks of the first, 16-31 to those of the second.
  const uint32_t w = stage + MoeMmaShape::kRowBytes +
                     Rows::lane_offset(warp_column * 64 + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
  for (int k = 0; k < kUnitDepth / 16; ++k) {
    uint32_t left[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) load_matrices(left[m], Rows::at(x, k, m * 16));
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      uint32_t b[4];
      load_matrices(b, Rows::at(w, k, n * 8));
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        multiply_add<T>(sums[m][n], left[m], b[0], b[1]);
        multiply_add<T>(sums[m][n + 1], left[m], b[2], b[3]);
      }
    }
  }
}

// Two neighbouring columns of one row; where out's rows are odd or end between them, one by one.
template <typename T>
MII_DEVICE void store_two(T* out, int column, int n, bool paired, float first, float second) {
  if (paired && column + 1 < n) {
    *reinterpret_cast<uint32_t*>(out + column) = pack_pair<T>(first, second);
  } else {
    if (column < n) out[column] = from_float<T>(first);
    if (column + 1 < n) out[column + 1] = from_float<T>(second);
  }
}

template <typename T, bool Up>
MII_DEVICE void store_moe_sums(const MoeArgs<T>& a, const float (&sums)[2][8][4], const int4 tile, int first_row,
                               int first_column) {
  const int lane = threadIdx.x % kWarp;
  const bool paired = a.out_stride % 2 == 0 && reinterpret_cast<uintptr_t>(a.out) % 4 == 0;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = first_row + m * 16 + half * 8 + lane / 4;
      if (r >= tile.z) continue;
      const int row = tile.y + r, pair = Up ? row : a.pairs[row];
      const float weight = Up ? 1.0f : a.pair_weights[pair];
      T* out = a.out + int64_t(pair) * a.out_stride;
#pragma unroll
      for (int n = 0; n < 8; n += Up ? 2 : 1) {
        const float* value = sums[m][n] + 2 * half;
        if constexpr (Up) {
          const float* up = sums[m][n + 1] + 2 * half;
          store_two(out, first_column + n / 2 * 8 + 2 * (lane % 4), a.n, paired,
                    activate_any<T>(value[0], a.activation) * up[0], activate_any<T>(value[1], a.activation) * up[1]);
        } else {
          store_two(out, first_column + n * 8 + 2 * (lane % 4), a.n, paired, weight * value[0], weight * value[1]);
        }
      }
    }
  }
}

// Grid: as many CTAs as fit the card. Dynamic shared memory: MoeMmaShape::kSharedBytes.
template <typename T, bool Up>
__global__ void __launch_bounds__(MoeMmaShape::kThreads, 2) moe_mma(const MoeArgs<T> a) {
  using Shape = MoeMmaShape;
  const uint32_t shared = shared_address(dynamic_shared());
  wait_for_previous();
  start_next();
  const int steps = (a.k + kUnitDepth - 1) / kUnitDepth;
  constexpr int kColumns = WeightUnit<T, Up>::kColumns;
  const MoeItems items = {a.tiles[0].x * a.tile_parts, (a.n + kColumns - 1) / kColumns};
  const int warp_row = threadIdx.x / kWarp / 2, warp_column = threadIdx.x / kWarp % 2;
  MoeTileLoader<T, Up> loader(a, items, blockIdx.x, steps);
  int loading = 0, reading = 0;  // stages
  const auto load = [&] {
    loader.load(shared + loading * Shape::kStageBytes);
    copy_async_commit();
    loading = loading + 1 == Shape::kStages ? 0 : loading + 1;
  };
  for (int i = 0; i < Shape::kStages - 1; ++i) load();
  for (int item = blockIdx.x; item < items.count(); item += gridDim.x) {
    float sums[2][8][4] = {};
    for (int step = 0; step < steps; ++step) {
      copy_async_wait<Shape::kStages - 2>();
      __syncthreads();
      load();
      multiply_step<T>(sums, shared + reading * Shape::kStageBytes, warp_row, warp_column);
      reading = reading + 1 == Shape::kStages ? 0 : reading + 1;
    }
    const int2 at = items.at(item);
    store_moe_sums<T, Up>(a, sums, mma_tile(a, at.x), warp_row * 32, at.y * kColumns + warp_column * (kColumns / 2));
  }
}

}  // namespace mii
