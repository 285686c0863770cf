// Experts' products of a few rows each: a stream of the weights of the experts that are hit, as linear_stream.cuh is for
// one weight.
//
// Work is cut into units of 128 weight rows by 64 of k of one tile of rows, in the order of the list of tiles, and of each
// product every CTA streams an equal run whatever experts are hit (stream-K: Osama et al., arXiv 2301.03598). CTAs leave one
// another float partial sums of tiles that they share, which one of them adds up in their order, so runs repeat bit for bit.
// For the first product the 128 weight rows are 64 of gate and the same 64 of up, eight of each in turn: both halves of an
// output then lie in the same thread (rows r and r + 8 of a fragment), and the activation is part of the epilogue.
//
// With tiles of up to 16 rows one launch does both products. Weights of the second follow those of the first through the same
// ring, since which ones is known from the routing: memory is busy while sums are added up and all CTAs wait for one another,
// until the ring is full, 7 us of a copy. Larger tiles are bound by their products, and two launches serve them better.
#pragma once
#include "mii/grid_barrier.cuh"
#include "mii/moe_product.cuh"
#include "mii/partial_sums.cuh"
#include "mii/stream_runs.cuh"

namespace mii {

constexpr int kUnitRows = 128;     // weight rows of a unit
constexpr int kUnitDepth = 64;     // k of a unit: one line of 128 bytes a row
constexpr int kMoeThreads = 256;  // 8 warps
constexpr int kMoeMostTogether = 16;  // rows of a tile up to which one launch does both products
constexpr int kMoeMostCtas = 1024;  // counters: one for each CTA that may begin a row tile which others finish

// Bytes of shared memory that a ring may have: on compute capability 9.0, and on every other one, of which 8.6 has the least.
constexpr int kMoeRingBytes = 226 * 1024, kMoeSmallRingBytes = 98 * 1024;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int kMoeRingHere = kMoeRingBytes;
#else
constexpr int kMoeRingHere = kMoeSmallRingBytes;
#endif

enum MoePart { kMoeBoth, kMoeUp, kMoeDown };  // of the two products, what a launch does

template <int Tokens>
struct MoeStreamShape {
  static constexpr bool kTogether = Tokens <= kMoeMostTogether;
  static constexpr int kChains = kTogether ? 2 : 1;  // of sums that a thread adds up beside each other
  static constexpr int kWeightBytes = kUnitRows * kUnitDepth * 2;
  static constexpr int kStageBytes = kWeightBytes + Tokens * kUnitDepth * 2;
  // Apart, products take longer than weights, and a larger ring costs 3 to 9 %.
  static constexpr int stages(int ring) { return kTogether ? ring / kStageBytes : 4; }
  static constexpr int kStages = stages(kMoeRingHere);
};

template <typename T>
struct MoeStreamArgs {
  MoeArgs<T> up, down;
  uint32_t* met;    // of grid_barrier.cuh
  int* arrived;     // [kMoeMostCtas], zero between launches
  float4* partial;  // two places for each CTA
  float4* words;    // of products together: two places for each CTA, zeros between launches
};

// The 128 x 64 units of weight that both products load: this thread copies rows thread / 8 + 32 i, 16-byte chunk
// thread % 8.
template <typename T, bool Up>
struct WeightUnit {
  static constexpr int kColumns = Up ? kUnitRows / 2 : kUnitRows;  // of out, that a unit yields
  static constexpr int kSpacing = Up ? 16 : 32;                        // columns between the rows that a thread copies

  const T* row;  // of this thread, first of four
  int column;    // of out, that the row belongs to

