// Matrix product with a large weight by Hopper's warpgroup products (PTX ISA, "wgmma"):
//
//   plain   out = x @ weight^T + bias
//   gated   out = act(x @ gate^T) * (x @ up^T), where weight = [gate | up]; both products are rounded before
//
// for up to 128 rows, a tile of 64 or 128. A CTA computes tile after tile of all rows by 128 weight rows. One thread asks the
// copy engine (TMA) for boxes of x and of the weight, 64 of k at a time, into a ring that goes on through all tiles; two
// warpgroups multiply from there. A tile's weight rows come in two halves: of a plain product side by side, of a gated one
// gate and up of the same columns.
//
// With programmatic dependent launch the ring fills with weights before the kernel before this one ends: weights are
// constants, only x has to be waited for. Once a CTA has all of its own it brings weights of the next product into L2.
#pragma once
#include "mii/dynamic_shared.cuh"
#include "mii/prefetch_next.cuh"
#include "mii/tensor_map.cuh"
#include "mii/wide_tile.cuh"

namespace mii {

struct LinearWideArgs {
  TensorMap x, weight;  // in boxes of 64 elements by the tile's rows, and by half of its weight rows
  void* out;
  const void* bias;  // or null
  const char* next;  // what to bring into L2 at the end, about `next_fetch` of `next_bytes`, or null
  int64_t out_stride, next_bytes, next_fetch;
  int rows, n, k;  // n: of the weight, gate and up together
  int tiles;
  WideGate gate;
};

constexpr int kWideColumns = 128;  // weight rows of a tile

#if defined(MII_HOPPER)

template <int Rows, bool Gated>
struct LinearWide {
  using Shape = WideShape<Rows, kWideColumns>;
  const LinearWideArgs& a;
  WideRing<Shape> ring;

  MII_DEVICE int steps() const { return (a.k + kWideDepth - 1) / kWideDepth; }
  MII_DEVICE int out_width() const { return Gated ? a.n / 2 : a.n; }

  // ---- the copying thread
  MII_DEVICE void copy_weights(int tile, int step, int place, uint64_t policy) const {
    barrier_expect(ring.full(place), Shape::kStageBytes);
    const int first = tile * (Gated ? Shape::kHalf : kWideColumns), second = first + (Gated ? a.n / 2 : Shape::kHalf);
    copy_box(ring.weight(place), &a.weight, step * kWideDepth, first, ring.full(place), policy);
    copy_box(ring.weight(place) + Shape::kHalfBytes, &a.weight, step * kWideDepth, second, ring.full(place), policy);
  }
  MII_DEVICE void copy_tiles() const {
    const int early = static_cast<int>(blockIdx.x) < a.tiles ? min(Shape::kStages, steps()) : 0;  // weights that do not wait
    const uint64_t policy = read_once_policy();
    start_next();
    for (int step = 0; step < early; ++step) copy_weights(blockIdx.x, step, step, policy);
    wait_for_previous();
    RingPlace<Shape::kStages> place;
    int turns = 0;
    for (int tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
      for (int step = 0; step < steps(); ++step, ++turns, place.next()) {
        if (turns >= Shape::kStages) barrier_wait(ring.empty(place.at), place.parity ^ 1);
        if (turns >= early) copy_weights(tile, step, place.at, policy);
        copy_box(ring.x(place.at), &a.x, step * kWideDepth, 0, ring.full(place.at));
      }
    }
    if (a.next == nullptr || turns == 0) return;
    barrier_wait(ring.full((turns - 1) % Shape::kStages), (turns - 1) / Shape::kStages & 1);
    prefetch_next<1>(a, 0);
  }

  // ---- the multiplying warpgroups
  template <typename T>
  MII_DEVICE void multiply_tiles() const {
    wait_for_previous();  // before anything is written that the kernel before this one may still read
    RingPlace<Shape::kStages> place;
    WideSums<Shape> sums;
    for (int tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
      multiply_tile<T>(ring, sums, steps(), place, true, [] {});
      store_tile<T>(sums, tile);
    }
  }

  // ---- results
  template <typename T>
  MII_DEVICE float biased(float sum, int column) const {
    return a.bias == nullptr || column >= a.n ? sum : sum + to_float(static_cast<const T*>(a.bias)[column]);
  }
  template <typename T>
  MII_DEVICE void store_tile(WideSums<Shape>& sums, int tile) const {
    const int first = tile * (Gated ? Shape::kHalf : kWideColumns);
    const WideOut<T> out = {static_cast<T*>(a.out), a.out_stride, out_width()};
    out.choose_packs([&](auto packs) {
      for_rows<Shape>([&](int row, int low) {
        if constexpr (Gated) {
          store_row<T, Shape, packs.value>(out, row, row < a.rows, first, [&](int column, int i) {
            const float gate = rounded<T>(biased<T>(sums.at(0, i + 2 * low), column));
            return a.gate(gate) * rounded<T>(biased<T>(sums.at(1, i + 2 * low), a.n / 2 + column));
          });
        } else {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            store_row<T, Shape, packs.value>(out, row, row < a.rows, first + half * Shape::kHalf, [&](int column, int i) {
              return biased<T>(sums.at(half, i + 2 * low), column);
            });
          }
        }
      });
    });
  }
};

#endif  // MII_HOPPER

// Grid: as many CTAs as the card has multiprocessors, at most one a tile. Dynamic shared memory: WideShape::kSharedBytes.
template <typename T, int Rows, bool Gated>
__global__ void __launch_bounds__(WideShape<Rows, kWideColumns>::kThreads, 1)
    linear_wide(const __grid_constant__ LinearWideArgs a) {
#if defined(MII_HOPPER)
  using Shape = WideShape<Rows, kWideColumns>;
  const LinearWide<Rows, Gated> wide = {a, WideRing<Shape>(shared_address(dynamic_shared()))};
  if (threadIdx.x == 0) wide.ring.init();
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
