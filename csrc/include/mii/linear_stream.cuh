// Matrix product of a few rows with a large weight, bound by reading the weight once (Hopper):
//
//   plain   out = x @ weight^T + bias
//   gated   out = act(x @ gate^T) * (x @ up^T), where weight = [gate | up]; both products are rounded before
//
// The weight [n, k] is the 16-row operand of mma.m16n8k16 and tokens are its columns, eight at a time, so few tokens waste
// nothing.
// Work is cut into units of 64 weight rows (a tile) by 256 of k, and every CTA streams an equal run of consecutive units
// through a ring in shared memory, whatever n and k are (stream-K: Osama et al., arXiv 2301.03598). Four warps copy, a row
// of a unit at a time, by bulk copies that need no layout of the weight but its own; rows lie 16 bytes further apart in
// shared memory than they are long, so that fragments load without bank conflicts. Four more multiply.
//
// A CTA whose run begins inside a tile leaves float partial sums for the one that has the tile's beginning, which adds them
// up in the order of their CTAs (partial_sums.cuh), so runs repeat bit for bit.
//
// With programmatic dependent launch the ring fills with weights before the kernel before this one ends: weights are
// constants, only x has to be waited for. While a CTA finishes it brings weights of the next product into L2.
#pragma once
#include "mii/activation.cuh"
#include "mii/dynamic_shared.cuh"
#include "mii/partial_sums.cuh"
#include "mii/prefetch_next.cuh"
#include "mii/ring_place.cuh"
#include "mii/stream_runs.cuh"

namespace mii {

constexpr int kPlain = -1;  // in place of an activation

constexpr int kStreamMostTokens = 16, kStreamTileRows = 64, kStreamDepth = 256;  // of a unit: tokens, weight rows, columns
constexpr int kStreamUnits = 5;                                                  // of the ring
constexpr int kStreamWarps = 4, kStreamCopyWarps = 4;                            // that multiply, each 16 weight rows; that copy
constexpr int kStreamConsumers = kStreamWarps * kWarp;
constexpr int kStreamThreads = kStreamConsumers + kStreamCopyWarps * kWarp;
constexpr int kStreamRowBytes = 2 * kStreamDepth + 16;
constexpr int kStreamWeightBytes = kStreamTileRows * kStreamRowBytes;
constexpr int kStreamRingOffset = 256;    // barriers come before the ring
constexpr int kStreamPause = 500;  // ns between early units, behind which what the kernel before still reads stands in line
constexpr int kStreamBudget = 216 << 10;  // leaves room for the light kernels beside it
static_assert(kStreamTileRows == 16 * kStreamWarps && 2 * kStreamUnits * kBarrierBytes <= kStreamRingOffset);

// For up to so many tokens, in eights.
template <int Tokens>
struct StreamShape {
  static constexpr int kGroups = Tokens / 8;
  static constexpr int kUnitBytes = kStreamWeightBytes + Tokens * kStreamRowBytes;
  static constexpr int kSharedBytes = kStreamRingOffset + kStreamUnits * kUnitBytes;
  using Sums = float[2][kGroups][4];  // of a thread: two chains, as one product waits long for the one before
  static_assert(Tokens % 8 == 0 && Tokens <= kStreamMostTokens && kSharedBytes <= kStreamBudget);
};

template <typename T>
struct LinearStreamArgs {
  T* out;  // [rows, n], gated [rows, n / 2]
  const T* x;
  const T* weight;
  const T* bias;     // or null
  const char* next;  // what to bring into L2 at the end, about `next_fetch` of `next_bytes`, or null
  float4* partial;   // [StreamShape::kGroups, kStreamConsumers] for each CTA, zeros between launches
  int64_t x_stride, out_stride, next_bytes, next_fetch;
  int rows, n, k;
  int activation;  // a MiiActivationKind, or kPlain
};

using StreamPlace = RingPlace<kStreamUnits>;

// The ring: a barrier for each place that tells of its copies, one that tells that it was read, then the places.
template <int Tokens>
struct StreamRing {
  uint32_t shared;