  MII_DEVICE void set(const MoeArgs<T>& a, int expert, int tile) {
    const int r = threadIdx.x / 8;
    const bool is_up = Up && r / 8 % 2 == 1;
    column = tile * kColumns + (Up ? r / 16 * 8 + r % 8 : r);
    row = a.weight + (int64_t(expert) * (Up ? 2 : 1) * a.n + (is_up ? a.n : 0) + column) * a.k;
  }
  MII_DEVICE void load(const MoeArgs<T>& a, uint32_t target, int step) const {
    const int chunk = threadIdx.x % 8, k = step * kUnitDepth + chunk * 8;
#pragma unroll
    for (int i = 0; i < kUnitRows / 32; ++i) {
      const bool valid = column + i * kSpacing < a.n && k < a.k;
      const T* source = valid ? row + int64_t(i) * kSpacing * a.k + k : a.weight;
      copy_async(target + HeadRows<kUnitDepth>::offset(threadIdx.x / 8 + 32 * i, chunk), source, valid);
    }
  }
};

// Where a run of units is: tile of rows, tile of weight rows, step of k.
struct MoeCursor {
  int group, tile, step;

  MII_DEVICE MoeCursor(int unit, int tiles, int steps) : group(unit / steps / tiles), tile(unit / steps % tiles), step(unit % steps) {}
  // To the next unit; true when that belongs to another tile of weight rows.
  MII_DEVICE bool advance(int tiles, int steps) {
    if (++step < steps) return false;
    step = 0;
    if (++tile == tiles) tile = 0, ++group;
    return true;
  }
};

// The loading side of a run: what it copies next.
template <typename T, int Tokens, bool Up>
struct MoeLoader {
  static constexpr int kPerThread = (Tokens * 8 + kMoeThreads - 1) / kMoeThreads;

  const MoeArgs<T>& a;
  int tiles, steps;
  MoeCursor at;
  WeightUnit<T, Up> weight;
  const T* rows[kPerThread];  // of x, that this thread copies chunks of; null: past the tile's rows
  int group = -1;             // that `rows` belong to

  MII_DEVICE MoeLoader(const MoeArgs<T>& args, int unit, int tiles_, int steps_)
      : a(args), tiles(tiles_), steps(steps_), at(unit, tiles_, steps_) {
    weight.set(a, a.tiles[1 + at.group].x, at.tile);
  }
  MII_DEVICE void load_weight(uint32_t stage) const { weight.load(a, stage, at.step); }
  MII_DEVICE void load_rows(uint32_t stage) {
    if (group != at.group) find_rows();
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int index = threadIdx.x + i * kMoeThreads, chunk = index % 8, k = at.step * kUnitDepth + chunk * 8;
      if (index >= Tokens * 8) continue;
      const bool valid = rows[i] != nullptr && k < a.k;
      copy_async(stage + MoeStreamShape<Tokens>::kWeightBytes + HeadRows<kUnitDepth>::offset(index / 8, chunk),
                 valid ? rows[i] + k : a.x, valid);
    }
  }
  MII_DEVICE void advance(bool more) {
    if (at.advance(tiles, steps) && more) weight.set(a, a.tiles[1 + at.group].x, at.tile);
  }

 private:
  MII_DEVICE void find_rows() {
    group = at.group;
    const int4 tile = a.tiles[1 + group];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int token = (threadIdx.x + i * kMoeThreads) / 8;
      rows[i] = token < tile.z ? a.x + source_row<T, Up>(a, tile.y + token) * a.x_stride : nullptr;
    }
  }
};

template <int Tokens>
using MoeSums = float[MoeStreamShape<Tokens>::kChains][Tokens / 8][4];

// sums += (16 weight rows of this warp) x (the tile's rows, in eights) over one unit in shared memory.
template <typename T, int Tokens>
MII_DEVICE void multiply_moe_unit(MoeSums<Tokens>& sums, uint32_t stage, int rows) {
  constexpr int kLast = MoeStreamShape<Tokens>::kChains - 1;
  using Rows = HeadRows<kUnitDepth>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t weight = stage + Rows::lane_offset(warp * 16 + lane % 16, lane / 16);
  const uint32_t tokens = stage + MoeStreamShape<Tokens>::kWeightBytes;
#pragma unroll
  for (int pair = 0; pair < kUnitDepth / 32; ++pair) {
    uint32_t left[4], right[4];
    load_matrices(left, Rows::at(weight, 2 * pair, 0));
    load_matrices(right, Rows::at(weight, 2 * pair + 1, 0));
#pragma unroll
    for (int group = 0; group < Tokens / 8; ++group) {
      if (group > 0 && group * 8 >= rows) continue;
      uint32_t b[4];
      load_matrices(b, tokens + Rows::offset(group * 8 + lane % 8, 4 * pair + lane / 8));
      multiply_add<T>(sums[0][group], left, b[0], b[1]);
      multiply_add<T>(sums[kLast][group], right, b[2], b[3]);
    }
  }
}

