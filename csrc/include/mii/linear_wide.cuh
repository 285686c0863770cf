// Matrix product with a large weight by Hopper's warpgroup products (PTX ISA, "wgmma"):
//
//   plain   out = x @ weight^T + bias
//   gated   out = act(x @ gate^T) * (x @ up^T), where weight = [gate | up]; both products are rounded before
//   parts   parts[i] = x @ weight^T over the i-th part of k, as floats, with the bias in the first: their sum is the product
//
// for up to 128 rows, a tile of 64 or 128. A CTA computes tile after tile of all rows by 128 weight rows. One thread asks the
// copy engine (TMA) for boxes of x and of the weight, 64 of k at a time, into a ring that goes on through all tiles; two
// warpgroups multiply from there. A tile's weight rows come in two halves: of a plain product side by side, of a gated one
// gate and up of the same columns.
//
// A weight with few tiles is read by all multiprocessors where each takes a part of k, and what follows the product adds up
// (norm.cuh): sums that CTAs hand to one another stand behind all weights that are on their way by then.
//
// With programmatic dependent launch the ring fills with weights before the kernel before this one ends: weights are
// constants, only x has to be waited for. Once a CTA has all of its own it brings weights of the next product into L2.
#pragma once
#include "mii/dynamic_shared.cuh"
#include "mii/prefetch_next.cuh"
#include "mii/tensor_map.cuh"
#include "mii/wide_tile.cuh"

namespace mii {

enum WideEnd { kWidePlain, kWideGated, kWideParts };

struct LinearWideArgs {
  TensorMap x, weight;  // in boxes of 64 elements by the tile's rows, and by its weight rows, of gated ones by half of them
  void* out;            // parts: floats, [parts, rows, n]
  const void* bias;  // or null
  const char* next;  // what to bring into L2 at the end, about `next_fetch` of `next_bytes`, or null
  int64_t out_stride, next_bytes, next_fetch;
  int rows, n, k;  // n: of the weight, gate and up together
  int tiles;
  int parts;  // of k, in which a tile's sums are made; 1 but where they are left so
  WideGate gate;
};

constexpr int kWideColumns = 128;  // weight rows of a tile

#if defined(MII_HOPPER)

template <int Rows, WideEnd End>
struct LinearWide {
  using Shape = WideShape<Rows, kWideColumns>;
  static constexpr bool kGated = End == kWideGated, kParts = End == kWideParts;
  const LinearWideArgs& a;
  WideRing<Shape> ring;

  // What a CTA does at a time: a part of k of a tile.
  struct Item {
    int tile, part, begin, end;  // steps
  };
  MII_DEVICE int items() const { return a.tiles * (kParts ? a.parts : 1); }
  MII_DEVICE Item item(int index) const {
    const int steps = (a.k + kWideDepth - 1) / kWideDepth;
    if constexpr (!kParts) return {index, 0, 0, steps};
    const int part = index % a.parts;
    return {index / a.parts, part, steps * part / a.parts, steps * (part + 1) / a.parts};
  }
  MII_DEVICE int out_width() const { return kGated ? a.n / 2 : a.n; }

  // ---- the copying thread
  MII_DEVICE void copy_weights(int tile, int step, int place, uint64_t policy) const {
    barrier_expect(ring.full(place), Shape::kStageBytes);
    const int first = tile * (kGated ? Shape::kHalf : kWideColumns);
    copy_box(ring.weight(place), &a.weight, step * kWideDepth, first, ring.full(place), policy);
    if constexpr (kGated) {
      const int second = first + a.n / 2;
      copy_box(ring.weight(place) + Shape::kHalfBytes, &a.weight, step * kWideDepth, second, ring.full(place), policy);
    }
  }
  MII_DEVICE void copy_tiles() const {
    const bool any = static_cast<int>(blockIdx.x) < items();
    const Item first = item(blockIdx.x);
    const int early = any ? min(Shape::kStages, first.end - first.begin) : 0;  // weights that do not wait
    const uint64_t policy = read_once_policy();
    start_next();
    for (int i = 0; i < early; ++i) copy_weights(first.tile, first.begin + i, i, policy);
    wait_for_previous();
    RingPlace<Shape::kStages> place;
    int turns = 0;
    for (int index = blockIdx.x; index < items(); index += gridDim.x) {
      const Item now = item(index);
      for (int step = now.begin; step < now.end; ++step, ++turns, place.next()) {
        if (turns >= Shape::kStages) barrier_wait(ring.empty(place.at), place.parity ^ 1);
        if (turns >= early) copy_weights(now.tile, step, place.at, policy);
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
    for (int index = blockIdx.x; index < items(); index += gridDim.x) {
      const Item now = item(index);
      multiply_tile<T>(ring, sums, now.end - now.begin, place, true, [] {});
      if constexpr (kParts) {
        store_part<T>(sums, now);
      } else {
        store_tile<T>(sums, now.tile);
      }
    }
  }

  // ---- results
  template <typename T>
  MII_DEVICE float biased(float sum, int column) const {
    return a.bias == nullptr || column >= a.n ? sum : sum + to_float(static_cast<const T*>(a.bias)[column]);
  }
  template <typename T>
  MII_DEVICE void store_tile(WideSums<Shape>& sums, int tile) const {
    const int first = tile * (kGated ? Shape::kHalf : kWideColumns);
    const WideOut<T> out = {static_cast<T*>(a.out), a.out_stride, out_width()};
    out.choose_packs([&](auto packs) {
      for_rows<Shape>([&](int row, int low) {
        if constexpr (kGated) {
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
  template <typename T>
  MII_DEVICE void store_part(WideSums<Shape>& sums, const Item& of) const {
    const int lane = threadIdx.x % kWarp, own = Shape::kByRows ? 0 : Shape::kHalfOwn * (threadIdx.x / kWarpgroup);
    float* out = static_cast<float*>(a.out) + int64_t(of.part) * a.rows * a.n;
    for_rows<Shape>([&](int row, int low) {
      if (row >= a.rows) return;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int first = of.tile * kWideColumns + half * Shape::kHalf + own + 2 * (lane % 4);
#pragma unroll
        for (int group = 0; group < Shape::kHalfOwn / 8; ++group) {
          const int column = first + 8 * group;
          float2 two = {sums.at(half, 4 * group + 2 * low), sums.at(half, 4 * group + 2 * low + 1)};
          if (of.part == 0) two = {biased<T>(two.x, column), biased<T>(two.y, column + 1)};
          if (column < a.n) *reinterpret_cast<float2*>(out + int64_t(row) * a.n + column) = two;
        }
      }
    });
  }
};

#endif  // MII_HOPPER

// Grid: as many CTAs as the card has multiprocessors, at most one an item. Dynamic shared memory: WideShape::kSharedBytes.
template <typename T, int Rows, WideEnd End>
__global__ void __launch_bounds__(WideShape<Rows, kWideColumns>::kThreads, 1)
    linear_wide(const __grid_constant__ LinearWideArgs a) {
#if defined(MII_HOPPER)
  using Shape = WideShape<Rows, kWideColumns>;
  const LinearWide<Rows, End> wide = {a, WideRing<Shape>(shared_address(dynamic_shared()))};
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
