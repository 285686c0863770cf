// Matrix product of a few rows with a large weight, bound by reading the weight once (Hopper):
//
//   plain   out = x @ weight^T + bias
//   gated   out = act(x @ gate^T) * (x @ up^T), where weight = [gate | up]; both products are rounded before
//
// The weight [n, k] is the 16-row operand of mma.m16n8k16 and the tokens are its 8 columns, so few tokens waste nothing.
// Work is cut into units of some weight rows (a tile) by a depth of k, and every CTA streams an equal run of consecutive
// units through a ring in shared memory, whatever n and k are (stream-K: Osama et al., arXiv 2301.03598). Some warps copy,
// a row of a unit at a time, by bulk copies that need no layout of the weight but its own; rows lie 16 bytes further
// apart in shared memory than they are long, so that fragments load without bank conflicts. Four or eight more multiply.
//
// A CTA whose run ends inside a tile leaves float partial sums; the last of a tile's CTAs to arrive adds them up in their
// order, so runs repeat bit for bit, and resets the tile's counter for the next launch.
//
// With programmatic dependent launch the ring fills with weights before the kernel before this one ends: weights are
// constants, only x has to be waited for. While a CTA finishes it may already bring weights of the next product into L2.
#pragma once
#include "mii/activation.cuh"
#include "mii/bulk_copy.cuh"

namespace mii {

constexpr int kStreamMaxTiles = 16384;
constexpr int kPlain = -1;  // in place of an activation

template <typename T>
struct LinearStreamArgs {
  T* out;  // [rows, n], gated [rows, n / 2]
  const T* x;
  const T* weight;
  const T* bias;  // or null
  // What to bring into L2 at the end, about `next_fetch` of `next_bytes`, or null; each CTA begins when at most `next_lag`
  // of its own units are still under way.
  const char* next;
  int* arrived;      // [kStreamMaxTiles], zero between launches
  float4* partial;
  int64_t x_stride, out_stride, next_bytes, next_fetch;
  int rows, n, k, next_lag;
  int activation;  // a MiiActivationKind, or kPlain
  bool early;      // see begin()
};

// How a product is cut: tiles of 16 x Groups weight rows for each of RowWarps warps, units of Depth columns, so many
// units in the ring. Where there are many tokens, Split warps share them. A bulk copy takes its operands from registers
// that a whole warp shares, so a warp starts one lane's after the other, each in about 100 cycles, whatever its size; that,
// not memory, is the limit where rows of a unit are short.
// OneLane has one lane of a warp start all of its copies, one right after the other.
template <int Tokens_, int Groups_, int Depth_, int Stages_, int RowWarps_ = 4, int Split_ = 1, int CopyWarps_ = 4,
          bool OneLane_ = false>
struct StreamShape {
  static constexpr int kTokens = Tokens_, kGroups = Groups_, kDepth = Depth_, kStages = Stages_;
  static constexpr int kRowWarps = RowWarps_, kWarps = RowWarps_ * Split_;  // that multiply
  static constexpr int kConsumers = kWarps * kWarp;
  static constexpr bool kOneLane = OneLane_;
  static constexpr int kCopyWarps = CopyWarps_, kThreads = kConsumers + kCopyWarps * kWarp;
  static constexpr int kTileRows = 16 * kRowWarps * kGroups;
  static constexpr int kRowBytes = 2 * kDepth + 16;
  static constexpr int kWeightBytes = kTileRows * kRowBytes;
  static constexpr int kStageBytes = kWeightBytes + kTokens * kRowBytes;
  static constexpr int kRingOffset = 256;  // barriers and a flag come before the ring
  static constexpr int kFlagOffset = 2 * kStages * kBarrierBytes;
  static constexpr int kSharedBytes = kRingOffset + kStages * kStageBytes;
  static constexpr int kColumns = kTokens / 8 / Split_;  // of 8 tokens each, for a warp
  static constexpr int kPartials = kGroups * kColumns;  // float4 of a thread
  static_assert(kDepth % 32 == 0 && kTokens % (8 * Split_) == 0 && kFlagOffset + 4 <= kRingOffset);
};

// The runs of units: CTA c of `ctas` has [begin(c), begin(c + 1)).
struct StreamRuns {
  int64_t units;
  int ctas, steps;  // units of a tile