// Leaves this CTA's partial sums of a tile to the last of its CTAs to arrive. True in every thread of the CTA that has the
// total then.
template <typename T, int Groups>
MII_DEVICE bool merge_by_count(const MoeStreamArgs<T>& a, float (&sums)[Groups][4], const MixedRuns& runs, int tile) {
  __shared__ int last;
  const auto at = [&](int cta, int group) {
    return a.partial + (int64_t(runs.place(cta, tile)) * Groups + group) * kMoeThreads + threadIdx.x;
  };
#pragma unroll
  for (int group = 0; group < Groups; ++group) {
    __stcg(at(blockIdx.x, group), make_float4(sums[group][0], sums[group][1], sums[group][2], sums[group][3]));
  }
  __threadfence();
  __syncthreads();
  const int first_cta = runs.cta_of(tile * runs.steps), last_cta = runs.cta_of(tile * runs.steps + runs.steps - 1);
  // A CTA begins one tile at most that others finish, so the tile's counter is that of its first CTA.
  if (threadIdx.x == 0) last = atomicAdd(a.arrived + first_cta, 1) == last_cta - first_cta;
  __syncthreads();
  const bool mine = last != 0;
  __syncthreads();  // nobody writes `last` for the next tile before everybody has read it
  if (!mine) return false;
  __threadfence();
  if (threadIdx.x == 0) a.arrived[first_cta] = 0;
#pragma unroll
  for (int group = 0; group < Groups; ++group) {
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int cta = first_cta; cta <= last_cta; ++cta) {
      const float4 part = __ldcg(at(cta, group));
      total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
    }
    sums[group][0] = total.x, sums[group][1] = total.y, sums[group][2] = total.z, sums[group][3] = total.w;
  }
  return true;
}

// A choice of a token: which one, and its weight.
struct MoePair {
  int pair;
  float weight;

  template <typename T>
  MII_DEVICE static MoePair of(const MoeArgs<T>& a, int row) {
    const int pair = a.pairs[row];
    return {pair, a.pair_weights[pair]};
  }
};

// Rounds a tile's sums and stores them from column `first` of out on: rows of weight are columns of out, 16 of a warp's.
// pair_of(row, i), where not Up: the choice of row `row` of the list, the i-th that this thread has sums of.
template <typename T, int Tokens, bool Up, typename PairOf>
MII_DEVICE void store_moe_tile(const MoeArgs<T>& a, const float (&sums)[Tokens / 8][4], const int4 rows, int first,
                               PairOf&& pair_of) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int group = 0; group < Tokens / 8; ++group) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = group * 8 + 2 * (lane % 4) + i;
      if (token >= rows.z) continue;
      const int row = rows.y + token;
      if constexpr (Up) {
        const int n = first + warp * 8 + lane / 4;
        const float value = activate_any<T>(sums[group][i], a.activation) * sums[group][2 + i];
        if (n < a.n) a.out[row * a.out_stride + n] = from_float<T>(value);
      } else {
        const int n = first + warp * 16 + lane / 4;
        const MoePair to = pair_of(row, 2 * group + i);
        T* out = a.out + to.pair * a.out_stride;
        if (n < a.n) out[n] = from_float<T>(to.weight * sums[group][i]);
        if (n + 8 < a.n) out[n + 8] = from_float<T>(to.weight * sums[group][2 + i]);
      }
    }
  }
}

// One of the two products as a CTA has it: its run of units.
template <typename T, int Tokens, bool Up>
struct MoeRun {
  const MoeArgs<T>& a;
  int tiles, begin, end;  // tiles: of weight rows
  MixedRuns runs;

