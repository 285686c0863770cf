// Experts' products of many rows each by Hopper's warpgroup products (wide_tile.cuh).
//
// Tiles of 192 rows of one expert by 256 weight rows (for moe_up 128 of gate and the same 128 of up), in steps of 64 of k.
// The copy engine brings weights and rows of x, which follow one another: for moe_up moe_gather.cuh has put them so. The ring
// goes on from tile to tile, so the first steps of the next one are under way while the last ones of this one are multiplied
// and its sums stored. CTAs draw their tiles one by one from a counter in the head of the list.
#pragma once
#include "mii/moe_mma.cuh"
#include "mii/tensor_map.cuh"
#include "mii/wide_tile.cuh"

namespace mii {

constexpr int kMoeWideRows = 192, kMoeWideBand = 6;  // of a tile; of a band (MoeItems), in tiles
using MoeWideShape = WideShape<kMoeWideRows, 256>;

template <typename T>
struct MoeWideArgs {
  static constexpr int kBoxRows = 64;  // of x, those of a warpgroup
  TensorMap x, weight;                 // in boxes of 64 elements by kBoxRows and 128 rows; x: by row of the list
  MoeArgs<T> moe;
  WideGate gate;  // moe_up
};

#if defined(MII_HOPPER)

template <typename T, bool Up>
struct MoeWide {
  using Shape = MoeWideShape;
  static constexpr int kColumns = Up ? Shape::kHalf : Shape::kColumns;  // of out, of a tile

  static constexpr int kBoxRows = MoeWideArgs<T>::kBoxRows, kBoxes = Shape::kRows / kBoxRows;
  static constexpr int kBoxBytes = Shape::X::kBytes / kBoxes;
  // The copying thread is at most as many tiles ahead as the ring has places.
  static constexpr int kNotes = 8;
  static_assert(Shape::kStages + 2 <= kNotes);

  const MoeWideArgs<T>& a;
  WideRing<Shape> ring;
  int4* notes;  // by tile, (first row, rows, first column of out, 0), there with its first stage; no rows: the end

  MII_DEVICE MoeWide(const MoeWideArgs<T>& args, uint32_t shared, int4* notes_) : a(args), ring(shared), notes(notes_) {}
  MII_DEVICE int steps() const { return (a.moe.k + kWideDepth - 1) / kWideDepth; }
  // The next item that nobody has: not all CTAs are equally fast, and those that share weights or rows shall read them at the
  // same time. As many are drawn as there are, so whoever draws the last one leaves the counter as it was.
  MII_DEVICE int draw(int count) const {
    int* counter = const_cast<int*>(Up ? &a.moe.tiles[0].y : &a.moe.tiles[0].z);
    const int drawn = atomicAdd(counter, 1);
    if (drawn == count - 1) *counter = 0;
    return gridDim.x + drawn;
  }

  // ---- the copying thread
  MII_DEVICE void copy_boxes(const int4 tile, int column_tile, int step, int place) const {
    const int boxes = (tile.z + kBoxRows - 1) / kBoxRows;
    barrier_expect(ring.full(place), Shape::Weight::kBytes + boxes * kBoxBytes);
    const int first = tile.x * (Up ? 2 : 1) * a.moe.n + column_tile * kColumns, second = first + (Up ? a.moe.n : Shape::kHalf);
    copy_box(ring.weight(place), &a.weight, step * kWideDepth, first, ring.full(place));
    copy_box(ring.weight(place) + Shape::kHalfBytes, &a.weight, step * kWideDepth, second, ring.full(place));
#pragma unroll
    for (int i = 0; i < kBoxes; ++i) {
      if (i == boxes) break;
      const int row = i * kBoxRows, rows = min(kBoxRows, tile.z - row);  // zeros in place of others' rows: they cost less power
      copy_rows(ring.x(place) + i * kBoxBytes, &a.x, step * kWideDepth, tile.y + row, rows, kBoxRows, ring.full(place));
    }
  }
  MII_DEVICE void copy_tiles() const {
    RingPlace<Shape::kStages> place;
    const MoeItems items = {a.moe.tiles[0].x, (a.moe.n + kColumns - 1) / kColumns, kMoeWideBand};
    int count = 0;
    for (int item = blockIdx.x, next; item < items.count(); item = next, ++count) {
      const int2 which = items.at(item);
      const int4 tile = a.moe.tiles[1 + which.x];
#pragma unroll 1
      for (int step = 0; step < steps(); ++step, place.next()) {
        if (step + 1 == steps()) next = draw(items.count());
        barrier_wait(ring.empty(place.at), place.parity ^ 1);  // over at once in the first turn
        if (step == 0) notes[count % kNotes] = make_int4(tile.y, tile.z, which.y * kColumns, 0);
        copy_boxes(tile, which.y, step, place.at);
      }
    }
    barrier_wait(ring.empty(place.at), place.parity ^ 1);
    notes[count % kNotes] = make_int4(0, 0, 0, 0);
    barrier_arrive(ring.full(place.at));
  }

  // ---- the multiplying warpgroups
  MII_DEVICE void multiply_tiles() const {
    RingPlace<Shape::kStages> place;
    WideSums<Shape> sums;
    for (int count = 0;; ++count) {
      barrier_wait(ring.full(place.at), place.parity);
      const int4& note = notes[count % kNotes];
      const int first = note.x, rows = note.y;
      if (rows == 0) return;
      const bool any = threadIdx.x / kWarpgroup * 64 < rows;
      // Where this thread's two rows go, asked for as early as nobody waits for it.
      int to[2];
      float weights[2];
      for_rows<Shape>([&](int row, int low) {
        to[low] = first + (row < rows ? row : 0);
        if constexpr (!Up) to[low] = a.moe.pairs[to[low]];
      });
      multiply_tile<T>(ring, sums, steps(), place, any, [&] {
        if constexpr (!Up) weights[0] = a.moe.pair_weights[to[0]], weights[1] = a.moe.pair_weights[to[1]];
      });
      if (any) store_tile(sums, note.y, to, weights, note.z);
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

// Grid: one CTA a multiprocessor. Dynamic shared memory: MoeWideShape::kSharedBytes. Tiles of the list: kMoeWideRows.
template <typename T, bool Up>
__global__ void __launch_bounds__(MoeWideShape::kThreads, 1) moe_wide(const __grid_constant__ MoeWideArgs<T> a) {
#if defined(MII_HOPPER)
  wait_for_previous();
  start_next();
  __shared__ int4 notes[MoeWide<T, Up>::kNotes];
  const MoeWide<T, Up> wide(a, shared_address(dynamic_shared()), notes);
  if (threadIdx.x == 0) wide.ring.init();
  __syncthreads();
  if (threadIdx.x >= MoeWideShape::kConsumers) {
    give_registers<32>();
    if (threadIdx.x == MoeWideShape::kConsumers) wide.copy_tiles();
  } else {
    take_registers<160>();
    wide.multiply_tiles();
  }
#endif
}

}  // namespace mii
