// Experts' products of up to 8 rows each by one stream of the weights of the experts that are hit (Hopper): both products in
// one launch, as in moe_stream.cuh, but so that little is left to do once the last weights have come.
//
// A CTA has whole tiles of 32 weight rows of an expert, of the first product 16 of gate and the same 16 of up. Up to four tiles
// (a chunk) go through k side by side, so that tokens are brought once for all of them: for each 256 of k (a slice) a unit of
// weights of each tile. One thread has the copy engine bring units (tensor maps, a box or two each), those of the second product
// after those of the first: of the first as far ahead as the rings have places, of the second kFewAhead units. Two teams of four
// warps multiply every second tile each, a warp 16 rows by half of a slice. Four more warps bring tokens, every fourth slice
// each: rows of x by copies; those of the second product, which are results of the first, as words that say by themselves that
// they are there. So nobody waits for all others, nor for stores to be released.
#pragma once
#include "mii/bulk_copy.cuh"
#include "mii/dynamic_shared.cuh"
#include "mii/moe_product.cuh"
#include "mii/peer_words.cuh"
#include "mii/ring_place.cuh"
#include "mii/stream_runs.cuh"
#include "mii/tensor_map.cuh"
#include "mii/wgmma_layout.h"

namespace mii {

constexpr int kFewRows = 8;                          // of a tile of the list
constexpr int kFewTileRows = 32, kFewDepth = 256;    // weight rows of a tile; k of a unit
constexpr int kFewPanel = 64, kFewPanels = kFewDepth / kFewPanel;  // k of a panel; panels of a unit
constexpr int kFewChunk = 4;                         // tiles, at most
// Units that are on their way when one of the second product is asked for, with that one: as much as memory needs to be busy,
// since what is asked for besides, results of the first product above all, stands behind them in the same queues.
constexpr int kFewAhead = 3;
constexpr int kFewUnits = 6, kFewSlices = 5;         // of the rings: units of a team; slices
static_assert(kFewAhead <= kFewUnits, "a unit on its way still has its place");
constexpr int kFewTeams = 2, kFewTeamWarps = 4;      // that multiply, every second tile of a chunk each
constexpr int kFewWarps = kFewTeams * kFewTeamWarps, kFewTokenWarps = 4;  // that multiply; that bring tokens
constexpr int kFewOwn = kFewChunk / kFewTeams;       // tiles of a chunk that a team has, at most
constexpr int kFewConsumers = kFewWarps * kWarp, kFewThreads = kFewConsumers + (kFewTokenWarps + 1) * kWarp;
constexpr int kFewWeightBytes = kFewTileRows * kFewDepth * 2;
constexpr int kFewRowBytes = 2 * kFewDepth + 16, kFewTokenBytes = kFewRows * kFewRowBytes;  // rows lie apart by banks
constexpr int kFewAlignment = 1024;
constexpr int64_t kFewResultBytes = 8 << 20;  // room for the results of the first product

template <typename T>
struct MoeFewArgs {
  TensorMap up_weight, down_weight;  // the experts' one after the other, in boxes of a unit, of the first product half of one
  MoeArgs<T> up, down;
  uint64_t* results;   // [rows of the list, down.k / 2], of the first product
  uint64_t* launches;  // see FewWords
  int listed;          // entries of the list of tiles that there are at least, or kWarp
};

// A ring in shared memory: places, and for each a barrier that tells that it is filled and one that tells that it was read.
template <int Count, int Bytes>
struct FewRing {
  using Place = RingPlace<Count>;
  static constexpr int kBytes = Count * Bytes, kBarriersBytes = 2 * Count * kBarrierBytes;
  uint32_t base, barriers;