  MII_DEVICE MoeRun(const MoeArgs<T>& args, int groups) : a(args) {
    const int steps = (a.k + kUnitDepth - 1) / kUnitDepth;
    tiles = (a.n + WeightUnit<T, Up>::kColumns - 1) / WeightUnit<T, Up>::kColumns;
    const int64_t units = int64_t(groups) * tiles * steps;
    runs = {units, static_cast<int>(min(int64_t(gridDim.x), units)), steps};
    const bool idle = static_cast<int>(blockIdx.x) >= runs.ctas;
    begin = idle ? 0 : runs.begin(blockIdx.x), end = idle ? 0 : runs.begin(blockIdx.x + 1);
  }
  MII_DEVICE int size() const { return end - begin; }
  MII_DEVICE MoeLoader<T, Tokens, Up> loader() const { return {a, begin, tiles, runs.steps}; }
};

template <int Tokens>
MII_DEVICE uint32_t moe_stage(uint32_t ring, int place) {
  using Shape = MoeStreamShape<Tokens>;
  return ring + place % Shape::kStages * Shape::kStageBytes;
}

// This CTA's part in a tile that it shares with others: true where it has the whole sums then.
template <typename T, int Tokens, bool Up>
MII_DEVICE bool merge_moe_tile(const MoeStreamArgs<T>& a, float (&sums)[Tokens / 8][4], const MixedRuns& runs, int tile) {
  if constexpr (MoeStreamShape<Tokens>::kTogether) {
    return merge_by_words(sums, runs, tile, [&](int cta, int group) {
      return a.words + ((2 * cta + Up) * (Tokens / 8) + group) * kMoeThreads + threadIdx.x;
    });
  } else {
    return merge_by_count(a, sums, runs, tile);
  }
}

// Multiplies a run's units, the first of which has place `place` among all that come through the ring. ask(p) starts the
// copies for place p.
template <typename T, int Tokens, bool Up, typename Ask>
MII_DEVICE void multiply_run(const MoeStreamArgs<T>& a, const MoeRun<T, Tokens, Up>& run, uint32_t ring, int place, Ask&& ask) {
  constexpr int kAhead = MoeStreamShape<Tokens>::kStages - 1, kChains = MoeStreamShape<Tokens>::kChains;
  MoeSums<Tokens> sums = {};
  int run_start = run.begin;  // first unit of the tile that `sums` belongs to
  MoeCursor at(run.begin, run.tiles, run.runs.steps);
  int4 rows = run.a.tiles[1 + at.group];
  for (int unit = run.begin; unit < run.end; ++unit, ++place) {
    copy_async_wait<kAhead - 1>();
    __syncthreads();
    ask(place + kAhead);
    multiply_moe_unit<T, Tokens>(sums, moe_stage<Tokens>(ring, place), rows.z);
    const int group = at.group, tile = at.tile;
    const bool finished = at.advance(run.tiles, run.runs.steps);
    if (!finished && unit + 1 != run.end) continue;
    if constexpr (kChains == 2) {
#pragma unroll
      for (int i = 0; i < Tokens / 2; ++i) sums[0][i / 4][i % 4] += sums[1][i / 4][i % 4];
    }
    const bool whole = unit + 1 - run_start == run.runs.steps;
    if (whole || merge_moe_tile<T, Tokens, Up>(a, sums[0], run.runs, group * run.tiles + tile)) {
      store_moe_tile<T, Tokens, Up>(run.a, sums[0], rows, tile * WeightUnit<T, Up>::kColumns,
                                    [&](int row, int) { return MoePair::of(run.a, row); });
    }
    run_start = unit + 1;
#pragma unroll
    for (int i = 0; i < kChains * Tokens / 2; ++i) sums[i / (Tokens / 2)][i / 4 % (Tokens / 8)][i % 4] = 0;
    if (at.group != group && unit + 1 < run.end) rows = run.a.tiles[1 + at.group];
  }
}

