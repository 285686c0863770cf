// The sampler: one cluster of CTAs draws one row's token. mii/ops/sampler.py describes the method.
//
// A row is cut into one contiguous segment for each warp of the cluster. It comes from memory once, in the pass for the
// best logit; later passes find it in L1 and L2. Thresholds come from histograms of the distances in shared memory, the
// leading digit first: the CTAs of a cluster each add up a slice of the bins over all of them. All sums are integers,
// so neither the cluster's size nor the order of the atomics can change a token.
#pragma once
#include "mii/abi/sample.h"
#include "mii/cluster.cuh"
#include "mii/common.cuh"
#include "mii/sampling.h"

namespace mii::sampler {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMaxCluster = 8;
constexpr int kLeadShift = 18, kDigitBits = 9;
constexpr int kBins = kLimit >> kLeadShift;  // of the leading digit; the other two have 2^9

struct Shared {
  uint32_t low[kBins],
      high[kBins];  // a histogram of weights in two halves, or of counts in `low`; later its merged slice
  uint64_t kept[kWarps], raw[kWarps];  // sums over each warp's segment
  uint64_t scratch[kWarps];
  uint64_t best;         // of this CTA, as best_key() packs it
  uint64_t slice_total;  // of the merged slice of this CTA
  uint64_t before;       // weight before the chosen bin
  int bin;
};

// ---- a row and its loads ------------------------------------------------------------------------------------------

// Elements are counted from the 16-byte boundary at or before the first logit, which is element `offset`.
template <typename T>
struct Row {
  const T* base;
  int offset, limit;      // elements [offset, limit) are logits
  int begin, end;         // this warp's segment, in whole tiles of the warp
  const int32_t* hidden;  // ids that must not be drawn
  int num_hidden;
  int first;  // the id of the first logit
  float best;
};

template <typename T>
__device__ __forceinline__ Row<T> make_row(const MiiSample& a, int64_t r, int first = 0) {
  constexpr int kTile = kWarp * kPack<T>;
  const T* logits = static_cast<const T*>(a.logits) + r * a.logits_stride;
  Row<T> row;
  row.offset = static_cast<int>(reinterpret_cast<uintptr_t>(logits) % 16 / sizeof(T));
  row.base = logits - row.offset;
  row.limit = row.offset + static_cast<int>(a.vocab);
  const int parts = cluster_size() * kWarps, tiles = (row.limit + kTile - 1) / kTile;
  const int segment = (tiles + parts - 1) / parts * kTile;
  row.begin = (cluster_rank() * kWarps + static_cast<int>(threadIdx.x) / kWarp) * segment;
  row.end = row.begin + segment < tiles * kTile ? row.begin + segment : tiles * kTile;
  row.hidden = a.suppress_ids;
  row.num_hidden = a.suppress != nullptr && a.suppress[r] != 0 ? a.num_suppress : 0;
  row.first = first;
  row.best = -INFINITY;
  return row;
}

template <typename T>
__device__ __forceinline__ Pack<T> load(const Row<T>& row, int i) {
  constexpr int N = kPack<T>;
  if (i >= row.offset && i + N <= row.limit) return load_pack<N>(row.base + i);
  Pack<T> pack;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const bool inside = i + j >= row.offset && i + j < row.limit;
    pack[j] = inside ? row.base[i + j] : from_float<T>(-INFINITY);
  }
  return pack;
}

template <typename T>
__device__ __forceinline__ void logits_of(float (&out)[kPack<T>], const Row<T>& row, const Pack<T>& pack, int i) {
  unpack(out, pack);
  for (int h = 0; h < row.num_hidden; ++h) {
    const int at = row.hidden[h] - row.first + row.offset - i;
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) out[j] = at == j ? -INFINITY : out[j];
  }
}

// Calls body(element, logits) for this lane's packs of the warp's segment, all lanes of the warp together.
// Ahead: loads in flight.
template <int Ahead, typename T, typename Body>
__device__ __forceinline__ void visit(const Row<T>& row, Body&& body) {
  constexpr int N = kPack<T>, kTile = kWarp * N;
  for (int start = row.begin + static_cast<int>(threadIdx.x) % kWarp * N; start < row.end; start += Ahead * kTile) {
    Pack<T> packs[Ahead];
#pragma unroll
    for (int u = 0; u < Ahead; ++u) {
      if (start + u * kTile < row.end) packs[u] = load(row, start + u * kTile);
    }
#pragma unroll
    for (int u = 0; u < Ahead; ++u) {
      if (start + u * kTile >= row.end) break;
      float logits[N];
      logits_of(logits, row, packs[u], start + u * kTile);
      body(start + u * kTile, logits);
    }
  }
}

