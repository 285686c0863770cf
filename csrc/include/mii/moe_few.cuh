// Experts' products of up to 8 rows each by one stream of the weights of the experts that are hit (Hopper): moe_stream.cuh's
// way of both products in one launch, with linear_stream.cuh's way of copying. Rows of weights come by bulk copies, so that
// what warps ask memory for meanwhile, partial sums and the meeting of all CTAs, does not stand in line behind them.
//
// Tiles of 64 weight rows of one expert by 256 of k (a unit); of the first product 32 of gate and the same 32 of up, eight of
// each in turn. Weights of the second follow those of the first through the ring; its tokens, which are results of the first,
// follow their weights once all CTAs are through with that.
#pragma once
#include "mii/linear_stream.cuh"
#include "mii/moe_stream.cuh"

namespace mii {

constexpr int kFewRows = 8;
using FewShape = StreamShape<kFewRows>;
constexpr int kFewBarrier = 1;  // named, of the multiplying warps

// One of the two products as a CTA has it: its run of units.
template <typename T, bool Up>
struct FewRun {
  using Shape = FewShape;
  static constexpr int kColumns = Up ? kStreamTileRows / 2 : kStreamTileRows;  // of out, that a tile yields

  const MoeArgs<T>& a;
  StreamRing<kFewRows> ring;
  StreamRuns runs;
  int tiles, begin, end;  // tiles: of weight rows, of an expert

  MII_DEVICE FewRun(const MoeArgs<T>& args, const StreamRing<kFewRows>& ring_, int groups) : a(args), ring(ring_) {
    const int steps = (a.k + kStreamDepth - 1) / kStreamDepth;
    tiles = (a.n + kColumns - 1) / kColumns;
    const int units = groups * tiles * steps;
    runs = {units, min(static_cast<int>(gridDim.x), units), steps};
    const bool idle = static_cast<int>(blockIdx.x) >= runs.ctas;
    begin = idle ? 0 : runs.begin(blockIdx.x), end = idle ? 0 : runs.begin(blockIdx.x + 1);
  }
  MII_DEVICE int size() const { return end - begin; }
  MII_DEVICE StreamCursor start() const { return {begin, runs.steps}; }
  MII_DEVICE int depth(int step) const { return min(kStreamDepth, a.k - step * kStreamDepth); }
};

// The tile that a run has come to: whose rows it has, and which weight rows of their expert.
template <typename T, bool Up>
struct FewTile {
  int column, group;
  int4 rows;  // (expert, first row, rows, 0)

  MII_DEVICE FewTile(const FewRun<T, Up>& run, int tile)
      : column(tile % run.tiles), group(tile / run.tiles), rows(run.a.tiles[1 + group]) {}
  // To the next one; true when that is of other rows, whose entry of the list a run has to read that goes on.
  MII_DEVICE bool advance(const FewRun<T, Up>& run) {
    if (++column < run.tiles) return false;
    column = 0;
    ++group;
    return true;
  }
  MII_DEVICE void read(const FewRun<T, Up>& run) { rows = run.a.tiles[1 + group]; }
  MII_DEVICE int first_column() const { return column * FewRun<T, Up>::kColumns; }  // of out
  // Where eight weight rows begin that the tile has from `row` on, of the expert's; n is whole eights, so they end with them.
  MII_DEVICE int weight_row(const FewRun<T, Up>& run, int row) const {
    return Up ? first_column() + row / 16 * 8 + (row / 8 % 2) * run.a.n : first_column() + row;
  }
  MII_DEVICE bool has_rows(const FewRun<T, Up>& run, int row) const {
    return first_column() + (Up ? row / 16 * 8 : row) < run.a.n;
  }
  MII_DEVICE int valid_rows(const FewRun<T, Up>& run) const {
    return min(FewRun<T, Up>::kColumns, run.a.n - first_column()) * (Up ? 2 : 1);
  }
};

// ---- the copying warps ----------------------------------------------------------------------------------------------
// Weights of a run, unit by unit.
template <typename T, bool Up>
struct FewWeights {
  const FewRun<T, Up>& run;
  StreamCursor at;
  FewTile<T, Up> tile;

