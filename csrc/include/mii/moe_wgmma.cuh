// Experts' products of many rows each by Hopper's warpgroup products.
//
// As moe_mma.cuh, with larger tiles: 64 rows for each of two or three warpgroups by 256 weight rows (for moe_up 128 of gate
// and the same 128 of up), in steps of 64 of k. What bounds two warpgroups is the L2 cache: three ask a quarter less of it
// for each product, and take fewer tiles to go through an expert's rows. All threads copy. At a step a warpgroup hands its products to the tensor
// cores and waits for those of the step before, so they always have work while the next step is copied and the barrier is
// passed: of four buffers one is read, one may still be, two are being filled. A warpgroup without rows in a tile skips its
// products.
#pragma once
#include "mii/moe_mma.cuh"
#include "mii/wgmma.cuh"

namespace mii {

template <int Groups>
struct MoeWgmmaShape {
  static constexpr int kThreads = Groups * kWarpgroup;
  static constexpr int kStages = 4;
  static constexpr int kTileRows = 64 * Groups;
  static constexpr int kWeightRows = 256, kHalf = kWeightRows / 2;
  static constexpr int kAtOnce = kThreads / 8;  // rows that the threads copy a step's 128 bytes of at once
  static constexpr int kRowCopies = kTileRows / kAtOnce, kWeightCopies = (kWeightRows + kAtOnce - 1) / kAtOnce;
  using Rows = Panels<kTileRows, kUnitDepth>;
  using Weights = Panels<kWeightRows, kUnitDepth>;
  static constexpr int kStageBytes = Rows::kBytes + Weights::kBytes;
  static constexpr int kAlignment = 1024;
  static constexpr int kSharedBytes = kStages * kStageBytes + kAlignment;
};

#if defined(MII_HOPPER)

// The loading side: what is copied next.
template <typename T, int Groups, bool Up>
struct MoeWideLoader {
  using Shape = MoeWgmmaShape<Groups>;
  static constexpr int kColumns = Up ? Shape::kHalf : Shape::kWeightRows;  // of out, of a tile

  const MoeArgs<T>& a;
  MoeItems items;
  int item, step = 0, steps;
  int column;                        // of out, the tile's first
  const T* halves[2];                // the first weight rows of the tile's halves: gate and up, or 128 columns apart
  const T* rows[Shape::kRowCopies];  // null: past the tile's rows

  MII_DEVICE MoeWideLoader(const MoeArgs<T>& args, const MoeItems& items_, int first, int steps_)
      : a(args), items(items_), item(first), steps(steps_) {
    if (item < items.count()) find();
  }
  // Copies the next step, if there is one, and moves on.
  MII_DEVICE void load(uint32_t stage) {
    if (item >= items.count()) return;
    const int row = threadIdx.x / 8, chunk = threadIdx.x % 8, k = step * kUnitDepth + chunk * 8;
#pragma unroll
    for (int i = 0; i < Shape::kRowCopies; ++i) {
      const bool valid = rows[i] != nullptr && k < a.k;
      copy_async(stage + Shape::Rows::offset(row + Shape::kAtOnce * i, chunk), valid ? rows[i] + k : a.x, valid);
    }
#pragma unroll
    for (int i = 0; i < Shape::kWeightCopies; ++i) {
      const int weight_row = row + Shape::kAtOnce * i;
      if (Shape::kWeightRows % Shape::kAtOnce != 0 && weight_row >= Shape::kWeightRows) continue;
      const bool second = weight_row >= Shape::kHalf;
      const int within = weight_row - (second ? Shape::kHalf : 0);
      const bool valid = column + (Up ? within : weight_row) < a.n && k < a.k;
      copy_async(stage + Shape::Rows::kBytes + Shape::Weights::offset(weight_row, chunk),
                 valid ? (second ? halves[1] : halves[0]) + int64_t(within) * a.k + k : a.weight, valid);
    }
    if (++step < steps) return;
    step = 0;
    item += gridDim.x;
    if (item < items.count()) find();
  }