  MII_DEVICE uint32_t at(const Place& place) const { return base + place.at * Bytes; }
  MII_DEVICE uint32_t full(const Place& place) const { return barriers + place.at * kBarrierBytes; }
  MII_DEVICE uint32_t empty(const Place& place) const { return barriers + (Count + place.at) * kBarrierBytes; }
  MII_DEVICE void wait_full(const Place& place) const { barrier_wait_forever(full(place), place.parity); }
  // Until what the ring brought there the last time around was read; in the first turn at once.
  MII_DEVICE void wait_empty(const Place& place) const { barrier_wait_forever(empty(place), place.parity ^ 1); }
  // By a whole warp that has multiplied what is there.
  MII_DEVICE void release(const Place& place) const {
    __syncwarp();
    if (threadIdx.x % kWarp == 0) barrier_arrive(empty(place));
  }
  // By a warp, before all others go on. `readers`: warps that release a place.
  MII_DEVICE void init(int readers) const {
    static_assert(Count <= kWarp);
    const Place place = {static_cast<int>(threadIdx.x % kWarp), 0};
    if (place.at >= Count) return;
    barrier_init(full(place), 1);
    barrier_init(empty(place), readers);
  }
};
using FewUnits = FewRing<kFewUnits, kFewWeightBytes>;
using FewSlices = FewRing<kFewSlices, kFewTokenBytes>;
using FewUnit = FewUnits::Place;
using FewSlice = FewSlices::Place;

// Where they lie: the units of each team, the slices, then all barriers.
struct FewShared {
  static constexpr int kBarriersAt = kFewTeams * FewUnits::kBytes + FewSlices::kBytes;
  static constexpr int kBytes =
      kFewAlignment + kBarriersAt + kFewTeams * FewUnits::kBarriersBytes + FewSlices::kBarriersBytes;
  uint32_t base;

  MII_DEVICE explicit FewShared(uint32_t shared) : base((shared + kFewAlignment - 1) / kFewAlignment * kFewAlignment) {}
  MII_DEVICE FewUnits units(int team) const {
    return {base + team * FewUnits::kBytes, base + kBarriersAt + team * FewUnits::kBarriersBytes};
  }
  MII_DEVICE FewSlices slices() const {
    return {base + kFewTeams * FewUnits::kBytes, base + kBarriersAt + kFewTeams * FewUnits::kBarriersBytes};
  }
};

// The list of tiles, whose first entries a CTA reads together with their number.
struct FewList {
  const int4* tiles;
  const int4* near;  // in shared memory, the first `listed`
  int listed;

  MII_DEVICE int groups() const { return near[0].x; }
  MII_DEVICE int4 group(int i) const { return 1 + i < listed ? near[1 + i] : tiles[1 + i]; }
};

// One of the two products as a CTA has it: its run of tiles.
template <typename T, bool Up>
struct FewRun {
  static constexpr int kColumns = Up ? kFewTileRows / 2 : kFewTileRows;  // of out, that a tile yields
  const MoeArgs<T>& a;
  const FewList& list;
  int tiles, steps, begin, end;  // tiles: of weight rows, of an expert; steps: slices of k

  MII_DEVICE FewRun(const MoeArgs<T>& args, const FewList& list_, int groups) : a(args), list(list_) {
    tiles = (a.n + kColumns - 1) / kColumns;
    steps = (a.k + kFewDepth - 1) / kFewDepth;
    const StreamRuns runs = {groups * tiles, static_cast<int>(gridDim.x), 1};
    // Longer runs of the first product go to the first CTAs, those of the second one to the last.
    const int cta = static_cast<int>(Up ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
    begin = runs.begin(cta), end = runs.begin(cta + 1);
  }
  MII_DEVICE int depth(int step) const { return min(kFewDepth, a.k - step * kFewDepth); }
};

// The chunks of a run: neighbouring tiles of one expert.
template <typename T, bool Up>
struct FewChunks {
  const FewRun<T, Up>& run;
  int left, column, group, count;  // left: tiles, with those of this chunk
  int4 rows;                       // (expert, first row, rows, 0)

  MII_DEVICE explicit FewChunks(const FewRun<T, Up>& run_)
      : run(run_), left(run.end - run.begin), column(run.begin % run.tiles), group(run.begin / run.tiles), rows{} {
    if (left > 0) rows = run.list.group(group);
    cut();
  }
  MII_DEVICE bool more() const { return left > 0; }
  MII_DEVICE int first_column(int tile) const { return (column + tile) * FewRun<T, Up>::kColumns; }  // of out
  MII_DEVICE void next() {
    left -= count, column += count;
    if (left > 0 && column == run.tiles) {
      column = 0;
      rows = run.list.group(++group);
    }
    cut();
  }

 private:
  MII_DEVICE void cut() { count = min(min(kFewChunk, left), run.tiles - column); }
};

// ---- what the first product hands to the second one -------------------------------------------------------------------
// Two elements of a row in a word, with the number of the launch, which says that they are there.
struct FewWords {
  uint64_t* words;
  uint32_t launch;