  MII_DEVICE explicit FewWeights(const FewRun<T, Up>& run_) : run(run_), at(run.start()), tile(run, at.tile) {}
  MII_DEVICE void copy(const StreamPlace& place, uint64_t policy) {
    const int bytes = 2 * run.depth(at.step);
    const uint32_t target = run.ring.stage(place), full = run.ring.full(place);
    if (threadIdx.x == kStreamConsumers) barrier_expect(full, bytes * (tile.valid_rows(run) + tile.rows.z));
    const int64_t expert_rows = int64_t(Up ? 2 : 1) * run.a.n;
    const T* source = run.a.weight + tile.rows.x * expert_rows * run.a.k + at.step * kStreamDepth;
    deal_blocks<kStreamTileRows>([&](int first) { return tile.has_rows(run, first) ? 8 : 0; },
                                 [&](int first) {
                                   const T* from = source + int64_t(tile.weight_row(run, first)) * run.a.k;
                                   const uint32_t into = target + first * kStreamRowBytes;
                                   return [=](int i) {
                                     bulk_copy(into + i * kStreamRowBytes, from + int64_t(i) * run.a.k, bytes, full, policy);
                                   };
                                 });
    if (at.advance(run.runs.steps) && tile.advance(run) && at.unit < run.end) tile.read(run);
  }
};

// Its tokens, of which a warp copies every kStreamCopyWarps-th.
template <typename T, bool Up>
struct FewTokens {
  static constexpr int kMost = kFewRows / kStreamCopyWarps;

  const FewRun<T, Up>& run;
  StreamCursor at;
  FewTile<T, Up> tile;
  StreamPlace place;
  const T* sources[kMost];

  // `turns`: how many units come through the ring before those of the run.
  MII_DEVICE FewTokens(const FewRun<T, Up>& run_, int turns)
      : run(run_), at(run.start()), tile(run, at.tile), place(StreamPlace::after(turns)) {
    find();
  }
  MII_DEVICE int asked() const { return at.unit - run.begin; }
  MII_DEVICE void copy() {
    __syncwarp();
    if (elect_lane()) {
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        const int token = first_token() + i * kStreamCopyWarps;
        if (token >= tile.rows.z) continue;
        bulk_copy(run.ring.stage(place) + kStreamWeightBytes + token * kStreamRowBytes, sources[i] + at.step * kStreamDepth,
                  2 * run.depth(at.step), run.ring.full(place));
      }
    }
    place.next();
    if (at.advance(run.runs.steps) && tile.advance(run) && at.unit < run.end) {
      tile.read(run);
      find();
    }
  }

 private:
  MII_DEVICE static int first_token() { return (threadIdx.x - kStreamConsumers) / kWarp; }
  MII_DEVICE void find() {
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const int token = first_token() + i * kStreamCopyWarps;
      if (token < tile.rows.z) sources[i] = run.a.x + source_row<T, Up>(run.a, tile.rows.y + token) * run.a.x_stride;
    }
  }
};