  MII_DEVICE uint32_t full(const StreamPlace& place) const { return shared + place.at * kBarrierBytes; }
  MII_DEVICE uint32_t empty(const StreamPlace& place) const { return shared + (kStreamUnits + place.at) * kBarrierBytes; }
  MII_DEVICE uint32_t stage(const StreamPlace& place) const {
    return shared + kStreamRingOffset + place.at * StreamShape<Tokens>::kUnitBytes;
  }
  MII_DEVICE void wait_full(const StreamPlace& place) const { barrier_wait_forever(full(place), place.parity); }
  // Until what the ring brought there the last time around was read.
  MII_DEVICE void wait_empty(const StreamPlace& place) const { barrier_wait_forever(empty(place), place.parity ^ 1); }
  // By one thread, before all others go on.
  MII_DEVICE void init() const {
    for (StreamPlace place; place.parity == 0; place.next()) {
      barrier_init(full(place), 1);
      barrier_init(empty(place), kStreamWarps);
    }
    barrier_init_fence();
  }
};

// Where a run is. Counted, since warps that divide for each unit take longer over that than over its products.
struct StreamCursor {
  int unit, tile, step;  // step: of the tile

  MII_DEVICE StreamCursor(int first, int steps) : unit(first), tile(first / steps), step(first % steps) {}
  // To the next unit; true when that belongs to another tile.
  MII_DEVICE bool advance(int steps) {
    ++unit;
    if (++step < steps) return false;
    step = 0;
    ++tile;
    return true;
  }
};

// What a CTA does: its units, and where they lie.
template <typename T, int Tokens>
struct Stream {
  using Shape = StreamShape<Tokens>;
  const LinearStreamArgs<T>& a;
  StreamRuns runs;
  StreamRing<Tokens> ring;
  int begin, end;

  MII_DEVICE Stream(const LinearStreamArgs<T>& args, uint32_t memory) : a(args), ring{memory} {
    const int steps = (a.k + kStreamDepth - 1) / kStreamDepth, tiles = (a.n + kStreamTileRows - 1) / kStreamTileRows;
    runs = {tiles * steps, static_cast<int>(gridDim.x), steps};
    begin = runs.begin(blockIdx.x), end = runs.begin(blockIdx.x + 1);
  }
  MII_DEVICE StreamCursor start() const { return {begin, runs.steps}; }
  MII_DEVICE int depth(int step) const { return min(kStreamDepth, a.k - step * kStreamDepth); }
  // Gated tiles pair eight rows of gate with eight of up in each 16, so that a thread ends up with both of a pair.
  MII_DEVICE int weight_row(int tile, int row) const {
    if (a.activation == kPlain) return tile * kStreamTileRows + row;
    const int pair = tile * (kStreamTileRows / 2) + row / 16 * 8 + row % 8;
    return row % 16 < 8 ? pair : a.n / 2 + pair;
  }
  MII_DEVICE int valid_rows(int tile) const { return min(kStreamTileRows, a.n - tile * kStreamTileRows); }
};

// ---- the copying warps ----------------------------------------------------------------------------------------------
// Calls copy(first)(i) for the rows first + i of a block of 8, of which there are count(first), with the blocks dealt out to
// the warps. One lane of a warp starts all of its copies, which the compiler issues back to back: of several lanes a warp
// starts one's after the other's in a loop, in about 100 cycles each, and rows this short would wait for that.
template <int MaxRows, typename Count, typename Copy>
MII_DEVICE void deal_blocks(Count&& count, Copy&& copy) {
  __syncwarp();
  if (!elect_lane()) return;
  for (int first = (threadIdx.x - kStreamConsumers) / kWarp * 8; first < MaxRows; first += kStreamCopyWarps * 8) {
    const int rows = count(first);
    const auto one = copy(first);
    if (rows >= 8) {
#pragma unroll
      for (int i = 0; i < 8; ++i) one(i);
    } else {
      for (int i = 0; i < rows; ++i) one(i);
    }
  }
}

template <typename T, int Tokens>
MII_DEVICE void load_weights(const Stream<T, Tokens>& s, const StreamCursor& at, const StreamPlace& place, uint64_t policy) {
  const int tile = at.tile, bytes = 2 * s.depth(at.step), gate_end = s.a.activation == kPlain ? s.a.n : s.a.n / 2;
  const uint32_t target = s.ring.stage(place), full = s.ring.full(place);
  // One thread announces the bytes of all; those that land before count down from nothing, and the phase waits for the
  // arrival. Of a gated weight's last tile the valid rows are not the first ones, but as many.
  if (threadIdx.x == kStreamConsumers) barrier_expect(full, bytes * (s.valid_rows(tile) + s.a.rows));
  const T* source = s.a.weight + at.step * kStreamDepth;
  deal_blocks<kStreamTileRows>(
      [&](int first) { return (first % 16 < 8 ? gate_end : s.a.n) - s.weight_row(tile, first); },
      [&](int first) {
        const T* rows = source + int64_t(s.weight_row(tile, first)) * s.a.k;
        const uint32_t into = target + first * kStreamRowBytes;
        return [=](int i) { bulk_copy(into + i * kStreamRowBytes, rows + int64_t(i) * s.a.k, bytes, full, policy); };
      });
}

template <typename T, int Tokens>
MII_DEVICE void load_tokens(const Stream<T, Tokens>& s, int step, const StreamPlace& place) {
  const T* source = s.a.x + step * kStreamDepth;
  const uint32_t target = s.ring.stage(place) + kStreamWeightBytes, full = s.ring.full(place);
  const int bytes = 2 * s.depth(step);
  deal_blocks<Tokens>([&](int first) { return s.a.rows - first; },
                      [&](int first) {
                        const T* rows = source + first * s.a.x_stride;
                        const uint32_t into = target + first * kStreamRowBytes;
                        return [=](int i) { bulk_copy(into + i * kStreamRowBytes, rows + i * s.a.x_stride, bytes, full); };
                      });
}

template <typename T, int Tokens>
MII_DEVICE void copy_units(const Stream<T, Tokens>& s) {
  const uint64_t policy = read_once_policy();
  const int steps = s.runs.steps, filled = min(s.end, s.begin + kStreamUnits);
  StreamCursor weights = s.start(), tokens = weights;
  StreamPlace place, last;
  start_next();
  for (; weights.unit < filled; weights.advance(steps), place.next()) {
    load_weights(s, weights, place, policy);
    __nanosleep(kStreamPause);
  }
  wait_for_previous();
  for (place = {}; tokens.unit < filled; tokens.advance(steps), place.next()) load_tokens(s, tokens.step, last = place);
  for (; weights.unit < s.end; weights.advance(steps), place.next()) {
    s.ring.wait_empty(place);
    load_weights(s, weights, place, policy);
    load_tokens(s, weights.step, last = place);
  }
  if (s.a.next == nullptr) return;
  s.ring.wait_full(last);  // the ring comes not around again: that phase stays over
  prefetch_next<kStreamCopyWarps * kWarp>(s.a, threadIdx.x - kStreamConsumers);
}

// ---- the multiplying warps ------------------------------------------------------------------------------------------
// What products over 32 columns of a unit take: 16 weight rows of this warp, in two halves, and tokens in eights.
template <int Groups>
struct StreamFragments {
  uint32_t weight[2][4], tokens[Groups][4];