  // Launches are counted in the upper half of a number to which each CTA adds once, at its end, and the first one what the
  // others lack to 2^32: so all CTAs of a launch find the same there. The top bit tells words from memory that has none.
  template <typename T>
  MII_DEVICE explicit FewWords(const MoeFewArgs<T>& a)
      : words(a.results), launch(static_cast<uint32_t>(load_word(a.launches) >> 32) | 0x80000000u) {}
  // By one thread of a CTA, after all have read.
  template <typename T>
  MII_DEVICE static void count_launch(const MoeFewArgs<T>& a) {
    const unsigned long long whole = 1ull << 32;
    atomicAdd(reinterpret_cast<unsigned long long*>(a.launches), blockIdx.x == 0 ? whole - (gridDim.x - 1) : 1ull);
  }
  MII_DEVICE void hand_on(int64_t element, uint32_t pair) const { store_word(words + element / 2, uint64_t(launch) << 32 | pair); }
  MII_DEVICE bool are_here(uint64_t first, uint64_t second) const { return first >> 32 == launch && second >> 32 == launch; }
};

// ---- weights --------------------------------------------------------------------------------------------------------
// Where the copying thread is in the rings of units.
struct FewWriter {
  const FewShared& shared;
  uint64_t policy = read_once_policy();
  FewUnit places[kFewTeams];
  uint32_t asked[kFewAhead] = {}, parities[kFewAhead] = {};  // the barriers of the last units asked for, latest first
  int count = 0;                                             // of units asked for

  // Where a tile ends before its rows do, rows of whatever follows come along, and nobody reads what becomes of them; behind
  // the last ones come zeros.
  template <typename T, bool Up>
  MII_DEVICE void bring(const FewRun<T, Up>& run, const TensorMap& weight) {
    for (FewChunks<T, Up> chunk(run); chunk.more(); chunk.next()) {
      const int expert = chunk.rows.x * (Up ? 2 : 1) * run.a.n;
      for (int step = 0; step < run.steps; ++step) {
#pragma unroll
        for (int tile = 0; tile < kFewChunk; ++tile) {
          if (tile == chunk.count) break;
          const FewUnits units = shared.units(tile % kFewTeams);
          FewUnit& place = places[tile % kFewTeams];
          const int first = expert + chunk.first_column(tile), panel = step * kFewPanels;
          const uint32_t target = units.at(place), full = units.full(place);
          units.wait_empty(place);
          if (!Up && count >= kFewAhead) barrier_wait_forever(asked[kFewAhead - 1], parities[kFewAhead - 1]);
#pragma unroll
          for (int i = kFewAhead - 1; i > 0; --i) asked[i] = asked[i - 1], parities[i] = parities[i - 1];
          asked[0] = full, parities[0] = place.parity;
          barrier_expect(full, kFewWeightBytes);
          copy_panels(target, &weight, panel, first, full, policy);
          if (Up) copy_panels(target + kFewWeightBytes / 2, &weight, panel, first + run.a.n, full, policy);
          place.next();
          ++count;
        }
      }
    }
  }
};

// ---- tokens ---------------------------------------------------------------------------------------------------------
MII_DEVICE int few_token_warp() { return threadIdx.x / kWarp - kFewWarps - 1; }

// Slices are dealt out in turn, through both products: a warp that has brought one knows then that the ring has been read up to
// a whole turn before it, so that it cannot take an earlier turn's end for that of the one it waits for.
static_assert(kFewSlices >= kFewTokenWarps);

// Rows of x. Returns how many slices there were.
template <typename T>
MII_DEVICE int bring_few_tokens(const FewRun<T, true>& run, const FewSlices& slices, FewSlice& place) {
  int slice = 0;
  for (FewChunks<T, true> chunk(run); chunk.more(); chunk.next()) {
    const T* sources[kFewRows];
#pragma unroll
    for (int i = 0; i < kFewRows; ++i) {
      if (i < chunk.rows.z) sources[i] = run.a.x + source_row<T, true>(run.a, chunk.rows.y + i) * run.a.x_stride;
    }
    for (int step = 0; step < run.steps; ++step, ++slice, place.next()) {
      __syncwarp();
      if (slice % kFewTokenWarps != few_token_warp() || !elect_lane()) continue;
      const int bytes = 2 * run.depth(step);
      slices.wait_empty(place);
      barrier_expect(slices.full(place), bytes * chunk.rows.z);
#pragma unroll
      for (int i = 0; i < kFewRows; ++i) {
        if (i >= chunk.rows.z) continue;
        bulk_copy(slices.at(place) + i * kFewRowBytes, sources[i] + step * kFewDepth, bytes, slices.full(place));
      }
    }
  }
  return slice;
}

// Results of the first product. A lane has eight elements of each row of a slice, and asks for them until they are there.
template <typename T>
MII_DEVICE void bring_few_results(const FewRun<T, false>& run, const FewWords& results, const FewSlices& slices, FewSlice& place,
                                  int slice) {
  const int column = threadIdx.x % kWarp * 8;
  for (FewChunks<T, false> chunk(run); chunk.more(); chunk.next()) {
    for (int step = 0; step < run.steps; ++step, ++slice, place.next()) {
      if (slice % kFewTokenWarps != few_token_warp()) continue;
      const uint64_t* source = results.words + (int64_t(chunk.rows.y) * run.a.k + step * kFewDepth + column) / 2;
      const int rows = column < run.depth(step) ? chunk.rows.z : 0;
      uint64_t words[kFewRows][4] = {};
      for (bool there = false; !there;) {
        there = true;
#pragma unroll
        for (int i = 0; i < kFewRows; ++i) {
          uint64_t(&w)[4] = words[i];
          if (i >= rows || (results.are_here(w[0], w[1]) && results.are_here(w[2], w[3]))) continue;
          load_words(source + i * (run.a.k / 2), w[0], w[1]);
          load_words(source + i * (run.a.k / 2) + 2, w[2], w[3]);
          there = false;
        }
      }
      __syncwarp();  // so that all lanes know what the one knows that brought the slice before
      slices.wait_empty(place);
#pragma unroll
      for (int i = 0; i < kFewRows; ++i) {
        if (i >= rows) continue;
        const uint64_t(&w)[4] = words[i];
        const uint4 chunk_of_row = {static_cast<uint32_t>(w[0]), static_cast<uint32_t>(w[1]), static_cast<uint32_t>(w[2]),
                                    static_cast<uint32_t>(w[3])};
        store_chunk(slices.at(place) + i * kFewRowBytes + 2 * column, chunk_of_row);
      }
      __syncwarp();
      if (threadIdx.x % kWarp == 0) barrier_arrive(slices.full(place));
    }
  }
}

// ---- the multiplying warps ------------------------------------------------------------------------------------------
// Of a team's warps 0 and 1 have 16 weight rows of a tile each and the first half of a slice, warps 2 and 3 the same rows and the other half. Of
// the first product 16 rows are eight of gate and the same eight of up, so that a thread ends up with both of a pair.
MII_DEVICE int few_rows_of() { return threadIdx.x / kWarp % 2; }
MII_DEVICE int few_half() { return threadIdx.x / kWarp / 2 % 2; }
MII_DEVICE int few_team() { return threadIdx.x / kWarp / kFewTeamWarps; }

// Where a lane loads fragments from.
template <bool Up>
struct FewLane {
  using Weights = Panels<Up ? kFewTileRows / 2 : kFewTileRows, kFewDepth>;
  uint32_t row, swizzle, token;  // from where the weights begin, of a chunk within its row, from where the tokens begin

