// Matrix product with a large weight by Hopper's warpgroup products (PTX ISA, "wgmma"):
//
//   plain   out = x @ weight^T + bias
//   gated   out = act(x @ gate^T) * (x @ up^T), where weight = [gate | up]; both products are rounded before
//
// A CTA computes tile after tile of 64 or 128 rows by `Columns` weight rows. One thread asks the copy engine (TMA) for boxes of
// x and of the weight, 64 of k at a time, into a ring that goes on through all tiles; two warpgroups multiply from there. A
// tile's weight rows come in two halves: of a plain product side by side, of a gated one gate and up of the same columns.
//
// Where tiles do not fill the multiprocessors evenly they are shared: each CTA has a tile of rows and an equal run of units of
// 256 of k through the tiles of columns (stream-K: Osama et al., arXiv 2301.03598); the CTAs of all tiles of rows go through the
// same weight rows side by side. A run is gone through from its last tile back. Of that one, whose end the next CTA has, a CTA
// leaves its sums; to its first one it adds, at the very end, what the CTAs before it have left, in their order.
//
// With programmatic dependent launch the ring fills with weights before the kernel before this one ends: weights are
// constants, only x has to be waited for. Once a CTA has all of its own it brings weights of the next product into L2.
#pragma once
#include "mii/dynamic_shared.cuh"
#include "mii/prefetch_next.cuh"
#include "mii/stream_runs.cuh"
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
  bool shared;      // tiles are; then
  float4* partial;  // [CTAs, WideShape::kSumBytes / 16]: sums that a CTA left
  int* left;        // [CTAs]: whether it did; zero between launches
};

constexpr int kWideUnit = 4;  // steps of a unit

// Steps first .. last - 1 of a tile.
struct WidePart {
  int row, column, first, last;
};

#if defined(MII_HOPPER)

template <int Rows, int Columns, bool Gated>
struct LinearWide {
  using Shape = WideShape<Rows, Columns>;
  const LinearWideArgs& a;
  WideRing<Shape> ring;
  static constexpr int kAdd = 1, kLeave = 2;  // barriers of threads

  MII_DEVICE int steps() const { return (a.k + kWideDepth - 1) / kWideDepth; }
  MII_DEVICE int units() const { return (steps() + kWideUnit - 1) / kWideUnit; }  // of a tile
  // The runs of the groups of CTAs that have all tiles of rows of the same columns.
  MII_DEVICE StreamRuns runs() const {
    return {int64_t(a.column_tiles) * units(), static_cast<int>(gridDim.x) / a.row_tiles, units()};
  }
  MII_DEVICE int group() const { return static_cast<int>(blockIdx.x) / a.row_tiles; }