  MII_DEVICE void load(uint32_t weight_at, uint32_t tokens_at) {
    load_matrices(weight[0], weight_at);
    load_matrices(weight[1], weight_at + 32);
#pragma unroll
    for (int g = 0; g < Groups; ++g) load_matrices(tokens[g], tokens_at + 8 * g * kStreamRowBytes);
  }
  // `both`: or the other 16 columns are not of this unit.
  template <typename T>
  MII_DEVICE void multiply(float (&sums)[2][Groups][4], bool both) const {
#pragma unroll
    for (int g = 0; g < Groups; ++g) {
      multiply_add<T>(sums[0][g], weight[0], tokens[g][0], tokens[g][1]);
      if (both) multiply_add<T>(sums[1][g], weight[1], tokens[g][2], tokens[g][3]);
    }
  }
};

// sums += (16 weight rows of this warp) x (all tokens) over a unit. Sums of tokens that there are not are of whatever lies in
// their place, and nobody reads them.
template <typename T, int Groups>
MII_DEVICE void multiply_unit(float (&sums)[2][Groups][4], uint32_t unit, int depth) {
  constexpr int kAtOnce = 4, kBatches = kStreamDepth / 32 / kAtOnce;  // a batch is loaded while the one before is multiplied
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t weight = unit + (warp * 16 + lane % 16) * kStreamRowBytes + lane / 16 * 16;
  const uint32_t tokens = unit + kStreamWeightBytes + lane % 8 * kStreamRowBytes + lane / 8 * 16;
  if (depth == kStreamDepth) {
    StreamFragments<Groups> batch[2][kAtOnce];
#pragma unroll
    for (int b = 0; b <= kBatches; ++b) {
#pragma unroll
      for (int i = 0; b < kBatches && i < kAtOnce; ++i) {
        batch[b % 2][i].load(weight + 64 * (b * kAtOnce + i), tokens + 64 * (b * kAtOnce + i));
      }
#pragma unroll
      for (int i = 0; b > 0 && i < kAtOnce; ++i) batch[(b - 1) % 2][i].template multiply<T>(sums, true);
    }
    return;
  }
  for (int first = 0; first < depth; first += 32) {
    StreamFragments<Groups> all;
    all.load(weight + 2 * first, tokens + 2 * first);
    all.template multiply<T>(sums, first + 16 < depth);
  }
}

// The sums of two weight rows, `low` and `low` + 8 of a tile, for one token.
template <typename T, int Tokens>
MII_DEVICE void store_pair(const Stream<T, Tokens>& s, int tile, int row, int token, float low, float high) {
  const LinearStreamArgs<T>& a = s.a;
  const int n = s.weight_row(tile, row), other = s.weight_row(tile, row + 8);
  T* out = a.out + token * a.out_stride;
  if (a.activation == kPlain) {
    if (n < a.n) out[n] = from_float<T>(low + (a.bias ? to_float(a.bias[n]) : 0.0f));
    if (other < a.n) out[other] = from_float<T>(high + (a.bias ? to_float(a.bias[other]) : 0.0f));
  } else if (n < a.n / 2) {
    const float gate = activate_any<T>(rounded<T>(low + (a.bias ? to_float(a.bias[n]) : 0.0f)), a.activation);
    out[n] = from_float<T>(gate * rounded<T>(high + (a.bias ? to_float(a.bias[other]) : 0.0f)));
  }
}

template <typename T, int Tokens>
MII_DEVICE void store_tile(const Stream<T, Tokens>& s, const float (&sums)[Tokens / 8][4], int tile) {
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < Tokens / 4; ++i) {
    const int token = i / 2 * 8 + 2 * (lane % 4) + i % 2;
    if (token < s.a.rows) store_pair(s, tile, row, token, sums[i / 2][i % 2], sums[i / 2][2 + i % 2]);
  }
}