 private:
  MII_DEVICE void find() {
    const int2 at = items.at(item);
    const int4 tile = a.tiles[1 + at.x];
    column = at.y * kColumns;
    halves[0] = a.weight + (int64_t(tile.x) * (Up ? 2 : 1) * a.n + column) * a.k;
    halves[1] = halves[0] + int64_t(Up ? a.n : Shape::kHalf) * a.k;
#pragma unroll
    for (int i = 0; i < Shape::kRowCopies; ++i) {
      const int row = threadIdx.x / 8 + Shape::kAtOnce * i;
      rows[i] = row < tile.z ? a.x + source_row<T, Up>(a, tile.y + row) * a.x_stride : nullptr;
    }
  }
};

// Rounds and stores the sums of a warpgroup: 64 rows by both halves of 128 weight rows.
template <typename T, bool Up>
MII_DEVICE void store_wide_sums(const MoeArgs<T>& a, const float (&first)[64], const float (&second)[64], const int4 tile,
                                int first_row, int first_column) {
  const int lane = threadIdx.x % kWarp;
  const bool paired = a.out_stride % 2 == 0 && reinterpret_cast<uintptr_t>(a.out) % 4 == 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = first_row + threadIdx.x / kWarp % 4 * 16 + half * 8 + lane / 4;
    if (r >= tile.z) continue;
    const int row = tile.y + r, pair = Up ? row : a.pairs[row];
    const float weight = Up ? 1.0f : a.pair_weights[pair];
    T* out = a.out + int64_t(pair) * a.out_stride;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int d = 4 * i + 2 * half, column = first_column + 8 * i + 2 * (lane % 4);
      if constexpr (Up) {
        store_two(out, column, a.n, paired, activate_any<T>(first[d], a.activation) * second[d],
                  activate_any<T>(first[d + 1], a.activation) * second[d + 1]);
      } else {
        store_two(out, column, a.n, paired, weight * first[d], weight * first[d + 1]);
        store_two(out, column + MoeWgmmaShape<2>::kHalf, a.n, paired, weight * second[d], weight * second[d + 1]);
      }
    }
  }
}

// Hands over first += rows . weights of the tile's first half, second += those of the second, over one step.
template <typename T, int Groups>
MII_DEVICE void multiply_wide(float (&first)[64], float (&second)[64], uint32_t stage, int group) {
  using Shape = MoeWgmmaShape<Groups>;
  const uint64_t x = matrix_descriptor(stage + Shape::Rows::elements_at(64 * group, 0), 16, Shape::Rows::kStrideBytes);
  const uint64_t w = matrix_descriptor(stage + Shape::Rows::kBytes, 16, Shape::Weights::kStrideBytes);
  products_fence();
#pragma unroll
  for (int k = 0; k < kUnitDepth / 16; ++k) {
    const uint64_t x_step = advanced(x, Shape::Rows::elements_at(0, k));
    product<T, true>(first, x_step, advanced(w, Shape::Weights::elements_at(0, k)));
    product<T, true>(second, x_step, advanced(w, Shape::Weights::elements_at(Shape::kHalf, k)));
  }
  products_commit();
}

#endif  // MII_HOPPER

// Grid: one CTA a multiprocessor. Dynamic shared memory: MoeWgmmaShape<Groups>::kSharedBytes. Tiles of the list:
// MoeWgmmaShape<Groups>::kTileRows.
template <typename T, int Groups, bool Up>
__global__ void __launch_bounds__(MoeWgmmaShape<Groups>::kThreads, 1) moe_wgmma(const MoeArgs<T> a) {
#if defined(MII_HOPPER)
  using Shape = MoeWgmmaShape<Groups>;
  using Loader = MoeWideLoader<T, Groups, Up>;
  const uint32_t shared = (shared_address(dynamic_shared()) + Shape::kAlignment - 1) / Shape::kAlignment * Shape::kAlignment;
  wait_for_previous();
  start_next();
  const int steps = (a.k + kUnitDepth - 1) / kUnitDepth, group = threadIdx.x / kWarpgroup;
  const MoeItems items = {a.tiles[0].x, (a.n + Loader::kColumns - 1) / Loader::kColumns};
  Loader loader(a, items, blockIdx.x, steps);
  int loading = 0, reading = 0;  // stages
  const auto load = [&] {
    loader.load(shared + loading * Shape::kStageBytes);
    copy_async_commit();
    loading = (loading + 1) % Shape::kStages;
  };
  load();
  load();
  for (int item = blockIdx.x; item < items.count(); item += gridDim.x) {
    const int2 at = items.at(item);
    const int4 tile = a.tiles[1 + at.x];
    const bool rows = 64 * group < tile.z;
    float first[64], second[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) first[i] = second[i] = 0.0f;
    for (int step = 0; step < steps; ++step) {
      copy_async_wait<1>();
      publish_to_products();
      __syncthreads();  // everybody's copies of this step are there, and everybody's products of two steps ago are done
      if (rows) {
        multiply_wide<T, Groups>(first, second, shared + reading * Shape::kStageBytes, group);
        products_wait<1>();
      }
      load();
      reading = (reading + 1) % Shape::kStages;
    }
    products_wait<0>();
    settle(first);
    settle(second);
    if (rows) store_wide_sums<T, Up>(a, first, second, tile, 64 * group, at.y * Loader::kColumns);
  }
#endif
}

}  // namespace mii
