// Experts' products of a few rows each: a stream of the weights of the experts that are hit, as linear_stream.cuh is for
// one weight.
//
// Work is cut into units of 128 weight rows by 64 of k of one tile of rows, in the order of the list of tiles, and every
// CTA streams an equal run of them whatever experts are hit (stream-K: Osama et al., arXiv 2301.03598). A CTA whose run
// ends inside a tile leaves float partial sums; the last of the tile's CTAs to arrive adds them up in their order, so runs
// repeat bit for bit, and resets the counter for the next launch. For moe_up the 128 weight rows are 64 of gate and the same 64
// of up, eight of each in turn: both halves of an output then lie in the same thread (rows r and r + 8 of a fragment), and
// the activation is part of the epilogue.
#pragma once
#include "mii/moe_product.cuh"
#include "mii/partial_sums.cuh"
#include "mii/stream_runs.cuh"

namespace mii {

constexpr int kUnitRows = 128;     // weight rows of a unit
constexpr int kUnitDepth = 64;     // k of a unit: one line of 128 bytes a row
constexpr int kMoeThreads = 256;  // 8 warps
constexpr int kMoeMostCtas = 1024;  // counters: one for each CTA that may begin a row tile which others finish

template <int Tokens>
struct MoeStreamShape {
  static constexpr int kGroups = Tokens / 8;
  static constexpr int kStages = Tokens <= 16 ? 6 : 4;
  static constexpr int kWeightBytes = kUnitRows * kUnitDepth * 2;
  static constexpr int kStageBytes = kWeightBytes + Tokens * kUnitDepth * 2;
  static constexpr int kSharedBytes = kStages * kStageBytes;
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

// sums += (16 weight rows of this warp) x (the tile's rows, in eights) over one unit in shared memory.
template <typename T, int Tokens>
MII_DEVICE void multiply_moe_unit(float (&sums)[Tokens / 8][4], uint32_t stage, int rows) {
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
      multiply_add<T>(sums[group], left, b[0], b[1]);
      multiply_add<T>(sums[group], right, b[2], b[3]);
    }
  }
}

// Leaves this CTA's partial sums of a tile. True in every thread of the CTA that has the total then.
template <typename T, int Groups>
MII_DEVICE bool merge_moe_tile(const MoeArgs<T>& a, float (&sums)[Groups][4], const StreamRuns& runs, int tile) {
#if MII_SUMS_BY_WORDS
  return merge_by_words(sums, runs, tile, [&](int cta) {
    return [first = a.partial + cta * Groups * kMoeThreads + threadIdx.x](int g) { return first + g * kMoeThreads; };
  });
#else
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
#endif
}

// Rounds a tile's sums and stores them: rows of weight are columns of out.
template <typename T, int Tokens, bool Up>
MII_DEVICE void store_moe_tile(const MoeArgs<T>& a, const float (&sums)[Tokens / 8][4], const int4 rows, int tile) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int group = 0; group < Tokens / 8; ++group) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = group * 8 + 2 * (lane % 4) + i;
      if (token >= rows.z) continue;
      const int row = rows.y + token;
      if constexpr (Up) {
        const int n = tile * WeightUnit<T, Up>::kColumns + warp * 8 + lane / 4;
        const float value = activate_any<T>(sums[group][i], a.activation) * sums[group][2 + i];
        if (n < a.n) a.out[row * a.out_stride + n] = from_float<T>(value);
      } else {
        const int n = tile * kUnitRows + warp * 16 + lane / 4, pair = a.pairs[row];
        const float weight = a.pair_weights[pair];
        T* out = a.out + pair * a.out_stride;
        if (n < a.n) out[n] = from_float<T>(weight * sums[group][i]);
        if (n + 8 < a.n) out[n + 8] = from_float<T>(weight * sums[group][2 + i]);
      }
    }
  }
}

// Grid: one CTA a multiprocessor. Dynamic shared memory: MoeStreamShape<Tokens>::kSharedBytes.
//
// moe_down begins with its weights before the kernel before it (moe_up) ends: by then the lists, which were written before
// that kernel began, are there (the rules in common.cuh).
template <typename T, int Tokens, bool Up>
__global__ void __launch_bounds__(kMoeThreads, 1) moe_stream(const MoeArgs<T> a) {
  using Shape = MoeStreamShape<Tokens>;
  const uint32_t shared = shared_address(dynamic_shared());
  if constexpr (Up) {
    wait_for_previous();
    start_next();
  }
  const int steps = (a.k + kUnitDepth - 1) / kUnitDepth;
  const int tiles = (a.n + WeightUnit<T, Up>::kColumns - 1) / WeightUnit<T, Up>::kColumns;
  const int64_t units = int64_t(a.tiles[0].x) * tiles * steps;
  const int ctas = static_cast<int>(min(int64_t(gridDim.x), units));
  const StreamRuns runs = {units, ctas, steps};
  const bool idle = static_cast<int>(blockIdx.x) >= ctas;
  const int begin = idle ? 0 : runs.begin(blockIdx.x), end = idle ? 0 : runs.begin(blockIdx.x + 1);
  if (idle) {
    if constexpr (!Up) {
      wait_for_previous();
      start_next();
    }
    return;
  }
  const auto stage = [&](int unit) { return shared + (unit - begin) % Shape::kStages * Shape::kStageBytes; };

  MoeLoader<T, Tokens, Up> loader(a, begin, tiles, steps);
  if constexpr (!Up) {  // the first weights, while what writes x still runs
    MoeLoader<T, Tokens, Up> early(a, begin, tiles, steps);
    for (int unit = begin; unit < min(end, begin + Shape::kStages - 1); ++unit) {
      early.load_weight(stage(unit));
      early.advance(unit + 1 < end);
    }
    wait_for_previous();
    start_next();
  }
  for (int unit = begin; unit < begin + Shape::kStages - 1; ++unit) {
    if (unit < end) {
      if constexpr (Up) loader.load_weight(stage(unit));
      loader.load_rows(stage(unit));
      loader.advance(unit + 1 < end);
    }
    copy_async_commit();
  }

  float sums[Tokens / 8][4] = {};
  int run_start = begin;  // first unit of the tile that `sums` belongs to
  MoeCursor at(begin, tiles, steps);
  int4 rows = a.tiles[1 + at.group];
  for (int unit = begin; unit < end; ++unit) {
    copy_async_wait<Shape::kStages - 2>();
    __syncthreads();
    if (const int next = unit + Shape::kStages - 1; next < end) {
      loader.load_weight(stage(next));
      loader.load_rows(stage(next));
      loader.advance(next + 1 < end);
    }
    copy_async_commit();
    multiply_moe_unit<T, Tokens>(sums, stage(unit), rows.z);
    const int group = at.group, tile = at.tile;
    const bool finished = at.advance(tiles, steps);
    if (!finished && unit + 1 != end) continue;
    const bool whole = unit + 1 - run_start == steps;
    if (whole || merge_moe_tile(a, sums, runs, group * tiles + tile)) {
      store_moe_tile<T, Tokens, Up>(a, sums, rows, tile);
    }
    run_start = unit + 1;
#pragma unroll
    for (int g = 0; g < Tokens / 8; ++g) sums[g][0] = sums[g][1] = sums[g][2] = sums[g][3] = 0;
    if (at.group != group && unit + 1 < end) rows = a.tiles[1 + at.group];
  }
}

}  // namespace mii