// The rows of the second product's first units, whose weights are asked for before these rows are there. By plain loads:
// copies would be waited for with those of the weights, in the order in which they began.
template <typename T, int Tokens>
struct EarlyRows {
  using Shape = MoeStreamShape<Tokens>;
  static constexpr int kChunks = Tokens * 8, kMost = ((Shape::kStages - 1) * kChunks + kMoeThreads - 1) / kMoeThreads;

  int count;               // of chunks of 16 bytes
  const T* sources[kMost];  // of those that this thread copies; null: zeros

  // Finds out where they will be.
  MII_DEVICE EarlyRows(const MoeRun<T, Tokens, false>& down) : count(min(Shape::kStages - 1, down.size()) * kChunks) {
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const int index = threadIdx.x + i * kMoeThreads, row = index % kChunks / 8;
      sources[i] = nullptr;
      if (index >= count) continue;
      const MoeCursor at(down.begin + index / kChunks, down.tiles, down.runs.steps);
      const int4 tile = down.a.tiles[1 + at.group];
      const int k = at.step * kUnitDepth + index % 8 * 8;
      if (row < tile.z && k < down.a.k) sources[i] = down.a.x + (tile.y + row) * down.a.x_stride + k;
    }
  }
  MII_DEVICE void copy(uint32_t ring, int place) const {
    uint4 values[kMost];
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      values[i] = {0, 0, 0, 0};
      if (sources[i] != nullptr) values[i] = __ldcg(reinterpret_cast<const uint4*>(sources[i]));
    }
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const int index = threadIdx.x + i * kMoeThreads;
      if (index >= count) continue;
      const uint32_t rows = moe_stage<Tokens>(ring, place + index / kChunks) + Shape::kWeightBytes;
      store_chunk(rows + HeadRows<kUnitDepth>::offset(index % kChunks / 8, index % 8), values[i]);
    }
  }
};

// Grid: one CTA a multiprocessor, all at once. Dynamic shared memory: MoeStreamShape<Tokens>::stages of kStageBytes.
//
// The second product by itself begins with its weights before the kernel before it, the first product, ends: by then the
// lists, which were written before that kernel began, are there (the rules in common.cuh).
template <typename T, int Tokens, MoePart Part>
__global__ void __launch_bounds__(kMoeThreads, 1) moe_stream(const MoeStreamArgs<T> a) {
  constexpr int kAhead = MoeStreamShape<Tokens>::kStages - 1;
  constexpr bool kUp = Part != kMoeDown, kDown = Part != kMoeUp;
  const uint32_t ring = shared_address(dynamic_shared());
  const auto begin = [] {
    wait_for_previous();
    start_next();
  };
  if constexpr (kUp) begin();
  const int groups = a.up.tiles[0].x;
  if (groups == 0) {
    if constexpr (!kUp) begin();
    return;
  }
  const MoeRun<T, Tokens, true> up(a.up, groups);
  const MoeRun<T, Tokens, false> down(a.down, groups);
  auto up_loader = up.loader();
  auto down_loader = down.loader();
  const int first_down = kUp ? up.size() : 0, places = first_down + (kDown ? down.size() : 0);
  bool has_rows = false;  // of the second product
  const auto ask = [&](int place) {
    const uint32_t stage = moe_stage<Tokens>(ring, place);
    if (kUp && place < first_down) {
      up_loader.load_weight(stage);
      up_loader.load_rows(stage);
      up_loader.advance(place + 1 < first_down);
    } else if (kDown && place < places) {
      down_loader.load_weight(stage);
      if (has_rows) down_loader.load_rows(stage);
      down_loader.advance(place + 1 < places);
    }
    copy_async_commit();
  };
  for (int place = 0; place < kAhead; ++place) ask(place);
  if constexpr (kUp) multiply_run(a, up, ring, 0, ask);
  if constexpr (kDown) {
    const uint32_t before = kUp ? arrive_at_grid(a.met) : 0;
    const EarlyRows<T, Tokens> early(down);
    if constexpr (kUp) {
      wait_for_grid(a.met, before);
    } else {
      begin();
    }
    early.copy(ring, first_down);
    has_rows = true;
    multiply_run(a, down, ring, first_down, ask);
  }
}

}  // namespace mii