template <int N>
__device__ __forceinline__ float greatest_of(const float (&logits)[N]) {
  float greatest = logits[0];
#pragma unroll
  for (int j = 1; j < N; ++j) greatest = fmaxf(greatest, logits[j]);  // of NaN and a number gives the number
  return greatest;
}

// Whether any logit of a pack lies within the threshold: one distance, that of the greatest, tells.
template <typename T>
__device__ __forceinline__ bool any_within(const Row<T>& row, const float (&logits)[kPack<T>], float scale,
                                           int threshold) {
  return distance(row.best, greatest_of(logits), scale) <= threshold;
}

// ---- reductions of 64-bit integers --------------------------------------------------------------------------------

__device__ __forceinline__ uint64_t warp_total(uint64_t value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kFullMask, value, step);
  return value;
}

__device__ __forceinline__ uint64_t warp_greatest(uint64_t value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const uint64_t other = __shfl_xor_sync(kFullMask, value, step);
    value = other > value ? other : value;
  }
  return value;
}

// The sum over this lane and those before it.
__device__ __forceinline__ uint64_t warp_running(uint64_t value) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const uint64_t other = __shfl_up_sync(kFullMask, value, step);
    value += lane >= step ? other : 0;
  }
  return value;
}

// The sum over this thread and those before it; `total` gets the sum over the CTA.
__device__ __forceinline__ uint64_t block_running(uint64_t value, uint64_t* scratch, uint64_t& total) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const uint64_t running = warp_running(value);
  __syncthreads();
  if (lane == kWarp - 1) scratch[warp] = running;
  __syncthreads();
  const uint64_t part = lane < kWarps ? scratch[lane] : 0;
  total = warp_total(part);
  return running + warp_total(lane < warp ? part : 0);
}

// ---- the best logit -----------------------------------------------------------------------------------------------

// Orders by logit, then by lower element; above 0 for every logit that is not -inf.
__device__ __forceinline__ uint64_t best_key(float logit, int element) {
  const uint32_t bits = __float_as_uint(__fadd_rn(logit, 0.0f));  // -0 becomes +0: they are equal
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | (0xffffffffu - static_cast<uint32_t>(element));
}

__device__ __forceinline__ float logit_of(uint64_t key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

// Sets row.best; returns the element at which the pack with the lowest best token starts, -1 if every logit is -inf.
template <typename T>
__device__ __forceinline__ int find_best(Row<T>& row, Shared& sh) {
  float best = -INFINITY;
  int at = -1;
  visit<4>(row, [&](int element, const float (&logits)[kPack<T>]) {
    const float greatest = greatest_of(logits);
    if (greatest > best) {
      best = greatest;
      at = element;
    }
  });
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  uint64_t key = warp_greatest(at < 0 ? 0 : best_key(best, at));
  if (lane == 0) sh.scratch[warp] = key;
  __syncthreads();
  key = warp_greatest(lane < kWarps ? sh.scratch[lane] : 0);
  if (threadIdx.x == 0) sh.best = key;
  cluster_barrier();
  key = warp_greatest(lane < cluster_size() ? *remote(&sh.best, lane) : 0);
  if (key == 0) return -1;
  row.best = logit_of(key);
  return static_cast<int>(0xffffffffu - static_cast<uint32_t>(key));
}

// The greedy token: the lowest id of the best logit; the lowest id that is not hidden where every logit is -inf, or `none`.
template <typename T>
__device__ __forceinline__ int best_token(const Row<T>& row, int element, int none = 0) {
  if (element >= 0) {
    float logits[kPack<T>];
    logits_of(logits, row, load(row, element), element);
    int found = 0;
#pragma unroll
    for (int j = kPack<T> - 1; j >= 0; --j) found = logits[j] == row.best ? j : found;
    return row.first + element + found - row.offset;
  }
  const int end = row.first + row.limit - row.offset;
  for (int id = row.first; id < end; ++id) {
    bool hidden = false;
    for (int h = 0; h < row.num_hidden; ++h) hidden = hidden || row.hidden[h] == id;
    if (!hidden) return id;
  }
  return none;
}

// ---- thresholds ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ void add_weight(Shared& sh, int bin, uint64_t value) {
  const uint32_t low = static_cast<uint32_t>(value);
  const uint32_t before = atomicAdd(&sh.low[bin], low);
  const uint32_t high = static_cast<uint32_t>(value >> 32) + (before + low < low ? 1 : 0);
  if (high != 0) atomicAdd(&sh.high[bin], high);
}