// `before`: the meeting's counter, read before this CTA came to it.
template <typename T>
MII_DEVICE void copy_few(const FewRun<T, true>& up, const FewRun<T, false>& down, const uint32_t* met, uint32_t before) {
  const uint64_t policy = read_once_policy();
  const int first_down = up.size(), places = first_down + down.size(), filled = min(kStreamUnits, first_down);
  FewWeights<T, true> up_weights(up);
  FewWeights<T, false> down_weights(down);
  StreamPlace place;
  // The ring takes its first weights before anything is known of the rows.
  for (; up_weights.at.unit < up.begin + filled; place.next()) up_weights.copy(place, policy);
  FewTokens<T, true> up_tokens(up, 0);
  FewTokens<T, false> down_tokens(down, first_down);
  while (up_tokens.asked() < filled) up_tokens.copy();
  bool all_met = false;
  const auto meet = [&] {
    if (threadIdx.x % kWarp == 0) wait_for_turn(met, before);
    __syncwarp();
    publish_global_writes();
    all_met = true;
  };
  for (int at = filled; at < places; ++at, place.next()) {
    if (at >= kStreamUnits) {
      // The ring is full of weights of the second product, none of which can be multiplied before.
      if (!all_met && at - kStreamUnits >= first_down) meet();
      while (all_met && first_down + down_tokens.asked() < at) down_tokens.copy();
      up.ring.wait_empty(place);
    }
    if (at < first_down) {
      up_weights.copy(place, policy);
      up_tokens.copy();
    } else {
      down_weights.copy(place, policy);
    }
  }
  if (down_tokens.asked() == down.size()) return;
  if (!all_met) meet();
  while (down_tokens.asked() < down.size()) down_tokens.copy();
}

// ---- the multiplying warps ------------------------------------------------------------------------------------------
// What becomes of a run's tiles. Read when it comes to other rows, the first ones before the run begins.
template <typename T, bool Up>
struct FewResults {
  const FewRun<T, Up>& run;
  int number;  // of the tile
  FewTile<T, Up> at;
  MoePair pairs[2];  // of the two tokens of which this thread has sums; not Up

  MII_DEVICE explicit FewResults(const FewRun<T, Up>& run_)
      : run(run_), number(run.begin / run.runs.steps), at(run, number) {
    find();
  }
  MII_DEVICE void store(const float (&sums)[1][4], int tile) {
    while (number < tile) {
      ++number;
      if (!at.advance(run)) continue;
      at.read(run);
      find();
    }
    store_moe_tile<T, kFewRows, Up>(run.a, sums, at.rows, at.first_column(), [&](int, int i) { return pairs[i]; });
  }

 private:
  MII_DEVICE void find() {
    if constexpr (!Up) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = 2 * (threadIdx.x % 4) + i;
        if (token < at.rows.z) pairs[i] = MoePair::of(run.a, at.rows.y + token);
      }
    }
  }
};

template <typename T, bool Up>
MII_DEVICE void multiply_few(const FewRun<T, Up>& run, StreamPlace& place, FewResults<T, Up>& results, float4* words) {
  multiply_stream<T>(
      run, place, [&](int cta, int) { return words + (2 * cta + Up) * kStreamConsumers + threadIdx.x; },
      [&](const float (&sums)[1][4], int tile) { results.store(sums, tile); });
}

// Grid: one CTA a multiprocessor, all at once. Dynamic shared memory: FewShape::kSharedBytes. Tiles of the list: kFewRows.
template <typename T>
__global__ void __launch_bounds__(kStreamThreads, 1) moe_few(const MoeStreamArgs<T> a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  const StreamRing<kFewRows> ring = {shared_address(dynamic_shared())};
  if (threadIdx.x == 0) ring.init();
  wait_for_previous();
  start_next();
  const int groups = a.up.tiles[0].x;
  const uint32_t before = load_state(a.met);
  __syncthreads();
  if (groups == 0) return;
  const FewRun<T, true> up(a.up, ring, groups);
  const FewRun<T, false> down(a.down, ring, groups);
  if (threadIdx.x >= kStreamConsumers) return copy_few(up, down, a.met, before);
  StreamPlace place;
  FewResults<T, true> up_results(up);
  FewResults<T, false> down_results(down);
  multiply_few(up, place, up_results, a.words);
  publish_global_writes();
  threads_wait(kFewBarrier, kStreamConsumers);
  if (threadIdx.x == 0) arrive_once(a.met);
  multiply_few(down, place, down_results, a.words);
#endif
}

}  // namespace mii