  MII_DEVICE int begin(int cta) const { return static_cast<int>(units * cta / ctas); }
  MII_DEVICE int cta_of(int unit) const { return static_cast<int>(((unit + int64_t(1)) * ctas - 1) / units); }
  // Which of a CTA's two places for partial sums a tile has: its first tile the one, its last the other.
  MII_DEVICE int place(int cta, int tile) const { return 2 * cta + (tile == begin(cta) / steps ? 0 : 1); }
};

// What a CTA does: its units, and where they lie.
template <typename T, typename S>
struct Stream {
  const LinearStreamArgs<T>& a;
  StreamRuns runs;
  uint32_t shared;
  int begin, end;

  MII_DEVICE Stream(const LinearStreamArgs<T>& args, uint32_t memory) : a(args), shared(memory) {
    const int steps = (a.k + S::kDepth - 1) / S::kDepth, tiles = (a.n + S::kTileRows - 1) / S::kTileRows;
    runs = {int64_t(tiles) * steps, static_cast<int>(gridDim.x), steps};
    begin = runs.begin(blockIdx.x), end = runs.begin(blockIdx.x + 1);
  }
  MII_DEVICE int tile(int unit) const { return unit / runs.steps; }
  MII_DEVICE int column(int unit) const { return unit % runs.steps * S::kDepth; }
  MII_DEVICE int depth(int unit) const { return min(S::kDepth, a.k - column(unit)); }
  MII_DEVICE int place(int unit) const { return (unit - begin) % S::kStages; }
  MII_DEVICE int round(int unit) const { return (unit - begin) / S::kStages; }  // how often the ring came around
  MII_DEVICE uint32_t full(int unit) const { return shared + place(unit) * kBarrierBytes; }
  MII_DEVICE uint32_t empty(int unit) const { return shared + (S::kStages + place(unit)) * kBarrierBytes; }
  MII_DEVICE uint32_t stage(int unit) const { return shared + S::kRingOffset + place(unit) * S::kStageBytes; }
  // Gated tiles pair eight rows of gate with eight of up in each 16, so that a thread ends up with both of a pair.
  MII_DEVICE int weight_row(int tile, int row) const {
    if (a.activation == kPlain) return tile * S::kTileRows + row;
    const int pair = tile * (S::kTileRows / 2) + row / 16 * 8 + row % 8;
    return row % 16 < 8 ? pair : a.n / 2 + pair;
  }
  MII_DEVICE int valid_rows(int tile) const { return min(S::kTileRows, a.n - tile * S::kTileRows); }
};

// ---- the copying warps ----------------------------------------------------------------------------------------------
// Calls copy(row) for this thread's part of `rows` rows, dealt out to the warps in turn.
template <typename S, int MaxRows, typename Copy>
MII_DEVICE void deal_rows(int rows, Copy&& copy) {
  const int thread = threadIdx.x - S::kConsumers;
#pragma unroll
  for (int start = 0; start < MaxRows; start += S::kCopyWarps * kWarp) {
    const int row = start + thread % kWarp * S::kCopyWarps + thread / kWarp;
    if (row < rows) copy(row);
  }
}

// The same by one lane of each warp: calls copy(first, i) for i below 8, with blocks of 8 rows dealt out to the warps.
// `count(first)` says how many rows of a block there are.
template <typename S, int MaxRows, typename Count, typename Copy>
MII_DEVICE void deal_blocks(Count&& count, Copy&& copy) {
  if (!elect_lane()) return;
  for (int first = (threadIdx.x - S::kConsumers) / kWarp * 8; first < MaxRows; first += S::kCopyWarps * 8) {
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

template <typename T, typename S>
MII_DEVICE void load_weights(const Stream<T, S>& s, int unit, uint64_t policy) {
  const int tile = s.tile(unit), bytes = 2 * s.depth(unit), gate_end = s.a.activation == kPlain ? s.a.n : s.a.n / 2;
  // One thread announces the bytes of all; those that land before count down from nothing, and the phase waits for the
  // arrival. Of a gated weight's last tile the valid rows are not the first ones, but as many.
  if (threadIdx.x == S::kConsumers) barrier_expect(s.full(unit), bytes * (s.valid_rows(tile) + s.a.rows));
  const T* source = s.a.weight + s.column(unit);
  const uint32_t target = s.stage(unit), full = s.full(unit);
  if constexpr (S::kOneLane) {
    __syncwarp();
    deal_blocks<S, S::kTileRows>(
        [&](int first) { return (first % 16 < 8 ? gate_end : s.a.n) - s.weight_row(tile, first); },
        [&](int first) {
          const T* rows = source + int64_t(s.weight_row(tile, first)) * s.a.k;
          const uint32_t into = target + first * S::kRowBytes;
          return [=](int i) { bulk_copy(into + i * S::kRowBytes, rows + int64_t(i) * s.a.k, bytes, full, policy); };
        });
  } else {
    deal_rows<S, S::kTileRows>(S::kTileRows, [&](int row) {
      const int n = s.weight_row(tile, row);
      if (n >= (row % 16 < 8 ? gate_end : s.a.n)) return;
      bulk_copy(target + row * S::kRowBytes, source + int64_t(n) * s.a.k, bytes, full, policy);
    });
  }
}

template <typename T, typename S>
MII_DEVICE void load_tokens(const Stream<T, S>& s, int unit) {
  const T* source = s.a.x + s.column(unit);
  const uint32_t target = s.stage(unit) + S::kWeightBytes, full = s.full(unit);
  const int bytes = 2 * s.depth(unit);
  const auto copy = [&](int token) {
    bulk_copy(target + token * S::kRowBytes, source + token * s.a.x_stride, bytes, full);
  };
  if constexpr (S::kOneLane) {
    __syncwarp();
    deal_blocks<S, S::kTokens>([&](int first) { return s.a.rows - first; },
                               [&](int first) { return [=, &copy](int i) { copy(first + i); }; });
  } else {
    deal_rows<S, S::kTokens>(s.a.rows, copy);
  }
}

// This CTA's share of the next weight, in pieces of 4 KB.
template <typename T, typename S>
MII_DEVICE void prefetch_next(const Stream<T, S>& s) {
  const LinearStreamArgs<T>& a = s.a;
  if (a.next == nullptr) return;
  // The ring does not come around any more, so the phases of its last units stay over.
  const int landed = s.end - 1 - a.next_lag;
  if (landed >= max(s.begin, s.end - S::kStages)) barrier_wait(s.full(landed), s.round(landed) & 1);
  const int64_t start = a.next_bytes / 16 * blockIdx.x / gridDim.x * 16;
  const int64_t stop = min(a.next_bytes / 16 * 16, start + a.next_fetch / gridDim.x / 4096 * 4096);
  for (int64_t at = start + (threadIdx.x - S::kConsumers) * 4096; at < stop; at += S::kCopyWarps * kWarp * 4096) {
    bulk_prefetch(a.next + at, static_cast<int>(min(int64_t(4096), stop - at)));
  }
}

template <typename T, typename S>
MII_DEVICE void copy_units(const Stream<T, S>& s) {
  const uint64_t policy = read_once_policy();
  const int filled = min(s.end, s.begin + S::kStages);
  if (s.a.early) start_next();
  for (int unit = s.begin; unit < filled; ++unit) load_weights(s, unit, policy);
  wait_for_previous();
  if (!s.a.early) start_next();
  for (int unit = s.begin; unit < filled; ++unit) load_tokens(s, unit);
  for (int unit = filled; unit < s.end; ++unit) {
    barrier_wait(s.empty(unit), (s.round(unit) - 1) & 1);
    load_weights(s, unit, policy);
    load_tokens(s, unit);
  }
  prefetch_next(s);
}

// ---- the multiplying warps ------------------------------------------------------------------------------------------
template <typename S>
using StreamSums = float[S::kGroups][S::kColumns][4];

// sums += (16 Groups weight rows of this warp) x (all tokens) over the first `depth` columns of a unit, 32 at a time; of
// a last odd 16 the other half is not multiplied.
template <typename T, typename S>
MII_DEVICE void multiply_columns(StreamSums<S>& sums, uint32_t weight, uint32_t tokens, int pair, bool both) {
  uint32_t a[S::kGroups][2][4];
#pragma unroll
  for (int group = 0; group < S::kGroups; ++group) {
    load_matrices(a[group][0], weight + group * 16 * S::kRowBytes + 64 * pair);
    load_matrices(a[group][1], weight + group * 16 * S::kRowBytes + 64 * pair + 32);
  }
#pragma unroll
  for (int column = 0; column < S::kColumns; ++column) {
    uint32_t b[4];
    load_matrices(b, tokens + column * 8 * S::kRowBytes + 64 * pair);
#pragma unroll
    for (int group = 0; group < S::kGroups; ++group) {
      multiply_add<T>(sums[group][column], a[group][0], b[0], b[1]);
      if (both) multiply_add<T>(sums[group][column], a[group][1], b[2], b[3]);
    }
  }
}

// The first of this warp's tokens.
template <typename S>
MII_DEVICE int first_token() {
  return threadIdx.x / kWarp / S::kRowWarps * S::kColumns * 8;
}

template <typename T, typename S>
MII_DEVICE void multiply_unit(StreamSums<S>& sums, uint32_t stage, int depth) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp % S::kRowWarps;
  const uint32_t weight = stage + (warp * 16 * S::kGroups + lane % 16) * S::kRowBytes + lane / 16 * 16;
  const uint32_t tokens = stage + S::kWeightBytes + (first_token<S>() + lane % 8) * S::kRowBytes + lane / 8 * 16;
  if (depth == S::kDepth) {
#pragma unroll
    for (int pair = 0; pair < S::kDepth / 32; ++pair) multiply_columns<T, S>(sums, weight, tokens, pair, true);
  } else {
    for (int pair = 0; 32 * pair < depth; ++pair) {
      multiply_columns<T, S>(sums, weight, tokens, pair, 32 * pair + 16 < depth);
    }
  }
}

// The sums of two weight rows, `low` and `low` + 8 of a tile, for one token.
template <typename T, typename S>
MII_DEVICE void store_pair(const Stream<T, S>& s, int tile, int row, int token, float low, float high) {
  const LinearStreamArgs<T>& a = s.a;
  const int n = s.weight_row(tile, row), other = s.weight_row(tile, row + 8);
  T* out = a.out + token * a.out_stride;
  if (a.activation == kPlain) {
    if (n < a.n) out[n] = from_float<T>(low + (a.bias ? to_float(a.bias[n]) : 0.0f));
    if (other < a.n) out[other] = from_float<T>(high + (a.bias ? to_float(a.bias[other]) : 0.0f));
  } else if (n < a.n / 2) {
    float gate[1] = {rounded<T>(low + (a.bias ? to_float(a.bias[n]) : 0.0f))};
    activate_pack<T>(gate, a.activation, 0.0f);
    out[n] = from_float<T>(gate[0] * rounded<T>(high + (a.bias ? to_float(a.bias[other]) : 0.0f)));
  }
}

template <typename T, typename S>
MII_DEVICE void store_tile(const Stream<T, S>& s, const StreamSums<S>& sums, int tile) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp % S::kRowWarps;
#pragma unroll
  for (int group = 0; group < S::kGroups; ++group) {
    const int row = (warp * S::kGroups + group) * 16 + lane / 4;
#pragma unroll
    for (int column = 0; column < S::kColumns; ++column) {
      const float(&c)[4] = sums[group][column];
      const int token = first_token<S>() + column * 8 + 2 * (lane % 4);
      if (token < s.a.rows) store_pair(s, tile, row, token, c[0], c[2]);
      if (token + 1 < s.a.rows) store_pair(s, tile, row, token + 1, c[1], c[3]);
    }
  }
}

// Leaves this CTA's partial sums of a tile. True in every thread of the CTA that arrived last, which then has the total.
template <typename T, typename S>
MII_DEVICE bool merge_tile(const Stream<T, S>& s, StreamSums<S>& sums, int tile, int* last) {
  const auto at = [&](int cta, int part) {
    return s.a.partial + (int64_t(s.runs.place(cta, tile)) * S::kPartials + part) * S::kConsumers + threadIdx.x;
  };
#pragma unroll
  for (int part = 0; part < S::kPartials; ++part) {
    const float(&c)[4] = sums[part / S::kColumns][part % S::kColumns];
    __stcg(at(blockIdx.x, part), make_float4(c[0], c[1], c[2], c[3]));
  }
  __threadfence();
  partial_barrier<1, S::kConsumers>();
  const int first_cta = s.runs.cta_of(tile * s.runs.steps), last_cta = s.runs.cta_of((tile + 1) * s.runs.steps - 1);
  if (threadIdx.x == 0) *last = atomicAdd(s.a.arrived + tile, 1) == last_cta - first_cta;
  partial_barrier<1, S::kConsumers>();
  const bool mine = *last != 0;
  partial_barrier<1, S::kConsumers>();  // nobody writes `last` for the next tile before everybody has read it
  if (!mine) return false;
  __threadfence();
  if (threadIdx.x == 0) s.a.arrived[tile] = 0;
#pragma unroll
  for (int part = 0; part < S::kPartials; ++part) {
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int cta = first_cta; cta <= last_cta; ++cta) {
      const float4 one = __ldcg(at(cta, part));
      total.x += one.x, total.y += one.y, total.z += one.z, total.w += one.w;
    }
    float(&c)[4] = sums[part / S::kColumns][part % S::kColumns];
    c[0] = total.x, c[1] = total.y, c[2] = total.z, c[3] = total.w;
  }
  return true;
}