// The histogram of one digit of the distances up to the threshold that begin with `prefix`.
template <bool Weighted, typename T>
__device__ __forceinline__ void fill_histogram(const Row<T>& row, Shared& sh, float scale, int threshold, int shift,
                                               int prefix, int bins) {
  for (int b = threadIdx.x; b < bins; b += kThreads) sh.low[b] = sh.high[b] = 0;
  __syncthreads();
  visit<2>(row, [&](int, const float (&logits)[kPack<T>]) {
    if (!any_within(row, logits, scale, threshold)) return;
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) {
      const int x = distance(row.best, logits[j], scale), bin = (x >> shift) - prefix;
      if (x > threshold || bin < 0 || bin >= bins) continue;
      if constexpr (Weighted) {
        add_weight(sh, bin, weight(x));
      } else {
        atomicAdd(&sh.low[bin], 1u);
      }
    }
  });
}

// Adds up this CTA's slice of the bins over the cluster and leaves it, and its total, where the others can read it.
__device__ __forceinline__ void merge_slice(Shared& sh, int slice) {
  const int size = cluster_size(), first = cluster_rank() * slice;
  uint64_t sum = 0, total;
  for (int b = first + static_cast<int>(threadIdx.x); b < first + slice; b += kThreads) {
    uint64_t value = 0;
    for (int q = 0; q < size; ++q) {
      value += static_cast<uint64_t>(*remote(&sh.high[b], q)) << 32 | *remote(&sh.low[b], q);
    }
    sh.low[b] = static_cast<uint32_t>(value);
    sh.high[b] = static_cast<uint32_t>(value >> 32);
    sum += value;
  }
  block_running(sum, sh.scratch, total);
  if (threadIdx.x == 0) sh.slice_total = total;
}

// Finds in the merged slice of CTA `rank` the bin in which the running sum reaches the target: sh.bin, sh.before.
__device__ __forceinline__ void find_bin(Shared& sh, int rank, int slice, uint64_t target) {
  const uint32_t* low = remote(sh.low + rank * slice, rank);
  const uint32_t* high = remote(sh.high + rank * slice, rank);
  const int share = (slice + kThreads - 1) / kThreads, first = static_cast<int>(threadIdx.x) * share;
  const int last = first + share < slice ? first + share : slice;
  uint64_t sum = 0, total;
  for (int b = first; b < last; ++b) sum += static_cast<uint64_t>(high[b]) << 32 | low[b];
  uint64_t before = block_running(sum, sh.scratch, total) - sum;
  if (before < target && target <= before + sum) {
    for (int b = first; b < last; ++b) {
      const uint64_t value = static_cast<uint64_t>(high[b]) << 32 | low[b];
      if (target <= before + value) {
        sh.bin = rank * slice + b;
        sh.before = before;
        break;
      }
      before += value;
    }
  }
  __syncthreads();
}

__device__ __forceinline__ int bits16(__half value) { return __half_as_ushort(value); }
__device__ __forceinline__ int bits16(__nv_bfloat16 value) { return __bfloat16_as_ushort(value); }
__device__ __forceinline__ float float_of_bits(int bits, __half) { return to_float(__ushort_as_half(bits)); }
__device__ __forceinline__ float float_of_bits(int bits, __nv_bfloat16) { return to_float(__ushort_as_bfloat16(bits)); }

// Whether the bin of leading digits holds a single value of T, so that its tokens are all equal. May say no to be safe.
template <typename T>
__device__ __forceinline__ bool holds_one_value(const Row<T>& row, float scale, int bin) {
  if constexpr (sizeof(T) == 2) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const float middle = row.best - (static_cast<float>(bin) + 0.5f) * (1 << kLeadShift) / scale;
    const int bits = bits16(from_float<T>(middle));
    const int order = (bits & 0x8000 ? 0xffff - bits : bits + 0x8000) + lane - 2;  // neighbours in order of value
    const float near = float_of_bits((order & 0x8000 ? order - 0x8000 : 0xffff - order) & 0xffff, T{});
    const bool inside =
        lane < 5 && order >= 0 && order <= 0xffff && distance(row.best, near, scale) >> kLeadShift == bin;
    const unsigned mask = __ballot_sync(kFullMask, inside);
    return __popc(mask) == 1 && (mask & 0b10001u) == 0;
  }
  return false;
}

