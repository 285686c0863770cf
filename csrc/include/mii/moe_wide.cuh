// Experts' products of many rows each by Hopper's warpgroup products (wide_tile.cuh).
//
// Tiles of 128 rows of one expert by 256 weight rows (for moe_up 128 of gate and the same 128 of up), in steps of 64 of k.
// The copy engine brings weights, and for moe_down the rows of x, which follow one another there; for moe_up a warpgroup
// gathers the rows of the expert's tokens. The ring goes on from tile to tile, so the first steps of the next one are under
// way while the last ones of this one are multiplied and its sums stored.
#pragma once
#include "mii/moe_mma.cuh"
#include "mii/tensor_map.cuh"
#include "mii/wide_tile.cuh"

namespace mii {

using MoeWideShape = WideShape<kMoeTileRows, 256>;

template <typename T>
struct MoeWideArgs {
  TensorMap x, weight;  // in boxes of 64 elements by 128 rows; x: moe_down
  MoeArgs<T> moe;
  WideGate gate;  // moe_up
};

#if defined(MII_HOPPER)

template <typename T, bool Up>
struct MoeWide {
  using Shape = MoeWideShape;
  static constexpr int kColumns = Up ? Shape::kHalf : Shape::kColumns;  // of out, of a tile
  static constexpr int kAtOnce = kWarpgroup / 8, kGathered = Shape::kRows / kAtOnce;

  const MoeWideArgs<T>& a;
  WideRing<Shape> ring;
  MoeItems items;

  MII_DEVICE MoeWide(const MoeWideArgs<T>& args, uint32_t shared)
      : a(args), ring(shared), items{args.moe.tiles[0].x, (args.moe.n + kColumns - 1) / kColumns} {}
  MII_DEVICE int steps() const { return (a.moe.k + kWideDepth - 1) / kWideDepth; }
  MII_DEVICE int4 tile(int item) const { return a.moe.tiles[1 + items.at(item).x]; }

  // ---- the copying warpgroup
  MII_DEVICE void copy_boxes(const int4 tile, int column_tile, int step, int place) const {
    barrier_expect(ring.full(place), Up ? Shape::Weight::kBytes : Shape::kStageBytes);
    const int first = tile.x * (Up ? 2 : 1) * a.moe.n + column_tile * kColumns, second = first + (Up ? a.moe.n : Shape::kHalf);
    copy_box(ring.weight(place), &a.weight, step * kWideDepth, first, ring.full(place));
    copy_box(ring.weight(place) + Shape::kHalfBytes, &a.weight, step * kWideDepth, second, ring.full(place));
    if constexpr (!Up) copy_box(ring.x(place), &a.x, step * kWideDepth, tile.y, ring.full(place));
  }
  // The rows of x that this thread copies chunks of; -1: past the tile's rows. All are asked for before one is looked at.
  MII_DEVICE void find_tokens(int (&tokens)[kGathered], const int4 at) const {
    const int first = threadIdx.x % kWarpgroup / 8;
#pragma unroll
    for (int i = 0; i < kGathered; ++i) {
      const int row = first + kAtOnce * i;
      tokens[i] = a.moe.pairs[at.y + (row < at.z ? row : 0)];
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kGathered; ++i) tokens[i] = first + kAtOnce * i < at.z ? tokens[i] / a.moe.top_k : -1;
  }
  MII_DEVICE void gather(const int (&tokens)[kGathered], int step, int place) const {
    const int row = threadIdx.x % kWarpgroup / 8, chunk = threadIdx.x % 8, k = step * kWideDepth + chunk * 8;
#pragma unroll
    for (int i = 0; i < kGathered; ++i) {
      const bool valid = tokens[i] >= 0 && k < a.moe.k;
      const T* source = valid ? a.moe.x + tokens[i] * a.moe.x_stride + k : a.moe.x;
      copy_async(ring.x(place) + Shape::X::offset(row + kAtOnce * i, chunk), source, valid);
    }
    barrier_arrive_after_copies(ring.full(place));
  }
  MII_DEVICE void copy_tiles() const {
    const bool leader = threadIdx.x % kWarpgroup == 0;
    if (!Up && !leader) return;
    RingPlace<Shape::kStages> place;
    int turns = 0;
    int4 next = blockIdx.x < items.count() ? tile(blockIdx.x) : int4{};
    for (int item = blockIdx.x; item < items.count(); item += gridDim.x) {
      const int4 at = next;
      if (item + gridDim.x < items.count()) next = tile(item + gridDim.x);
      int tokens[kGathered];
      if constexpr (Up) find_tokens(tokens, at);
      for (int step = 0; step < steps(); ++step, ++turns, place.next()) {
        if (turns >= Shape::kStages) barrier_wait(ring.empty(place.at), place.parity ^ 1);
        if (leader) copy_boxes(at, items.at(item).y, step, place.at);
        if constexpr (Up) gather(tokens, step, place.at);
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
      multiply_tile<T, Up>(ring, sums, steps(), place, any, [&] {
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
  if (threadIdx.x == 0) wide.ring.init(Up ? 1 + kWarpgroup : 1);
  __syncthreads();
  if (threadIdx.x >= MoeWideShape::kConsumers) {
    give_registers<56>();
    wide.copy_tiles();
  } else {
    take_registers<224>();
    wide.multiply_tiles();
  }
#endif
}

}  // namespace mii