  MII_DEVICE FewLane() {
    const int lane = threadIdx.x % kWarp, line = Up ? few_rows_of() * 8 + lane % 8 : few_rows_of() * 16 + lane % 16;
    const int part = Up ? lane / 8 % 2 * (kFewWeightBytes / 2) : 0;
    row = part + Weights::offset(line, 0) / 128 * 128 + few_half() * (kFewPanels / 2) * Weights::kPanelBytes;
    swizzle = (lane / 16 ^ line % 8) * 16;
    token = lane % 8 * kFewRowBytes + lane / 8 * 16 + few_half() * kFewDepth;
  }
  // x: fragments of the first `Count` panels of this warp's half of a slice, two of 16 columns each.
  template <int Count>
  MII_DEVICE void load(uint32_t (&x)[kFewPanels][4], uint32_t tokens) const {
#pragma unroll
    for (int i = 0; i < 2 * Count; ++i) load_matrices(x[i], tokens + token + 64 * i);
  }
  // sums += 16 weight rows x tokens over these panels.
  template <typename T, int Count>
  MII_DEVICE void multiply(float (&sums)[2][4], uint32_t weights, const uint32_t (&x)[kFewPanels][4]) const {
    uint32_t weight[4 * Count][4];  // of 16 columns each
#pragma unroll
    for (int i = 0; i < 4 * Count; ++i) {
      load_matrices(weight[i], weights + row + i / 4 * Weights::kPanelBytes + (swizzle ^ i % 4 * 32));
    }
#pragma unroll
    for (int i = 0; i < 4 * Count; ++i) {
      multiply_add<T>(sums[i % 2], weight[i], x[i / 2][i % 2 * 2], x[i / 2][i % 2 * 2 + 1]);
    }
    have_multiplied(sums[0][0], sums[1][0]);
  }
};

using FewSums = float[kFewOwn][2][4];  // of a thread: of each tile two chains, as one product waits long for the one before
using FewHalves = float4[kFewTeams][kFewOwn][2 * kWarp];  // sums of the second half

// The multiplying side of the rings.
struct FewReader {
  FewUnits units;  // of this team
  FewSlices slices;
  FewHalves* halves;  // two
  FewUnit unit;
  FewSlice slice;
  int turn = 0;