// The smallest distance up to which the tokens within the threshold reach a target, or the threshold if they do not.
// Weighted: the target is top_p of their total weight; else it is a number of tokens.
template <bool Weighted, typename T>
__device__ __forceinline__ int select(const Row<T>& row, Shared& sh, float scale, int threshold, uint64_t count,
                                      float top_p) {
  uint64_t target = count;
  int prefix = 0;
  for (int shift = kLeadShift; shift >= 0; shift -= kDigitBits) {
    const bool lead = shift == kLeadShift;
    const int bins = lead ? kBins : 1 << kDigitBits, slice = bins / cluster_size();
    if (!lead) cluster_barrier();  // nobody reads the digit before any more
    fill_histogram<Weighted>(row, sh, scale, threshold, shift, prefix, bins);
    cluster_barrier();
    merge_slice(sh, slice);
    cluster_barrier();
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const uint64_t own = lane < cluster_size() ? *remote(&sh.slice_total, lane) : 0, running = warp_running(own);
    const uint64_t total = __shfl_sync(kFullMask, running, kWarp - 1);
    if (Weighted && lead) target = nucleus_weight(total, top_p);
    if (total < target) break;
    const int rank = __popc(__ballot_sync(kFullMask, running < target));  // slices that end before the target
    target -= rank == 0 ? 0 : __shfl_sync(kFullMask, running, rank - 1);
    find_bin(sh, rank, slice, target);
    target -= sh.before;
    prefix += sh.bin;
    const int last = ((prefix + 1) << shift) - 1;  // distance that ends the bin
    if (shift == 0 || (lead && holds_one_value(row, scale, prefix))) {
      threshold = last < threshold ? last : threshold;
      break;
    }
    prefix <<= kDigitBits;
  }
  cluster_barrier();  // the histogram is free for the next selection
  return threshold;
}

// ---- the draw -----------------------------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ uint64_t sum_weights(const Row<T>& row, const float (&logits)[kPack<T>], float scale,
                                                int threshold) {
  uint64_t sum = 0;
#pragma unroll
  for (int j = 0; j < kPack<T>; ++j) {
    const int x = distance(row.best, logits[j], scale);
    if (x <= threshold) sum += weight(x);
  }
  return sum;
}

// Sums over this warp's segment: weights up to the threshold, and weights at temperature 1 where `with_raw`.
template <typename T>
__device__ __forceinline__ void sum_segment(const Row<T>& row, Shared& sh, float scale, int threshold, bool with_raw) {
  const float raw_scale = distance_scale(1.0f);
  uint64_t kept = 0, raw = 0;
  visit<2>(row, [&](int, const float (&logits)[kPack<T>]) {
    if (any_within(row, logits, scale, threshold)) kept += sum_weights(row, logits, scale, threshold);
    if (with_raw) raw += sum_weights(row, logits, raw_scale, kLimit - 1);
  });
  kept = warp_total(kept);
  raw = warp_total(raw);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  if (threadIdx.x % kWarp == 0) {
    sh.kept[warp] = kept;
    sh.raw[warp] = raw;
  }
}

// The token at `point` of the running sum over this warp's segment, in the one lane that holds it; -1 in the others.
template <typename T>
__device__ __forceinline__ int draw(const Row<T>& row, float scale, int threshold, uint64_t point) {
  int token = -1;
  bool passed = false;
  visit<1>(row, [&](int element, const float (&logits)[kPack<T>]) {
    if (passed) return;
    const uint64_t sum = sum_weights(row, logits, scale, threshold);
    const uint64_t running = warp_running(sum), tile = __shfl_sync(kFullMask, running, kWarp - 1);
    passed = point < tile;
    if (!passed) {
      point -= tile;
    } else if (running - sum <= point && point < running) {
      uint64_t before = running - sum;
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) {
        const int x = distance(row.best, logits[j], scale);
        if (x <= threshold) before += weight(x);
        if (token < 0 && point < before) token = row.first + element + j - row.offset;
      }
    }
  });
  return token;
}