  // What this CTA goes through, as [at, stop): tiles, or, from the end back, units.
  struct Walk {
    int at, stop;
  };
  MII_DEVICE Walk walk() const {
    if (!a.shared) return {static_cast<int>(blockIdx.x), a.row_tiles * a.column_tiles};
    return {runs().begin(group() + 1), runs().begin(group())};
  }
  MII_DEVICE bool more(const Walk& walk) const { return a.shared ? walk.at > walk.stop : walk.at < walk.stop; }
  MII_DEVICE WidePart next(Walk& walk) const { return a.shared ? shared_part(walk) : whole_part(walk); }
  MII_DEVICE WidePart whole_part(Walk& walk) const {
    const int whole = a.band * a.column_tiles, band = walk.at / whole, within = walk.at - band * whole;
    const int height = min(a.band, a.row_tiles - band * a.band), column = within / height;
    walk.at += gridDim.x;
    return {band * a.band + within - column * height, column, 0, steps()};
  }
  MII_DEVICE WidePart shared_part(Walk& walk) const {
    const int column = (walk.at - 1) / units(), tile = column * units(), first = max(walk.stop, tile) - tile;
    const int last = min(steps(), (walk.at - tile) * kWideUnit);
    walk.at = tile + first;
    return {static_cast<int>(blockIdx.x) - group() * a.row_tiles, column, first * kWideUnit, last};
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
  MII_DEVICE void copy_tiles() const {
    Walk rest = walk();
    const bool any = more(rest);
    WidePart part = any ? next(rest) : WidePart{};
    const int early = min(Shape::kStages, part.last - part.first);  // weights that do not wait
    start_next();
    for (int step = 0; step < early; ++step) copy_weights(part.column, part.first + step, step);
    wait_for_previous();
    if (!any) return;
    RingPlace<Shape::kStages> place;
    for (int turns = 0;; part = next(rest)) {
      for (int step = part.first; step < part.last; ++step, ++turns, place.next()) {
        if (turns >= Shape::kStages) barrier_wait(ring.empty(place.at), place.parity ^ 1);
        if (turns >= early) copy_weights(part.column, step, place.at);
        copy_rows(part.row, step, place.at);
      }
      if (more(rest)) continue;
      if (a.next == nullptr) return;
      barrier_wait(ring.full((turns - 1) % Shape::kStages), (turns - 1) / Shape::kStages & 1);
      return prefetch_next<1>(a, 0);
    }
  }

  // ---- the multiplying warpgroups
  template <typename T>
  MII_DEVICE void multiply_tiles() const {
    wait_for_previous();  // before anything is written that the kernel before this one may still read
    RingPlace<Shape::kStages> place;
    WideSums<Shape> sums;
    for (Walk rest = walk(); more(rest);) {
      const WidePart part = next(rest);
      multiply_tile<T, false>(ring, sums, part.last - part.first, place, true);
      if (part.last < steps()) {
        leave_sums(sums);
      } else {
        if (part.first > 0) add_left(sums, part);
        store_tile<T>(sums, {part.row, part.column});
      }
    }
  }

  // ---- sums of shared tiles
  MII_DEVICE float4* place_of(int cta) const { return a.partial + int64_t(cta) * (Shape::kSumBytes / 16) + threadIdx.x; }
  MII_DEVICE void leave_sums(WideSums<Shape>& sums) const {
    float4* target = place_of(blockIdx.x);
    sums.for_fours([&](int i, float* four) {
      __stcg(target + i * Shape::kConsumers, make_float4(four[0], four[1], four[2], four[3]));
    });
    threads_arrive(kLeave, Shape::kConsumers + kWarp);
  }
  // By a warp that does nothing else, so that those that multiply need not wait until their sums are seen.
  MII_DEVICE void announce_sums() const {
    wait_for_previous();
    if (!a.shared || runs().begin(group() + 1) % units() == 0) return;
    threads_wait(kLeave, Shape::kConsumers + kWarp);
    if (threadIdx.x % kWarp != 0) return;
    __threadfence();
    atomicAdd(a.left + blockIdx.x, 1);
  }
  // CTAs start in the order of their numbers, so those before this one run or have run, whatever else the card does.
  MII_DEVICE void add_left(WideSums<Shape>& sums, const WidePart& part) const {
    for (int from = runs().cta_of(part.column * units()); from < group(); ++from) {
      const int cta = from * a.row_tiles + part.row;
      if (threadIdx.x == 0) await_sums(a.left + cta);
      threads_wait(kAdd, Shape::kConsumers);
      const float4* source = place_of(cta);
      sums.for_fours([&](int i, float* four) {
        const float4 one = __ldcg(source + i * Shape::kConsumers);
        four[0] += one.x, four[1] += one.y, four[2] += one.z, four[3] += one.w;
      });
    }
  }
  // As barrier_wait, it goes on after some seconds.
  MII_DEVICE static void await_sums(int* left) {
    constexpr int kTries = 1 << 22;
    for (int i = 0; i < kTries && *static_cast<volatile int*>(left) == 0; ++i) {
    }
    __threadfence();
    *left = 0;
  }

  // ---- results
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

// Grid: as many CTAs as the card has multiprocessors, at most one a tile; of shared tiles, a multiple of the tiles of rows, with
// at least a unit for each. Dynamic shared memory: WideShape::kSharedBytes.
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
    if (threadIdx.x / kWarp == Shape::kConsumers / kWarp + 1) wide.announce_sums();
    wait_for_previous();
  } else {
    take_registers<232>();
    wide.template multiply_tiles<T>();
  }
#endif
}

}  // namespace mii