  // Adds up a slice of this team's tiles of a chunk.
  template <typename T, bool Up, int Panels>
  MII_DEVICE void multiply(const FewLane<Up>& lane, FewSums& sums, int count) {
    uint32_t x[kFewPanels][4];
    slices.wait_full(slice);
    lane.template load<Panels>(x, slices.at(slice));
#pragma unroll
    for (int tile = 0; tile < kFewChunk; ++tile) {
      if (tile == count) break;
      if (tile % kFewTeams != few_team()) continue;
      units.wait_full(unit);
      if constexpr (Panels > 0) lane.template multiply<T, Panels>(sums[tile / kFewTeams], units.at(unit), x);
      units.release(unit);
      unit.next();
    }
    have_read<2 * Panels>(x);
    slices.release(slice);
    slice.next();
  }
  // Calls store(sums, tile) in the warps of the first half, for the sums of both.
  template <typename Store>
  MII_DEVICE void join(const FewSums& sums, int count, Store&& store) {
    auto& places = halves[turn][few_team()];
    turn ^= 1;
    float whole[kFewOwn][4];
#pragma unroll
    for (int own = 0; own < kFewOwn; ++own) {
      float(&sum)[4] = whole[own];
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = sums[own][0][i] + sums[own][1][i];
      if (few_half() == 1) places[own][threadIdx.x % (2 * kWarp)] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    }
    threads_wait(1 + 2 * few_team() + few_rows_of(), 2 * kWarp);
    if (few_half() == 1) return;
#pragma unroll
    for (int own = 0; own < kFewOwn; ++own) {
      const int tile = own * kFewTeams + few_team();
      if (tile >= count) break;
      const float4 other = places[own][threadIdx.x % (2 * kWarp)];
      float(&sum)[4] = whole[own];
      sum[0] += other.x, sum[1] += other.y, sum[2] += other.z, sum[3] += other.w;
      store(sum, tile);
    }
    __syncwarp();  // lanes that had nothing to store are ahead, and what follows is by whole warps
  }
};

// store(sums, chunk, tile): by the warps of the first half, for the whole sums of a tile, as multiply_add has them.
template <typename T, bool Up, typename Store>
MII_DEVICE void multiply_few(const FewRun<T, Up>& run, FewReader& reader, Store&& store) {
  const FewLane<Up> lane;
  for (FewChunks<T, Up> chunk(run); chunk.more(); chunk.next()) {
    FewSums sums = {};
    for (int step = 0; step < run.steps; ++step) {
      const int panels = run.depth(step) / kFewPanel - few_half() * (kFewPanels / 2);
      if (panels >= 2) {
        reader.template multiply<T, Up, 2>(lane, sums, chunk.count);
      } else if (panels == 1) {
        reader.template multiply<T, Up, 1>(lane, sums, chunk.count);
      } else {
        reader.template multiply<T, Up, 0>(lane, sums, chunk.count);
      }
    }
    reader.join(sums, chunk.count, [&](const float (&whole)[4], int tile) { store(whole, chunk, tile); });
  }
}

// Results of the first product, to memory and as words. Lanes l and l + 4 have neighbouring columns of the same two tokens: one
// of them hands on both columns of one token, the other one of the other.
template <typename T>
MII_DEVICE void hand_on_few(const MoeArgs<T>& a, const FewWords& results, const float (&sums)[4], const int4 rows, int first) {
  const int lane = threadIdx.x % kWarp, column = first + few_rows_of() * 8 + lane / 4, odd = lane / 4 % 2;
  float mine[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) mine[i] = activate_any<T>(sums[i], a.activation) * sums[2 + i];
  const float got = __shfl_xor_sync(kFullMask, odd ? mine[0] : mine[1], 4);
  const uint32_t pair = odd ? pack_pair<T>(got, mine[1]) : pack_pair<T>(mine[0], got);
  const int64_t row = rows.y + 2 * (lane % 4) + odd;
  if (row < rows.y + rows.z && column < a.n) {
    results.hand_on(row * a.n + column - odd, pair);
    *reinterpret_cast<uint32_t*>(a.out + row * a.out_stride + column - odd) = pair;
  }
}

// Which choices this thread's two tokens of a tile are.
struct FewChoices {
  int pairs[2];
  float weights[2];

