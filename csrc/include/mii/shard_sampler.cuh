// The sampler where each rank has a part of the vocabulary: its stages, whose contract is in abi/sample.h. All ranks make the
// same decisions from the same exchanged numbers, which are integers, so they come to the same token without saying so.
#pragma once
#include "mii/sampler.cuh"

namespace mii::sampler {

// A distance is looked at in three digits, coarser at first than sampler.cuh's, since every bin is sent.
constexpr int kShardDigits = 3, kShardDigitBits = 10, kShardLeadShift = 20;
constexpr int kShardLeadBins = kLimit >> kShardLeadShift;
static_assert(kShardLeadShift == (kShardDigits - 1) * kShardDigitBits && kShardLeadBins <= kBins);

// What the ranks know of a row so far.
struct ShardState {
  float best;
  int32_t greedy, threshold;
  int32_t prefix;   // digits of the threshold that is being looked for; -1: the tokens do not reach the target
  uint64_t target;  // that the tokens which begin with `prefix` have yet to reach
};
static_assert(sizeof(ShardState) == 24);

__device__ __forceinline__ bool is_histogram(int stage) { return stage >= MII_SHARD_COUNTS && stage < MII_SHARD_KEPT; }
__device__ __forceinline__ bool is_weighted(int stage) { return stage >= MII_SHARD_WEIGHTS; }
__device__ __forceinline__ int digit_of(int stage) { return (stage - MII_SHARD_COUNTS) % kShardDigits; }
__device__ __forceinline__ int bins_of(int digit) { return digit == 0 ? kShardLeadBins : 1 << kShardDigitBits; }

// What a row's request asks for.
struct Wish {
  float scale, top_p;
  int top_k;
  bool greedy;
  __device__ __forceinline__ bool wants(int stage) const { return is_weighted(stage) ? top_p < 1.0f : top_k > 0; }
};

__device__ __forceinline__ Wish wish_of(const MiiSampleShard& a, int slot) {
  const float temperature = a.sample.temperature[slot];
  const int top_k = a.sample.top_k[slot];
  const bool greedy = !(temperature > 0.0f);
  return {distance_scale(greedy ? 1.0f : temperature), a.sample.top_p[slot], top_k < a.whole ? top_k : 0, greedy};
}

// The best logit of all ranks and the lowest id that has it.
__device__ __forceinline__ void merge_best(const MiiSampleShard& a, int64_t i, float& best, int& id) {
  const int32_t* gathered = static_cast<const int32_t*>(a.gathered);
  best = -INFINITY;
  id = static_cast<int>(a.whole);
  for (int s = 0; s < a.size; ++s) {
    const float theirs = __int_as_float(gathered[(2 * s) * a.rows + i]);
    const int where = gathered[(2 * s + 1) * a.rows + i];
    if (theirs > best || (theirs == best && where < id)) {
      best = theirs;
      id = where;
    }
  }
  if (id == a.whole) id = 0;
}

// Takes the next digit of the threshold from the histograms of all ranks.
__device__ __forceinline__ void take_digit(const MiiSampleShard& a, Shared& sh, int64_t i, const Wish& wish,
                                           ShardState& state) {
  const int digit = digit_of(a.takes), bins = bins_of(digit), share = (bins + kThreads - 1) / kThreads;
  const uint64_t* gathered = static_cast<const uint64_t*>(a.gathered) + i * bins;
  const auto amount = [&](int b) {
    uint64_t sum = 0;
    for (int s = 0; s < a.size; ++s) sum += gathered[s * a.rows * bins + b];
    return sum;
  };
  const int first = static_cast<int>(threadIdx.x) * share, last = first + share < bins ? first + share : bins;
  uint64_t sum = 0, total;
  for (int b = first; b < last; ++b) sum += amount(b);
  uint64_t before = block_running(sum, sh.scratch, total) - sum;
  if (is_weighted(a.takes) && digit == 0) state.target = nucleus_weight(total, wish.top_p);
  if (total < state.target) {
    state.prefix = -1;
    return;
  }
  if (before < state.target && state.target <= before + sum) {
    int b = first;
    for (uint64_t next = amount(b); state.target > before + next; next = amount(b)) {
      before += next;
      ++b;
    }
    sh.bin = b;
    sh.before = before;
  }
  __syncthreads();
  state.target -= sh.before;
  state.prefix = (digit == 0 ? 0 : state.prefix << kShardDigitBits) + sh.bin;
  if (digit == kShardDigits - 1 && state.prefix < state.threshold) state.threshold = state.prefix;
}

// What this stage knows of the row before it looks at the logits.
__device__ __forceinline__ ShardState take(const MiiSampleShard& a, Shared& sh, int64_t i, int slot, const Wish& wish) {
  ShardState state;
  if (a.takes == MII_SHARD_BEST) {
    merge_best(a, i, state.best, state.greedy);
    state.threshold = min_p_distance(a.sample.min_p[slot]);
  } else {
    state = static_cast<const ShardState*>(a.state)[i];
  }
  if (is_histogram(a.takes) && wish.wants(a.takes) && state.prefix >= 0) take_digit(a, sh, i, wish, state);
  if (is_histogram(a.gives) && digit_of(a.gives) == 0) {
    state.prefix = 0;
    state.target = wish.top_k;
  }
  return state;
}

template <typename T>
__device__ __forceinline__ void give_best(const MiiSampleShard& a, Row<T>& row, Shared& sh, int64_t i) {
  const int at = find_best(row, sh);
  if (cluster_rank() == 0 && threadIdx.x == 0) {
    int32_t* out = static_cast<int32_t*>(a.out);
    out[i] = __float_as_int(row.best);
    out[a.rows + i] = best_token(row, at, static_cast<int>(a.whole));
  }
}

template <typename T>
__device__ __forceinline__ void give_histogram(const MiiSampleShard& a, const Row<T>& row, Shared& sh, int64_t i,
                                               float scale, const ShardState& state) {
  const int digit = digit_of(a.gives), bins = bins_of(digit);
  const int shift = kShardLeadShift - digit * kShardDigitBits, prefix = state.prefix << kShardDigitBits;
  if (is_weighted(a.gives)) {
    fill_histogram<true>(row, sh, scale, state.threshold, shift, digit == 0 ? 0 : prefix, bins);
  } else {
    fill_histogram<false>(row, sh, scale, state.threshold, shift, digit == 0 ? 0 : prefix, bins);
  }
  cluster_barrier();
  uint64_t* out = static_cast<uint64_t*>(a.out) + i * bins;
  const int size = cluster_size(), slice = bins / size, first = cluster_rank() * slice;
  for (int b = first + static_cast<int>(threadIdx.x); b < first + slice; b += kThreads) {
    uint64_t value = 0;
    for (int q = 0; q < size; ++q) {
      value += static_cast<uint64_t>(*remote(&sh.high[b], q)) << 32 | *remote(&sh.low[b], q);
    }
    out[b] = value;
  }
}

template <typename T>
__device__ __forceinline__ void give_drawn(const MiiSampleShard& a, const Row<T>& row, Shared& sh, int64_t i, int64_t r,
                                           const Wish& wish, const ShardState& state) {
  const uint64_t* gathered = static_cast<const uint64_t*>(a.gathered);
  int32_t* out = static_cast<int32_t*>(a.out) + i;
  uint64_t total = 0, before = 0, mine = 0;
  for (int s = 0; s < a.size && !wish.greedy; ++s) {
    const uint64_t theirs = gathered[s * a.rows + i];
    if (s < a.rank) before += theirs;
    if (s == a.rank) mine = theirs;
    total += theirs;
  }
  const uint64_t point = total == 0 ? 0 : random_point(total, random62(a.sample.seed[a.sample.slots[r]],
                                                                        a.sample.positions[r])) - before;
  if (point >= mine) {  // greedy, no finite logit, or another rank's; a point before this rank's wraps round
    if (cluster_rank() == 0 && threadIdx.x == 0) *out = total == 0 ? state.greedy : -1;
    return;
  }
  sum_segment(row, sh, wish.scale, state.threshold, false);
  cluster_barrier();
  const Sums sums = sums_of(sh);
  if (sums.holds(point)) {
    const int token = draw(row, wish.scale, state.threshold, point - sums.before);
    if (token >= 0) *out = token;
  }
}

template <typename T>
__device__ __forceinline__ void run_stage(const MiiSampleShard& a, Row<T>& row, Shared& sh, int64_t i, int64_t r) {
  const int slot = a.sample.slots[r];
  const Wish wish = wish_of(a, slot);
  const ShardState state = take(a, sh, i, slot, wish);
  row.best = state.best;
  if (a.gives == MII_SHARD_DRAWN) {
    give_drawn(a, row, sh, i, r, wish, state);
  } else if (!wish.greedy && is_histogram(a.gives)) {
    if (wish.wants(a.gives) && state.prefix >= 0) give_histogram(a, row, sh, i, wish.scale, state);
  } else if (!wish.greedy) {
    sum_segment(row, sh, wish.scale, state.threshold, false);
    cluster_barrier();
    const Sums sums = sums_of(sh);
    if (cluster_rank() == 0 && threadIdx.x == 0) static_cast<uint64_t*>(a.out)[i] = sums.total;
  }
  cluster_barrier();  // everybody has read the state before, and the others' shared memory
  if (cluster_rank() == 0 && threadIdx.x == 0) static_cast<ShardState*>(a.state)[i] = state;
}

// Grid: one cluster for each row.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) shard_kernel(const __grid_constant__ MiiSampleShard a) {
  __shared__ Shared sh;
  wait_for_previous();
  start_next();
  const int64_t i = blockIdx.x / cluster_size(), r = a.start + i;
  if (!is_sampled(a.sample, r)) return;
  Row<T> row = make_row<T>(a.sample, r, static_cast<int>(a.first));
  if (a.gives == MII_SHARD_BEST) {
    give_best(a, row, sh, i);
    cluster_barrier();  // the others may still read this CTA's shared memory
  } else {
    run_stage(a, row, sh, i, r);
  }
}

// A thread for each row: the last stage.
__global__ void __launch_bounds__(kWarp) shard_tokens(const __grid_constant__ MiiSampleShard a) {
  wait_for_previous();
  start_next();
  const int64_t i = int64_t(blockIdx.x) * kWarp + threadIdx.x, r = a.start + i;
  if (i >= a.rows || !is_sampled(a.sample, r)) return;
  int token = -1;
  if (a.takes == MII_SHARD_BEST) {
    float best;
    merge_best(a, i, best, token);
  } else {
    const int32_t* gathered = static_cast<const int32_t*>(a.gathered);
    for (int s = 0; s < a.size; ++s) token = gathered[s * a.rows + i] > token ? gathered[s * a.rows + i] : token;
  }
  a.sample.tokens[r] = token;
  if (a.sample.last_token != nullptr) a.sample.last_token[a.sample.slots[r]] = token;
}

}  // namespace mii::sampler
