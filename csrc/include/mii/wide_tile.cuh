// A tile of a matrix product by warpgroup products: rows of x by weight rows, both with k along their elements, out of a
// ring in shared memory. What linear_wide.cuh and moe_wide.cuh share.
#pragma once
#include <type_traits>

#include "mii/activation.cuh"
#include "mii/quad.cuh"
#include "mii/same_for_warp.cuh"
#include "mii/wgmma.cuh"

namespace mii {

constexpr int kWideDepth = 64;  // of k, of a step
constexpr int kWideAlignment = 1024, kWideNotes = 512;
constexpr int kWideBudget = 227 * 1024 - kWideAlignment - kWideNotes;

template <int Rows, int Columns>
struct WideShape {
  static constexpr int kRows = Rows, kColumns = Columns;
  // Of 128 or 192 rows each warpgroup has 64, and all weight rows; 64 rows are shared by two, each with a part of both halves of
  // the weight rows.
  static constexpr bool kByRows = Rows > 64;
  static constexpr int kGroups = kByRows ? Rows / 64 : 2;  // warpgroups that multiply; one more copies
  static constexpr int kConsumers = kGroups * kWarpgroup, kThreads = kConsumers + kWarpgroup;
  // Four warpgroups are compiled for 128 registers a thread, where a product of 256 columns finds no room.
  static constexpr int kPieces = Rows == 128 ? 1 : 2;
  static constexpr int kPieceColumns = (kByRows ? Columns : Columns / 2) / kPieces;
  static constexpr int kHalf = Columns / 2, kHalfOwn = kByRows ? kHalf : kHalf / 2;
  using X = Panels<Rows, kWideDepth>;
  using Weight = Panels<Columns, kWideDepth>;
  static constexpr int kHalfBytes = Weight::kBytes / 2, kStageBytes = X::kBytes + Weight::kBytes;
  static constexpr int kFit = kWideBudget / kStageBytes, kStages = kFit < 16 ? kFit : 16;
  static constexpr int kSharedBytes = kStages * kStageBytes + kWideAlignment + kWideNotes;
  static_assert(Rows == 64 || Rows == 128 || Rows == 192, "a warpgroup has 64 rows");
  static_assert(kHalfOwn % 32 == 0, "rows are stored in runs of 32 columns");
  static_assert(2 * kStages * kBarrierBytes <= kWideNotes);
};

// act(x) = x * sigmoid(x * (linear + cubic * x * x)): silu, and gelu by tanh or quick.
struct WideGate {
  float linear, cubic;
  MII_DEVICE float operator()(float x) const { return __fdividef(x, 1.0f + __expf(-x * (linear + cubic * x * x))); }
};

#if defined(MII_HOPPER)

// The shared memory: the stages, then two barriers for each.
template <typename Shape>
struct WideRing {
  uint32_t base;

  MII_DEVICE explicit WideRing(uint32_t shared) : base((shared + kWideAlignment - 1) / kWideAlignment * kWideAlignment) {}
  MII_DEVICE uint32_t x(int place) const { return base + place * Shape::kStageBytes; }
  MII_DEVICE uint32_t weight(int place) const { return x(place) + Shape::X::kBytes; }
  MII_DEVICE uint32_t full(int place) const { return base + Shape::kStages * Shape::kStageBytes + kBarrierBytes * place; }
  MII_DEVICE uint32_t empty(int place) const { return full(Shape::kStages + place); }
  // By one thread, before all others go on.
  MII_DEVICE void init() const {
    for (int i = 0; i < Shape::kStages; ++i) {
      barrier_init(full(i), 1);
      barrier_init(empty(i), Shape::kConsumers / kWarp);
    }
    barrier_init_fence();
  }
};

// A thread's sums, in the order of wgmma's results.
template <typename Shape>
struct WideSums {
  static constexpr int kCount = Shape::kPieceColumns / 2;
  float piece[Shape::kPieces][kCount];

  MII_DEVICE void clear() {
#pragma unroll
    for (auto& one : piece) {
#pragma unroll
      for (float& sum : one) sum = 0.0f;
    }
  }
  MII_DEVICE void settled() {
#pragma unroll
    for (auto& one : piece) settle(one);
  }
  // Sum i of this warpgroup's part of a half of the weight rows.
  MII_DEVICE float at(int half, int i) const {
    return Shape::kPieces == 2 ? piece[half % Shape::kPieces][i % kCount]
                               : piece[0][(half * (Shape::kHalf / 2) + i) % kCount];
  }
};

// What the products of this warpgroup read of every stage: an operand of x and one of the weight.
template <typename Shape>
struct WideOperands {
  uint32_t x, weight;  // addresses within the first stage