template <typename T>
__device__ __forceinline__ void finish(const MiiSample& a, const Row<T>& row, int64_t r, int token, uint64_t raw) {
  a.tokens[r] = token;
  if (a.last_token != nullptr) a.last_token[a.slots[r]] = token;
  if (a.logprobs == nullptr) return;
  const float gap = to_float(row.base[row.offset + token]) - row.best;
  const float infinite = row.best > 0.0f ? 0.0f : -INFINITY;
  a.logprobs[r] = isinf(row.best) ? infinite : gap - logf(static_cast<float>(raw) * 0x1p-40f);
}

// What every CTA's sum_segment() left: of the whole row, of the segments before this warp's, and of its own.
struct Sums {
  uint64_t total, raw, before, own;
  __device__ __forceinline__ bool holds(uint64_t point) const { return before <= point && point < before + own; }
};

__device__ __forceinline__ Sums sums_of(const Shared& sh) {
  constexpr int kShare = kMaxCluster * kWarps / kWarp;  // consecutive segments of a lane
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int own = cluster_rank() * kWarps + static_cast<int>(threadIdx.x) / kWarp;
  uint64_t kept[kShare], sum = 0, raw = 0;
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    const int segment = lane * kShare + i, rank = segment / kWarps;
    const bool there = rank < cluster_size();
    kept[i] = there ? *remote(&sh.kept[segment % kWarps], rank) : 0;
    raw += there ? *remote(&sh.raw[segment % kWarps], rank) : 0;
    sum += kept[i];
  }
  const uint64_t running = warp_running(sum);
  uint64_t before = running - sum, start = 0, mine = 0;
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    if (lane * kShare + i == own) {
      start = before;
      mine = kept[i];
    }
    before += kept[i];
  }
  return {__shfl_sync(kFullMask, running, kWarp - 1), warp_total(raw), __shfl_sync(kFullMask, start, own / kShare),
          __shfl_sync(kFullMask, mine, own / kShare)};
}

// Draws from the sums that every CTA left; each warp works out whose segment it is, and that one writes the token.
template <typename T>
__device__ __forceinline__ void finish_draw(const MiiSample& a, const Row<T>& row, Shared& sh, int64_t r, int best_at,
                                            float scale, int threshold) {
  const Sums sums = sums_of(sh);
  if (sums.total == 0) {  // greedy, or no finite logit
    if (cluster_rank() == 0 && threadIdx.x == 0) finish(a, row, r, best_token(row, best_at), sums.raw);
    return;
  }
  const uint64_t point = random_point(sums.total, random62(a.seed[a.slots[r]], a.positions[r]));
  if (!sums.holds(point)) return;
  const int token = draw(row, scale, threshold, point - sums.before);
  if (token >= 0) finish(a, row, r, token, sums.raw);
}

template <typename T>
__device__ __forceinline__ void sample_row(const MiiSample& a, Shared& sh, int64_t r) {
  Row<T> row = make_row<T>(a, r);
  const int best_at = find_best(row, sh), slot = a.slots[r];
  const float temperature = a.temperature[slot];
  const bool greedy = !(temperature > 0.0f);
  if (greedy && a.logprobs == nullptr) {
    if (cluster_rank() == 0 && threadIdx.x == 0) finish(a, row, r, best_token(row, best_at), 0);
  } else {
    const float scale = distance_scale(greedy ? 1.0f : temperature);
    int threshold = greedy ? -1 : kLimit - 1;
    if (!greedy) {
      const int top_k = a.top_k[slot], min_p = min_p_distance(a.min_p[slot]);
      const float top_p = a.top_p[slot];
      if (top_k > 0 && top_k < a.vocab) threshold = select<false>(row, sh, scale, threshold, top_k, 1.0f);
      threshold = min_p < threshold ? min_p : threshold;
      if (top_p < 1.0f) threshold = select<true>(row, sh, scale, threshold, 0, top_p);
    }
    sum_segment(row, sh, scale, threshold, a.logprobs != nullptr);
    cluster_barrier();
    finish_draw(a, row, sh, r, best_at, scale, threshold);
  }
  cluster_barrier();  // the others may still read this CTA's shared memory
}

// Rows of padding are not.
__device__ __forceinline__ bool is_sampled(const MiiSample& a, int64_t r) {
  return (a.counts == nullptr || r < a.counts[MII_NUM_SAMPLES]) && a.slots[r] >= 0;
}

// Grid: one cluster for each row.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) sample_kernel(const __grid_constant__ MiiSample a) {
  __shared__ Shared sh;
  wait_for_previous();
  start_next();
  const int64_t r = blockIdx.x / cluster_size();
  if (is_sampled(a, r)) sample_row<T>(a, sh, r);
}

}  // namespace mii::sampler
