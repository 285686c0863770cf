// Experts' products of many rows each by Hopper's warpgroup products (wide_tile.cuh).
//
// Tiles of 128 rows of one expert by 256 weight rows (for moe_up 128 of gate and the same 128 of up), in steps of 64 of k.
// The copy engine brings weights and rows of x, which follow one another: for moe_up moe_gather.cuh has put them so. The ring
// goes on from tile to tile, so the first steps of the next one are under way while the last ones of this one are multiplied
// and its sums stored.
#pragma once
#include "mii/moe_mma.cuh"
#include "mii/tensor_map.cuh"
#include "mii/wide_tile.cuh"

namespace mii {

using MoeWideShape = WideShape<kMoeTileRows, 256>;

template <typename T>
struct MoeWideArgs {
  TensorMap x, weight;  // in boxes of 64 elements by 128 rows; x: by row of the list
  MoeArgs<T> moe;
  WideGate gate;  // moe_up
};

#if defined(MII_HOPPER)

template <typename T, bool Up>
struct MoeWide {
  using Shape = MoeWideShape;
  static constexpr int kColumns = Up ? Shape::kHalf : Shape::kColumns;  // of out, of a tile

  const MoeWideArgs<T>& a;
  WideRing<Shape> ring;
  MoeItems items;

  MII_DEVICE MoeWide(const MoeWideArgs<T>& args, uint32_t shared)
      : a(args), ring(shared), items{args.moe.tiles[0].x, (args.moe.n + kColumns - 1) / kColumns} {}
  MII_DEVICE int steps() const { return (a.moe.k + kWideDepth - 1) / kWideDepth; }
  MII_DEVICE int4 tile(int item) const { return a.moe.tiles[1 + items.at(item).x]; }

  // ---- the copying thread
  MII_DEVICE void copy_boxes(const int4 tile, int column_tile, int step, int place) const {
    barrier_expect(ring.full(place), Shape::kStageBytes);
    const int first = tile.x * (Up ? 2 : 1) * a.moe.n + column_tile * kColumns, second = first + (Up ? a.moe.n : Shape::kHalf);
    copy_box(ring.weight(place), &a.weight, step * kWideDepth, first, ring.full(place));
    copy_box(ring.weight(place) + Shape::kHalfBytes, &a.weight, step * kWideDepth, second, ring.full(place));
    copy_box(ring.x(place), &a.x, step * kWideDepth, tile.y, ring.full(place));
  }
  MII_DEVICE void copy_tiles() const {
    RingPlace<Shape::kStages> place;
    int turns = 0;
    int4 next = blockIdx.x < items.count() ? tile(blockIdx.x) : int4{};
    for (int item = blockIdx.x; item < items.count(); item += gridDim.x) {
      const int4 at = next;
      if (item + gridDim.x < items.count()) next = tile(item + gridDim.x);
      for (int step = 0; step < steps(); ++step, ++turns, place.next()) {
        if (turns >= Shape::kStages) barrier_wait(ring.empty(place.at), place.parity ^ 1);
        copy_boxes(at, items.at(item).y, step, place.at);
      }
    }
  }

  // ---- the multiplying warpgroups
  MII_DEVICE void multiply_tiles() const {
    RingPlace<Shape::kStages> place;
    WideSums<Shape> sums;
    int4 next = blockIdx.x < items.count() ? tile(blockIdx.x) : int4{};
    for (int item = blockIdx.x; item < items.count(); item += gridDim.x) {
      const int4 at = next;
      if (item + gridDim.x < items.count()) next = tile(item + gridDim.x);
      const bool any = threadIdx.x / kWarpgroup * 64 < at.z;
      // Where this thread's two rows go, asked for as early as nobody waits for it.
      int to[2];
      float weights[2];
      for_rows<Shape>([&](int row, int low) {
        to[low] = at.y + (row < at.z ? row : 0);
        if constexpr (!Up) to[low] = a.moe.pairs[to[low]];
      });
      multiply_tile<T>(ring, sums, steps(), place, any, [&] {
        if constexpr (!Up) weights[0] = a.moe.pair_weights[to[0]], weights[1] = a.moe.pair_weights[to[1]];
      });
      if (any) store_tile(sums, at.z, to, weights, items.at(item).y * kColumns);
    }
  }
  MII_DEVICE void store_tile(WideSums<Shape>& sums, int rows, const int (&to)[2], const float (&weights)[2], int first) const {
    const WideOut<T> out = {a.moe.out, a.moe.out_stride, a.moe.n};
    out.choose_packs([&](auto packs) {
      for_rows<Shape>([&](int row, int low) {
        if constexpr (Up) {
          store_row<T, Shape, packs.value>(out, to[low], row < rows, first, [&](int, int i) {
            return a.gate(sums.at(0, i + 2 * low)) * sums.at(1, i + 2 * low);
          });
        } else {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            store_row<T, Shape, packs.value>(out, to[low], row < rows, first + half * Shape::kHalf,
                                             [&](int, int i) { return weights[low] * sums.at(half, i + 2 * low); });
          }
        }
      });
    });
  }
};

#endif  // MII_HOPPER

// Grid: one CTA a multiprocessor. Dynamic shared memory: MoeWideShape::kSharedBytes. Tiles of the list: kMoeTileRows.
template <typename T, bool Up>
__global__ void __launch_bounds__(MoeWideShape::kThreads, 1) moe_wide(const __grid_constant__ MoeWideArgs<T> a) {
#if defined(MII_HOPPER)
  wait_for_previous();
  start_next();
  const MoeWide<T, Up> wide(a, shared_address(dynamic_shared()));
  if (threadIdx.x == 0) wide.ring.init();
  __syncthreads();
  if (threadIdx.x >= MoeWideShape::kConsumers) {
    give_registers<40>();
    if (threadIdx.x == MoeWideShape::kConsumers) wide.copy_tiles();
  } else {
    take_registers<232>();
    wide.multiply_tiles();
  }
#endif
}

}  // namespace mii
