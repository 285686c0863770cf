// Matrix product of a few rows with a large weight: out = x @ weight^T + bias, bound by reading the weight once.
//
// The weight [n, k] is the 16-row operand of mma.m16n8k16 and the tokens are its 8 columns, so few tokens waste nothing.
// Work is cut into units of 128 weight rows by 64 of k, and every CTA (one on each multiprocessor) streams an equal run of
// consecutive units through shared memory, whatever n and k are (stream-K: Osama et al., arXiv 2301.03598). A CTA whose run
// ends inside a row tile leaves float partial sums; the last of a tile's CTAs to arrive adds them up in their order, so runs
// repeat bit for bit, and resets the tile's counter for the next launch.
//
// With programmatic dependent launch the first units of the weight are under way before the kernel before this one ends:
// weights are constants, only x has to be waited for.
#pragma once
#include "mii/attention_mma.cuh"

namespace mii {

constexpr int kStreamRows = 128;     // weight rows of a unit
constexpr int kStreamDepth = 64;     // k of a unit: one line of 128 bytes a row
constexpr int kStreamThreads = 256;  // 8 warps, 16 weight rows each
constexpr int kStreamMaxTiles = 8192;

template <typename T>
struct LinearStreamArgs {
  T* out;
  const T* x;
  const T* weight;
  const T* bias;  // or null
  int* arrived;   // [kStreamMaxTiles], zero between launches
  float4* partial;
  int64_t x_stride, out_stride;
  int rows, n, k;
};

template <int Tokens>
struct StreamShape {
  static constexpr int kGroups = Tokens / 8;
  static constexpr int kStages = Tokens <= 16 ? 6 : Tokens == 32 ? 5 : 4;
  static constexpr int kWeightBytes = kStreamRows * kStreamDepth * 2;
  static constexpr int kStageBytes = kWeightBytes + Tokens * kStreamDepth * 2;
  static constexpr int kSharedBytes = kStages * kStageBytes;
};

// Starts the copies of one unit's weight rows and of its slice of x.
template <typename T>
MII_DEVICE void load_weight_unit(uint32_t target, const LinearStreamArgs<T>& a, int tile, int step) {
  const int chunk = threadIdx.x % 8, column = step * kStreamDepth + chunk * 8;
#pragma unroll
  for (int i = 0; i < kStreamRows / (kStreamThreads / 8); ++i) {
    const int row = threadIdx.x / 8 + i * (kStreamThreads / 8), n = tile * kStreamRows + row;
    const bool valid = n < a.n && column < a.k;
    const T* source = valid ? a.weight + int64_t(n) * a.k + column : a.weight;
    copy_async(target + HeadRows<kStreamDepth>::offset(row, chunk), source, valid);
  }
}

template <typename T, int Tokens>
MII_DEVICE void load_token_unit(uint32_t target, const LinearStreamArgs<T>& a, int step) {
#pragma unroll
  for (int i = threadIdx.x; i < Tokens * 8; i += kStreamThreads) {
    const int token = i / 8, chunk = i % 8, column = step * kStreamDepth + chunk * 8;
    const bool valid = token < a.rows && column < a.k;
    const T* source = valid ? a.x + token * a.x_stride + column : a.x;
    copy_async(target + HeadRows<kStreamDepth>::offset(token, chunk), source, valid);
  }
}

// sums += (16 weight rows of this warp) x (all tokens) over one unit in shared memory.
template <typename T, int Tokens>
MII_DEVICE void multiply_unit(float (&sums)[Tokens / 8][4], uint32_t stage) {
  using Rows = HeadRows<kStreamDepth>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t weight = stage + Rows::lane_offset(warp * 16 + lane % 16, lane / 16);
  const uint32_t tokens = stage + StreamShape<Tokens>::kWeightBytes;
#pragma unroll
  for (int pair = 0; pair < kStreamDepth / 32; ++pair) {
    uint32_t left[4], right[4];
    load_matrices(left, Rows::at(weight, 2 * pair, 0));
    load_matrices(right, Rows::at(weight, 2 * pair + 1, 0));
#pragma unroll
    for (int group = 0; group < Tokens / 8; ++group) {
      uint32_t b[4];
      load_matrices(b, tokens + Rows::offset(group * 8 + lane % 8, 4 * pair + lane / 8));
      multiply_add<T>(sums[group], left, b[0], b[1]);
      multiply_add<T>(sums[group], right, b[2], b[3]);
    }
  }
}

template <typename T, int Tokens>
MII_DEVICE void store_tile(const LinearStreamArgs<T>& a, const float (&sums)[Tokens / 8][4], int tile) {
  const int lane = threadIdx.x % kWarp;
  const int first = tile * kStreamRows + threadIdx.x / kWarp * 16 + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int n = first + 8 * half;
    if (n >= a.n) continue;
    const float bias = a.bias ? to_float(a.bias[n]) : 0.0f;
#pragma unroll
    for (int group = 0; group < Tokens / 8; ++group) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = group * 8 + 2 * (lane % 4) + i;
        if (token < a.rows) a.out[token * a.out_stride + n] = from_float<T>(sums[group][2 * half + i] + bias);
      }
    }
  }
}