  template <typename T>
  MII_DEVICE void find(const MoeArgs<T>& a, const int4 rows) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = 2 * (threadIdx.x % 4) + i;
      if (token >= rows.z) continue;
      pairs[i] = a.pairs[rows.y + token];
      weights[i] = a.pair_weights[pairs[i]];
    }
  }
};

template <typename T>
MII_DEVICE void store_few(const MoeArgs<T>& a, const FewChoices& choices, const float (&sums)[4], const int4 rows, int first) {
  const int lane = threadIdx.x % kWarp, column = first + few_rows_of() * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (2 * (lane % 4) + i >= rows.z) continue;
    T* out = a.out + choices.pairs[i] * a.out_stride;
    if (column < a.n) out[column] = from_float<T>(choices.weights[i] * sums[i]);
    if (column + 8 < a.n) out[column + 8] = from_float<T>(choices.weights[i] * sums[2 + i]);
  }
}

template <typename T>
MII_DEVICE void multiply_both_few(const FewRun<T, true>& up, const FewRun<T, false>& down, FewReader& reader,
                                  const FewWords& results) {
  FewChoices choices;
  int group = -1;  // that `choices` are of
  const auto choose = [&](const FewChunks<T, false>& chunk) {
    if (chunk.group == group) return;
    group = chunk.group;
    choices.find(down.a, chunk.rows);
  };
  if (const FewChunks<T, false> first(down); first.more()) choose(first);
  multiply_few<T>(up, reader, [&](const float (&sums)[4], const FewChunks<T, true>& chunk, int tile) {
    hand_on_few(up.a, results, sums, chunk.rows, chunk.first_column(tile));
  });
  multiply_few<T>(down, reader, [&](const float (&sums)[4], const FewChunks<T, false>& chunk, int tile) {
    choose(chunk);
    store_few(down.a, choices, sums, chunk.rows, chunk.first_column(tile));
  });
}

// Grid: one CTA a multiprocessor, all at once. Dynamic shared memory: FewShared::kBytes. Tiles of the list: kFewRows. k of both
// products: whole panels.
template <typename T>
__global__ void __launch_bounds__(kFewThreads, 1) moe_few(const __grid_constant__ MoeFewArgs<T> a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  __shared__ int4 near[kWarp];
  __shared__ FewHalves halves[2];
  const FewShared memory(shared_address(dynamic_shared()));
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (warp == 0) {
    for (int team = 0; team < kFewTeams; ++team) memory.units(team).init(kFewTeamWarps);
    memory.slices().init(kFewWarps);
    barrier_init_fence();
  } else if (threadIdx.x == kWarp) {
    prefetch_map(&a.up_weight);
    prefetch_map(&a.down_weight);
  }
  const FewList list = {a.up.tiles, near, a.listed};
  if (warp == kFewWarps) {
    // Without groups at first, so that instructions and arguments are at hand by the time that the list is.
    int groups = 0;
#pragma unroll 1
    for (bool ready = false;; ready = true) {
      if (ready) {
        wait_for_previous();
        start_next();
        if (lane < a.listed) near[lane] = a.up.tiles[lane];
        __syncthreads();
        groups = list.groups();
        if (!elect_lane()) return;
      }
      FewWriter writer = {memory};
      writer.bring(FewRun<T, true>(a.up, list, groups), a.up_weight);
      writer.bring(FewRun<T, false>(a.down, list, groups), a.down_weight);
      if (ready) return;
    }
  }
  wait_for_previous();
  start_next();
  const FewWords results(a);
  __syncthreads();
  const int groups = list.groups();
  if (groups == 0) return;
  const FewRun<T, true> up(a.up, list, groups);
  if (warp < kFewWarps) {
    FewReader reader = {memory.units(few_team()), memory.slices(), halves};
    multiply_both_few(up, FewRun<T, false>(a.down, list, groups), reader, results);
    if (threadIdx.x == 0) FewWords::count_launch(a);
  } else {
    FewSlice place;
    const int before = bring_few_tokens(up, memory.slices(), place);
    bring_few_results(FewRun<T, false>(a.down, list, groups), results, memory.slices(), place, before);
  }
#endif
}

}  // namespace mii
