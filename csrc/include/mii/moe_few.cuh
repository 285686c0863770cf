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

constexpr int kFewRows = kStreamTokens;
constexpr int kFewBarrier = 1;  // named, of the multiplying warps

// One of the two products as a CTA has it: its run of units.
template <typename T, bool Up>
struct FewRun {
  static constexpr int kColumns = Up ? kStreamTileRows / 2 : kStreamTileRows;  // of out, that a tile yields

  const MoeArgs<T>& a;
  StreamRing ring;
  StreamRuns runs;
  int tiles, begin, end;  // tiles: of weight rows, of an expert
  int first;              // place of `begin` among all units that come through the ring

  MII_DEVICE FewRun(const MoeArgs<T>& args, const StreamRing& ring_, int groups, int place) : a(args), ring(ring_), first(place) {
    const int steps = (a.k + kStreamDepth - 1) / kStreamDepth;
    tiles = (a.n + kColumns - 1) / kColumns;
    const int units = groups * tiles * steps;
    runs = {units, min(static_cast<int>(gridDim.x), units), steps};
    const bool idle = static_cast<int>(blockIdx.x) >= runs.ctas;
    begin = idle ? 0 : runs.begin(blockIdx.x), end = idle ? 0 : runs.begin(blockIdx.x + 1);
  }
  MII_DEVICE int size() const { return end - begin; }
  MII_DEVICE int place(int unit) const { return first + unit - begin; }
  MII_DEVICE int unit(int place) const { return begin + place - first; }
  MII_DEVICE uint32_t full(int unit) const { return ring.full(place(unit)); }
  MII_DEVICE uint32_t empty(int unit) const { return ring.empty(place(unit)); }
  MII_DEVICE uint32_t stage(int unit) const { return ring.stage(place(unit)); }
  MII_DEVICE int round(int unit) const { return StreamRing::round(place(unit)); }
  MII_DEVICE int tile(int unit) const { return unit / runs.steps; }
  MII_DEVICE int column(int unit) const { return unit % runs.steps * kStreamDepth; }
  MII_DEVICE int depth(int unit) const { return min(kStreamDepth, a.k - column(unit)); }
  MII_DEVICE int first_column(int tile) const { return tile % tiles * kColumns; }  // of out
  // (expert, first row, rows, 0)
  MII_DEVICE int4 rows(int tile) const { return a.tiles[1 + tile / tiles]; }
  // Where eight weight rows begin that a tile has from `row` on, of the expert's; n is whole eights, so they end with them.
  MII_DEVICE int weight_row(int tile, int row) const {
    return Up ? first_column(tile) + row / 16 * 8 + (row / 8 % 2) * a.n : first_column(tile) + row;
  }
  MII_DEVICE bool has_rows(int tile, int row) const { return first_column(tile) + (Up ? row / 16 * 8 : row) < a.n; }
  MII_DEVICE int valid_rows(int tile) const { return min(kColumns, a.n - first_column(tile)) * (Up ? 2 : 1); }
};

// ---- the copying warps ----------------------------------------------------------------------------------------------
template <typename T, bool Up>
MII_DEVICE void copy_few_weights(const FewRun<T, Up>& run, int unit, uint64_t policy) {
  const int tile = run.tile(unit), bytes = 2 * run.depth(unit);
  const int4 rows = run.rows(tile);
  const uint32_t target = run.stage(unit), full = run.full(unit);
  if (threadIdx.x == kStreamConsumers) barrier_expect(full, bytes * (run.valid_rows(tile) + rows.z));
  const int64_t expert_rows = int64_t(Up ? 2 : 1) * run.a.n;
  const T* source = run.a.weight + rows.x * expert_rows * run.a.k + run.column(unit);
  deal_blocks<kStreamTileRows>([&](int first) { return run.has_rows(tile, first) ? 8 : 0; },
                               [&](int first) {
                                 const T* from = source + int64_t(run.weight_row(tile, first)) * run.a.k;
                                 const uint32_t into = target + first * kStreamRowBytes;
                                 return [=](int i) {
                                   bulk_copy(into + i * kStreamRowBytes, from + int64_t(i) * run.a.k, bytes, full, policy);
                                 };
                               });
}