template <typename T, typename S>
MII_DEVICE void multiply_units(const Stream<T, S>& s, int* last) {
  wait_for_previous();  // before anything is written that the kernel before this one may still read
  StreamSums<S> sums = {};
  int run_start = s.begin;  // first unit of the tile that `sums` belongs to
  for (int unit = s.begin; unit < s.end; ++unit) {
    barrier_wait(s.full(unit), s.round(unit) & 1);
    multiply_unit<T, S>(sums, s.stage(unit), s.depth(unit));
    __syncwarp();
    if (threadIdx.x % kWarp == 0) barrier_arrive(s.empty(unit));
    const int tile = s.tile(unit);
    if (tile == s.tile(unit + 1) && unit + 1 != s.end) continue;
    const bool whole = unit + 1 - run_start == s.runs.steps;
    if (whole || merge_tile(s, sums, tile, last)) store_tile(s, sums, tile);
    run_start = unit + 1;
#pragma unroll
    for (int group = 0; group < S::kGroups; ++group) {
#pragma unroll
      for (int column = 0; column < S::kColumns; ++column) {
        float(&c)[4] = sums[group][column];
        c[0] = c[1] = c[2] = c[3] = 0.0f;
      }
    }
  }
}

// Grid: as many CTAs as fit the card at once, at most one a unit. Dynamic shared memory: S::kSharedBytes.
template <typename T, typename S>
__global__ void __launch_bounds__(S::kThreads) linear_stream(const LinearStreamArgs<T> a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char stream_memory[];
  const Stream<T, S> s(a, shared_address(stream_memory));
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      barrier_init(s.shared + i * kBarrierBytes, 1);
      barrier_init(s.shared + (S::kStages + i) * kBarrierBytes, S::kWarps);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= S::kConsumers) {
    copy_units(s);
  } else {
    multiply_units(s, reinterpret_cast<int*>(stream_memory + S::kFlagOffset));
  }
#endif
}

}  // namespace mii