  MII_DEVICE explicit WideOperands(const WideRing<Shape>& ring) {
    const int group = same_for_warp(threadIdx.x / kWarpgroup);
    const uint32_t base = same_for_warp(ring.base);
    x = base + (Shape::kByRows ? Shape::X::elements_at(64 * group, 0) : 0);
    weight = base + Shape::X::kBytes + (Shape::kByRows ? 0 : Shape::Weight::elements_at(Shape::kPieceColumns * group, 0));
  }
};

// Hands sums += x . weight of a stage to the tensor cores.
template <typename T, typename Shape>
MII_DEVICE void multiply_step(const WideOperands<Shape>& operands, WideSums<Shape>& sums, int place) {
  const uint32_t stage = same_for_warp(place * Shape::kStageBytes);
  const uint64_t x = matrix_descriptor(operands.x + stage, 16, Shape::X::kStrideBytes);
  const uint64_t weight = matrix_descriptor(operands.weight + stage, 16, Shape::Weight::kStrideBytes);
  products_fence();
#pragma unroll
  for (int k = 0; k < kWideDepth / 16; ++k) {
#pragma unroll
    for (int p = 0; p < Shape::kPieces; ++p) {
      product<T, true>(sums.piece[p], advanced(x, Shape::X::elements_at(0, k)),
                       advanced(weight, p * Shape::kHalfBytes + Shape::Weight::elements_at(0, k)));
    }
  }
  products_commit();
}

// sums = x . weight over the next `steps` stages. A stage is given back once the products of the one after are handed over,
// so that the tensor cores always have work. Not `any`: none of this warpgroup's rows is asked for, the stages only pass by.
// last() is called while the last products are under way.
template <typename T, typename Shape, typename Last>
MII_DEVICE void multiply_tile(const WideRing<Shape>& ring, WideSums<Shape>& sums, int steps,
                              RingPlace<Shape::kStages>& place, bool any, Last&& last) {
  const auto release = [&](int of) {
    if (threadIdx.x % kWarp == 0) barrier_arrive(ring.empty(of));
  };
  if (!any) {
    for (int step = 0; step < steps; ++step, place.next()) {
      barrier_wait(ring.full(place.at), place.parity);
      __syncwarp();
      release(place.at);
    }
    return;
  }
  const WideOperands<Shape> operands(ring);
  sums.clear();
  int before = 0;
  for (int step = 0; step < steps; ++step) {
    barrier_wait(ring.full(place.at), place.parity);
    multiply_step<T>(operands, sums, place.at);
    if (step > 0) {
      products_wait<1>();
      release(before);
    }
    before = place.at;
    place.next();
  }
  last();
  products_wait<0>();
  sums.settled();
  if (steps > 0) release(before);
}

// ---- what becomes of the sums -------------------------------------------------------------------------------------
// Calls body(row, low) for the two rows of the tile that this thread has sums of; those of the second are 2 further on.
template <typename Shape, typename Body>
MII_DEVICE void for_rows(Body&& body) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int first = (Shape::kByRows ? 64 * (warp / 4) : 0) + warp % 4 * 16 + lane / 4;
#pragma unroll
  for (int low = 0; low < 2; ++low) body(first + 8 * low, low);
}

template <typename T>
struct WideOut {
  T* data;
  int64_t stride;
  int width;

  // Calls body(std::true_type) where rows can be stored in packs of 16 bytes, body(std::false_type) where they cannot.
  template <typename Body>
  MII_DEVICE void choose_packs(Body&& body) const {
    if (stride % 8 == 0 && width % 8 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0) {
      body(std::true_type{});
    } else {
      body(std::false_type{});
    }
  }
};

// Stores this thread's part of a half of a row of the tile, whose first column of out is `first`: value(column, i) for sum i
// of the half. All lanes of a warp come, with rows of their own.
template <typename T, typename Shape, bool Packs, typename Value>
MII_DEVICE void store_row(const WideOut<T>& out, int64_t row, bool valid, int first, Value&& value) {
  const int lane = threadIdx.x % kWarp;
  const int start = first + (Shape::kByRows ? 0 : Shape::kHalfOwn * (threadIdx.x / kWarpgroup));
  T* target = out.data + row * out.stride;
#pragma unroll
  for (int group = 0; group < Shape::kHalfOwn / 8; group += 4) {
    uint32_t p[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = start + 8 * (group + i) + 2 * (lane % 4), at = 4 * (group + i);
      const float two[2] = {value(column, at), value(column + 1, at + 1)};
      const Pack<T, 2> pack = make_pack<T>(two);
      p[i] = *reinterpret_cast<const uint32_t*>(&pack);
      if (!Packs && valid) {
        if (column < out.width) target[column] = pack.data[0];
        if (column + 1 < out.width) target[column + 1] = pack.data[1];
      }
    }
    if constexpr (!Packs) continue;
    transpose_quad(p);
    const int column = start + 8 * (group + lane % 4);
    if (valid && column < out.width) *reinterpret_cast<uint4*>(target + column) = make_uint4(p[0], p[1], p[2], p[3]);
  }
}

#endif  // MII_HOPPER

}  // namespace mii