// The runs of units: CTA c of `ctas` has [begin(c), begin(c + 1)).
struct StreamRuns {
  int64_t units;
  int ctas, steps;  // units of a row tile

  MII_DEVICE int begin(int cta) const { return static_cast<int>(units * cta / ctas); }
  MII_DEVICE int cta_of(int unit) const { return static_cast<int>(((unit + int64_t(1)) * ctas - 1) / units); }
  // Which of a CTA's two places for partial sums a tile has: its first tile the one, its last the other.
  MII_DEVICE int place(int cta, int tile) const { return 2 * cta + (tile == begin(cta) / steps ? 0 : 1); }
};

// Leaves this CTA's partial sums of a tile. True in every thread of the CTA that arrived last, which then has the total.
template <typename T, int Tokens>
MII_DEVICE bool merge_tile(const LinearStreamArgs<T>& a, float (&sums)[Tokens / 8][4], const StreamRuns& runs, int tile) {
  constexpr int kGroups = Tokens / 8;
  __shared__ int last;
  const auto at = [&](int cta, int group) {
    return a.partial + (int64_t(runs.place(cta, tile)) * kGroups + group) * kStreamThreads + threadIdx.x;
  };
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    __stcg(at(blockIdx.x, group), make_float4(sums[group][0], sums[group][1], sums[group][2], sums[group][3]));
  }
  __threadfence();
  __syncthreads();
  const int first_cta = runs.cta_of(tile * runs.steps), last_cta = runs.cta_of(tile * runs.steps + runs.steps - 1);
  if (threadIdx.x == 0) last = atomicAdd(a.arrived + tile, 1) == last_cta - first_cta;
  __syncthreads();
  const bool mine = last != 0;
  __syncthreads();  // nobody writes `last` for the next tile before everybody has read it
  if (!mine) return false;
  __threadfence();
  if (threadIdx.x == 0) a.arrived[tile] = 0;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int cta = first_cta; cta <= last_cta; ++cta) {
      const float4 part = __ldcg(at(cta, group));
      total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
    }
    sums[group][0] = total.x, sums[group][1] = total.y, sums[group][2] = total.z, sums[group][3] = total.w;
  }
  return true;
}

// Grid: one CTA a multiprocessor, at most one a unit. Dynamic shared memory: StreamShape<Tokens>::kSharedBytes.
template <typename T, int Tokens>
__global__ void __launch_bounds__(kStreamThreads) linear_stream(const LinearStreamArgs<T> a) {
  using Shape = StreamShape<Tokens>;
  extern __shared__ __align__(128) unsigned char stages[];
  const uint32_t shared = shared_address(stages);
  const int steps = (a.k + kStreamDepth - 1) / kStreamDepth, tiles = (a.n + kStreamRows - 1) / kStreamRows;
  const StreamRuns runs = {int64_t(tiles) * steps, static_cast<int>(gridDim.x), steps};
  const int begin = runs.begin(blockIdx.x), end = runs.begin(blockIdx.x + 1);
  const auto stage = [&](int unit) { return shared + (unit - begin) % Shape::kStages * Shape::kStageBytes; };

  for (int unit = begin; unit < min(end, begin + Shape::kStages - 1); ++unit) {
    load_weight_unit(stage(unit), a, unit / steps, unit % steps);
  }
  wait_for_previous();
  start_next();
  for (int unit = begin; unit < begin + Shape::kStages - 1; ++unit) {
    if (unit < end) load_token_unit<T, Tokens>(stage(unit) + Shape::kWeightBytes, a, unit % steps);
    copy_async_commit();
  }

  float sums[Tokens / 8][4] = {};
  int run_start = begin;  // first unit of the tile that `sums` belongs to
  for (int unit = begin; unit < end; ++unit) {
    copy_async_wait<Shape::kStages - 2>();
    __syncthreads();
    if (const int next = unit + Shape::kStages - 1; next < end) {
      load_weight_unit(stage(next), a, next / steps, next % steps);
      load_token_unit<T, Tokens>(stage(next) + Shape::kWeightBytes, a, next % steps);
    }
    copy_async_commit();
    multiply_unit<T, Tokens>(sums, stage(unit));
    const int tile = unit / steps;
    if ((unit + 1) % steps != 0 && unit + 1 != end) continue;
    const bool whole = unit + 1 - run_start == steps;
    if (whole || merge_tile<T, Tokens>(a, sums, runs, tile)) store_tile<T, Tokens>(a, sums, tile);
    run_start = unit + 1;
#pragma unroll
    for (int group = 0; group < Tokens / 8; ++group) sums[group][0] = sums[group][1] = sums[group][2] = sums[group][3] = 0;
  }
}

}  // namespace mii