// Multiplies a run's units, the first of which comes through `place` of the ring. left(cta, group): where this thread's partial
// sums lie that a CTA leaves; store(sums, tile): for the whole sums of a tile.
template <typename T, typename Run, typename Left, typename Store>
MII_DEVICE void multiply_stream(const Run& s, StreamPlace& place, Left&& left, Store&& store) {
  using Shape = typename Run::Shape;
  typename Shape::Sums sums = {};
  StreamCursor at = s.start();
  int run_start = s.begin;  // first unit of the tile that `sums` belongs to
  while (at.unit < s.end) {
    const int tile = at.tile;
    s.ring.wait_full(place);
    multiply_unit<T>(sums, s.ring.stage(place), s.depth(at.step));
    __syncwarp();
    if (threadIdx.x % kWarp == 0) barrier_arrive(s.ring.empty(place));
    place.next();
    if (!at.advance(s.runs.steps) && at.unit < s.end) continue;
#pragma unroll
    for (int i = 0; i < 4 * Shape::kGroups; ++i) sums[0][i / 4][i % 4] += sums[1][i / 4][i % 4];
    const bool whole = at.unit - run_start == s.runs.steps;
    if (whole || merge_by_words(sums[0], s.runs, tile, left)) store(sums[0], tile);
    run_start = at.unit;
#pragma unroll
    for (int i = 0; i < 8 * Shape::kGroups; ++i) sums[i % 2][i / 8][i / 2 % 4] = 0.0f;
  }
}

template <typename T, int Tokens>
MII_DEVICE void multiply_units(const Stream<T, Tokens>& s) {
  wait_for_previous();  // before anything is written that the kernel before this one may still read
  constexpr int kGroups = StreamShape<Tokens>::kGroups;
  StreamPlace place;
  multiply_stream<T>(
      s, place, [&](int cta, int group) { return s.a.partial + (cta * kGroups + group) * kStreamConsumers + threadIdx.x; },
      [&](const float (&sums)[kGroups][4], int tile) { store_tile(s, sums, tile); });
}

// For up to `Tokens` rows. Grid: as many CTAs as fit the card at once, at most one a unit. Dynamic shared memory:
// StreamShape::kSharedBytes.
template <typename T, int Tokens>
__global__ void __launch_bounds__(kStreamThreads, 1) linear_stream(const LinearStreamArgs<T> a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  const Stream<T, Tokens> s(a, shared_address(dynamic_shared()));
  if (threadIdx.x == 0) s.ring.init();
  __syncthreads();
  if (threadIdx.x >= kStreamConsumers) {
    copy_units(s);
  } else {
    multiply_units(s);
  }
#endif
}

}  // namespace mii