// The rows that a warp copies for the tiles of a group, every kStreamCopyWarps-th.
template <typename T, bool Up>
struct FewTokens {
  static constexpr int kMost = kFewRows / kStreamCopyWarps;

  int group = -1, count = 0;
  const T* sources[kMost];

  MII_DEVICE void copy(const FewRun<T, Up>& run, int unit) {
    const int tile = run.tile(unit), bytes = 2 * run.depth(unit);
    const int warp = (threadIdx.x - kStreamConsumers) / kWarp;
    if (group != tile / run.tiles) {
      group = tile / run.tiles;
      const int4 rows = run.rows(tile);
      count = rows.z;
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        const int token = warp + i * kStreamCopyWarps;
        if (token < count) sources[i] = run.a.x + source_row<T, Up>(run.a, rows.y + token) * run.a.x_stride;
      }
    }
    __syncwarp();
    if (!elect_lane()) return;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const int token = warp + i * kStreamCopyWarps;
      if (token >= count) continue;
      bulk_copy(run.stage(unit) + kStreamWeightBytes + token * kStreamRowBytes, sources[i] + run.column(unit), bytes,
                run.full(unit));
    }
  }
};

// `before`: the meeting's counter, read before this CTA came to it.
template <typename T>
MII_DEVICE void copy_few(const FewRun<T, true>& up, const FewRun<T, false>& down, const uint32_t* met, uint32_t before) {
  const uint64_t policy = read_once_policy();
  const int places = down.first + down.size();
  FewTokens<T, true> up_tokens;
  FewTokens<T, false> down_tokens;
  int waiting = down.first;  // the first place whose tokens are not asked for
  bool all_met = false;
  const auto meet = [&] {
    if (threadIdx.x % kWarp == 0) wait_for_turn(met, before);
    __syncwarp();
    publish_global_writes();
    all_met = true;
  };
  for (int place = 0; place < places; ++place) {
    if (place >= kStreamUnits) {
      // The ring is full of weights of the second product, none of which can be multiplied before.
      if (!all_met && place - kStreamUnits >= down.first) meet();
      for (; all_met && waiting < place; ++waiting) down_tokens.copy(down, down.unit(waiting));
      barrier_wait_forever(up.ring.empty(place), (StreamRing::round(place) - 1) & 1);
    }
    if (place < down.first) {
      copy_few_weights(up, up.unit(place), policy);
      up_tokens.copy(up, up.unit(place));
    } else {
      copy_few_weights(down, down.unit(place), policy);
    }
  }
  if (waiting == places) return;
  if (!all_met) meet();
  for (; waiting < places; ++waiting) down_tokens.copy(down, down.unit(waiting));
}

// ---- the multiplying warps ------------------------------------------------------------------------------------------
template <typename T, bool Up>
MII_DEVICE void multiply_few(const FewRun<T, Up>& run, float4* words) {
  multiply_stream<T>(
      run, [&](int cta) { return words + (2 * cta + Up) * kStreamConsumers + threadIdx.x; },
      [&](const StreamSums (&sums)[1], int tile) {
        store_moe_tile<T, kFewRows, Up>(run.a, sums, run.rows(tile), run.first_column(tile));
      });
}

// Grid: one CTA a multiprocessor, all at once. Dynamic shared memory: kStreamSharedBytes. Tiles of the list: kFewRows.
template <typename T>
__global__ void __launch_bounds__(kStreamThreads) moe_few(const MoeStreamArgs<T> a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  const StreamRing ring = {shared_address(dynamic_shared())};
  if (threadIdx.x == 0) ring.init();
  wait_for_previous();
  start_next();
  const int groups = a.up.tiles[0].x;
  const uint32_t before = load_state(a.met);
  __syncthreads();
  if (groups == 0) return;
  const FewRun<T, true> up(a.up, ring, groups, 0);
  const FewRun<T, false> down(a.down, ring, groups, up.size());
  if (threadIdx.x >= kStreamConsumers) return copy_few(up, down, a.met, before);
  multiply_few(up, a.words);
  publish_global_writes();
  threads_wait(kFewBarrier, kStreamConsumers);
  if (threadIdx.x == 0) arrive_once(a.met);
  multiply_few(down, a.words);
#endif
}

}  // namespace mii
