// Matrix product with a large weight by Hopper's warpgroup products (PTX ISA, "wgmma"):
//
//   plain   out = x @ weight^T + bias
//   gated   out = act(x @ gate^T) * (x @ up^T), where weight = [gate | up]; both products are rounded before
//
// A CTA computes tile after tile of 64 or 128 rows by `Columns` weight rows. One thread asks the copy engine (TMA) for boxes of
// x and of the weight, 64 of k at a time, into a ring that goes on through all tiles; two warpgroups multiply from there. A
// tile's weight rows come in two halves: of a plain product side by side, of a gated one gate and up of the same columns.
//
// With programmatic dependent launch the ring fills with weights before the kernel before this one ends: weights are
// constants, only x has to be waited for. Once a CTA has all of its own it brings weights of the next product into L2.
#pragma once
#include "mii/dynamic_shared.cuh"
#include "mii/tensor_map.cuh"
#include "mii/wide_tile.cuh"

namespace mii {

struct LinearWideArgs {
  TensorMap x, weight;  // in boxes of 64 elements by the tile's rows, and by half of its weight rows
  void* out;
  const void* bias;  // or null
  const char* next;  // what to bring into L2 at the end, about `next_fetch` of `next_bytes`, or null
  int64_t out_stride, next_bytes, next_fetch;
  int rows, n, k;                     // n: of the weight, gate and up together
  int row_tiles, column_tiles, band;  // `band` tiles of rows are gone through for one of columns
  WideGate gate;
};

#if defined(MII_HOPPER)

template <int Rows, int Columns, bool Gated>
struct LinearWide {
  using Shape = WideShape<Rows, Columns>;
  const LinearWideArgs& a;
  WideRing<Shape> ring;

  MII_DEVICE int items() const { return a.row_tiles * a.column_tiles; }
  MII_DEVICE int steps() const { return (a.k + kWideDepth - 1) / kWideDepth; }
  // (tile of rows, tile of columns)
  MII_DEVICE int2 tile(int item) const {
    const int whole = a.band * a.column_tiles, band = item / whole, within = item - band * whole;
    const int height = min(a.band, a.row_tiles - band * a.band), column = within / height;
    return {band * a.band + within - column * height, column};
  }
  MII_DEVICE int out_width() const { return Gated ? a.n / 2 : a.n; }

  // ---- the copying thread
  MII_DEVICE void copy_weights(int column_tile, int step, int place) const {
    barrier_expect(ring.full(place), Shape::kStageBytes);
    const int first = column_tile * (Gated ? Shape::kHalf : Columns), second = first + (Gated ? a.n / 2 : Shape::kHalf);
    const bool once = a.row_tiles == 1;
    copy_box(ring.weight(place), &a.weight, step * kWideDepth, first, ring.full(place), once);
    copy_box(ring.weight(place) + Shape::kHalfBytes, &a.weight, step * kWideDepth, second, ring.full(place), once);
  }
  MII_DEVICE void copy_rows(int row_tile, int step, int place) const {
    copy_box(ring.x(place), &a.x, step * kWideDepth, row_tile * Rows, ring.full(place));
  }
  MII_DEVICE void fetch_next() const {
    const int64_t start = a.next_bytes / 16 * blockIdx.x / gridDim.x * 16;
    const int64_t stop = min(a.next_bytes / 16 * 16, start + a.next_fetch / gridDim.x / 4096 * 4096);
    for (int64_t at = start; at < stop; at += 4096) fetch_bytes(a.next + at, static_cast<int>(min(int64_t(4096), stop - at)));
  }
  MII_DEVICE void copy_tiles() const {
    const int early = blockIdx.x < items() ? min(Shape::kStages, steps()) : 0;  // weights that do not wait
    start_next();
    for (int step = 0; step < early; ++step) copy_weights(tile(blockIdx.x).y, step, step);
    wait_for_previous();
    RingPlace<Shape::kStages> place;
    int turns = 0;
    for (int item = blockIdx.x; item < items(); item += gridDim.x) {
      const int2 at = tile(item);
      for (int step = 0; step < steps(); ++step, ++turns, place.next()) {
        if (turns >= Shape::kStages) barrier_wait(ring.empty(place.at), place.parity ^ 1);
        if (turns >= early) copy_weights(at.y, step, place.at);
        copy_rows(at.x, step, place.at);
      }
    }
    if (a.next == nullptr || turns == 0) return;
    barrier_wait(ring.full((turns - 1) % Shape::kStages), (turns - 1) / Shape::kStages & 1);
    fetch_next();
  }

  // ---- the multiplying warpgroups
  template <typename T>
  MII_DEVICE void multiply_tiles() const {
    wait_for_previous();  // before anything is written that the kernel before this one may still read
    RingPlace<Shape::kStages> place;
    WideSums<Shape> sums;
    for (int item = blockIdx.x; item < items(); item += gridDim.x) {
      multiply_tile<T, false>(ring, sums, steps(), place, true);
      store_tile<T>(sums, tile(item));
    }
  }
  template <typename T>
  MII_DEVICE float biased(float sum, int column) const {
    return a.bias == nullptr || column >= a.n ? sum : sum + to_float(static_cast<const T*>(a.bias)[column]);
  }
  template <typename T>
  MII_DEVICE void store_tile(WideSums<Shape>& sums, int2 at) const {
    const int first = at.y * (Gated ? Shape::kHalf : Columns);
    const WideOut<T> out = {static_cast<T*>(a.out), a.out_stride, out_width()};
    for_rows<Shape>([&](int within, int low) {
      const int row = at.x * Rows + within;
      if constexpr (Gated) {
        store_row<T, Shape>(out, row, row < a.rows, first, [&](int column, int i) {
          const float gate = rounded<T>(biased<T>(sums.at(0, i + 2 * low), column));
          return a.gate(gate) * rounded<T>(biased<T>(sums.at(1, i + 2 * low), a.n / 2 + column));
        });
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          store_row<T, Shape>(out, row, row < a.rows, first + half * Shape::kHalf, [&](int column, int i) {
            return biased<T>(sums.at(half, i + 2 * low), column);
          });
        }
      }
    });
  }
};

#endif  // MII_HOPPER

// Grid: as many CTAs as the card has multiprocessors, at most one a tile. Dynamic shared memory: WideShape::kSharedBytes.
template <typename T, int Rows, int Columns, bool Gated>
__global__ void __launch_bounds__(WideShape<Rows, Columns>::kThreads, 1)
    linear_wide(const __grid_constant__ LinearWideArgs a) {
#if defined(MII_HOPPER)
  using Shape = WideShape<Rows, Columns>;
  const LinearWide<Rows, Columns, Gated> wide = {a, WideRing<Shape>(shared_address(dynamic_shared()))};
  if (threadIdx.x == 0) wide.ring.init(1);
  __syncthreads();
  if (threadIdx.x >= Shape::kConsumers) {
    give_registers<40>();
    if (threadIdx.x == Shape::kConsumers) wide.copy_tiles();
    wait_for_previous();
  } else {
    take_registers<232>();
    wide.template multiply_tiles<T>();
  }
#endif
}

}  // namespace mii
