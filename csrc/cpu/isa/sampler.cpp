// The sampler for one instruction set; mii/ops/sampler.py describes the method, csrc/include/mii/sampling.h its
// arithmetic.
//
// A row is handled in blocks of 64 tokens whose best logits are remembered: later passes skip every block that the
// filters have ruled out, so after the first pass over a row most of it is never touched again. Thresholds come from
// histograms of the few distances that can still matter. Few rows share the threads block by block, many rows one row
// each.
#include "mii/abi/sample.h"

#include <math.h>

#include "mii/sampling.h"
#include "simd.h"

namespace mii::cpu::MII_ISA {
namespace {

constexpr int64_t kBlock = 64;
constexpr int64_t kBlockCost = 4 * kBlock;  // in elements touched, as parallel() counts

struct Row {
  const void* logits;
  int64_t vocab, blocks;
  const int32_t* hidden;  // ids that must not be drawn
  int32_t num_hidden;
  float best = -INFINITY;
  int64_t best_id = 0;
  float* block_best;      // [blocks]
  uint64_t* block_sum;    // [blocks]
  int32_t* near;          // [vocab] distances that a selection looks at
  uint64_t* near_weight;  // [vocab]
};

// ---- one block ----------------------------------------------------------------------------------------------------

bool is_hidden(const Row& row, int64_t id) {
  for (int32_t h = 0; h < row.num_hidden; ++h)
    if (row.hidden[h] == id) return true;
  return false;
}

// Logits of a block as floats; hidden ones and those past the vocabulary are -inf.
template <class T>
MII_INLINE void load_block(const Row& row, int64_t block, float (&out)[kBlock]) {
  const T* from = (const T*)row.logits + block * kBlock;
  const int64_t n = row.vocab - block * kBlock;
  if (n >= kBlock) {
    for (int64_t i = 0; i < kBlock; i += W) store(out + i, load(from + i));
  } else {
    for (int64_t i = 0; i < kBlock; ++i) out[i] = i < n ? to_float(from[i]) : -INFINITY;
  }
  for (int32_t h = 0; h < row.num_hidden; ++h) {
    const int64_t i = row.hidden[h] - block * kBlock;
    if (i >= 0 && i < kBlock) out[i] = -INFINITY;
  }
}

// A product whose rounding the compiler must not skip by fusing it with an addition.
MII_INLINE V times(V a, V b) {
  V product = a * b;
#if defined(__AVX512F__)
  __asm__("" : "+v"(product.r));
#elif defined(__x86_64__)
  __asm__("" : "+x"(product.r));
#elif defined(__aarch64__)
  __asm__("" : "+w"(product.r));
#else
  __asm__("" : "+m"(product.r));
#endif
  return product;
}

MII_INLINE void distances(const float (&logits)[kBlock], float best, float scale, int32_t (&out)[kBlock]) {
  float scaled[kBlock];
  for (int64_t i = 0; i < kBlock; i += W)  // min gives its second argument for NaN
    store(scaled + i, min(times(set1(best) - load(logits + i), set1(scale)), set1(static_cast<float>(kLimit))));
  for (int64_t i = 0; i < kBlock; ++i) out[i] = static_cast<int32_t>(scaled[i]);
}

MII_INLINE void weights(const int32_t* distance, int64_t n, uint64_t* out) {
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t count = n - start < kBlock ? n - start : kBlock;
    float p[kBlock] = {};
    for (int64_t i = 0; i < count; ++i) p[i] = static_cast<float>(distance[start + i] & ((1 << kUnitBits) - 1)) * kUnit;
    for (int64_t i = 0; i < kBlock; i += W) {
      const V f = load(p + i);
      V value = times(set1(kC5), f) + set1(kC4);
      value = times(value, f) + set1(kC3);
      value = times(value, f) + set1(kC2);
      value = times(value, f) + set1(kC1);
      value = times(value, f) + set1(1.0f);
      store(p + i, value * set1(1073741824.0f));
    }
    for (int64_t i = 0; i < count; ++i)
      out[start + i] = shifted_weight(static_cast<int32_t>(p[i]), distance[start + i] >> kUnitBits);
  }
}

// Weights of a block, 0 past the threshold; returns their sum.
template <class T>
MII_INLINE uint64_t kept_weights(const Row& row, int64_t block, float scale, int32_t threshold,
                                 uint64_t (&out)[kBlock]) {
  float logits[kBlock];
  int32_t distance[kBlock];
  load_block<T>(row, block, logits);
  distances(logits, row.best, scale, distance);
  weights(distance, kBlock, out);
  uint64_t sum = 0;
  for (int64_t i = 0; i < kBlock; ++i) {
    out[i] = distance[i] <= threshold ? out[i] : 0;
    sum += out[i];
  }
  return sum;
}

// ---- passes over a row --------------------------------------------------------------------------------------------

// Fills block_best, best and best_id (the lowest id of the best logit; of all but hidden ones where every logit is
// -inf).
template <class T>
void find_best(Row& row) {
  parallel(row.blocks, kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      float logits[kBlock];
      load_block<T>(row, b, logits);
      V best = set1(-INFINITY);
      for (int64_t i = 0; i < kBlock; i += W) best = max(load(logits + i), best);  // NaN gives the second
      row.block_best[b] = maximum(best);
    }
  });
  int64_t block = 0;
  for (int64_t b = 1; b < row.blocks; ++b)
    if (row.block_best[b] > row.block_best[block]) block = b;
  row.best = row.block_best[block];
  if (row.best == -INFINITY) {
    while (row.best_id < row.vocab && is_hidden(row, row.best_id)) ++row.best_id;
    if (row.best_id == row.vocab) row.best_id = 0;
    return;
  }
  float logits[kBlock];
  load_block<T>(row, block, logits);
  int64_t i = 0;
  while (logits[i] != row.best) ++i;
  row.best_id = block * kBlock + i;
}

// The smallest distance in a block.
MII_INLINE int32_t block_distance(const Row& row, int64_t block, float scale) {
  const float gap = row.best - row.block_best[block], scaled = gap * scale, limit = static_cast<float>(kLimit);
  return static_cast<int32_t>(scaled < limit ? scaled : limit);
}

// Fills block_sum with the weights up to the threshold and returns their total.
template <class T>
uint64_t sum_kept(const Row& row, float scale, int32_t threshold) {
  parallel(row.blocks, kBlockCost, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      uint64_t weight[kBlock];
      row.block_sum[b] =
          block_distance(row, b, scale) <= threshold ? kept_weights<T>(row, b, scale, threshold, weight) : 0;
    }
  });
  uint64_t total = 0;
  for (int64_t b = 0; b < row.blocks; ++b) total += row.block_sum[b];
  return total;
}

// Collects the distances up to the threshold in `near`; returns how many.
template <class T>
int64_t collect(const Row& row, float scale, int32_t threshold) {
  int64_t count = 0;
  for (int64_t b = 0; b < row.blocks; ++b) {
    if (block_distance(row, b, scale) > threshold) continue;
    float logits[kBlock];
    int32_t distance[kBlock];
    load_block<T>(row, b, logits);
    distances(logits, row.best, scale, distance);
    const int64_t n = row.vocab - b * kBlock < kBlock ? row.vocab - b * kBlock : kBlock;
    for (int64_t i = 0; i < n; ++i) {
      row.near[count] = distance[i];
      count += distance[i] <= threshold;
    }
  }
  return count;
}

// ---- thresholds ---------------------------------------------------------------------------------------------------

// The smallest distance up to which weights (or, where there are none, counts) reach the target; they do reach it.
// Moves what lies in the chosen bin to the front of its arrays, so that only the first digit looks at everything.
int32_t select(int32_t* distance, uint64_t* weight, int64_t n, uint64_t target) {
  constexpr int kShift[] = {18, 9, 0}, kBins[] = {kLimit >> 18, 512, 512};
  uint64_t histogram[kLimit >> 18];
  int32_t prefix = 0;
  for (int level = 0;; ++level) {
    const int shift = kShift[level];
    memset(histogram, 0, sizeof(uint64_t) * kBins[level]);
    for (int64_t i = 0; i < n; ++i) histogram[(distance[i] >> shift) - prefix] += weight == nullptr ? 1 : weight[i];
    int32_t bin = 0;
    while (histogram[bin] < target) target -= histogram[bin++];
    prefix += bin;
    if (level == 2) return prefix;
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      distance[kept] = distance[i];
      if (weight != nullptr) weight[kept] = weight[i];
      kept += distance[i] >> shift == prefix;
    }
    n = kept;
    prefix <<= 9;
  }
}

// The distance of the k-th best token. The k-th best block already bounds it, so few tokens have to be looked at.
template <class T>
int32_t top_k_threshold(const Row& row, float scale, int64_t k) {
  int32_t bound = kLimit - 1;
  int64_t finite = 0;
  for (int64_t b = 0; b < row.blocks; ++b) {
    row.near[finite] = block_distance(row, b, scale);
    finite += row.near[finite] < kLimit;
  }
  if (finite >= k) bound = select(row.near, nullptr, finite, k);
  const int64_t count = collect<T>(row, scale, bound);
  return count > k ? select(row.near, nullptr, count, k) : bound;
}

// The distance up to which the kept tokens reach top_p of their total weight. Tokens so improbable that even a whole
// vocabulary of them could not make the difference are left out.
template <class T>
int32_t top_p_threshold(const Row& row, float scale, int32_t threshold, uint64_t total, float top_p) {
  const uint64_t target = nucleus_weight(total, top_p);
  int64_t octaves = 0;
  while (octaves < 40 && (static_cast<uint64_t>(row.vocab) << (40 - octaves)) > total - target) ++octaves;
  const int32_t bound = static_cast<int32_t>(octaves << kUnitBits) - 1;
  const int64_t count = collect<T>(row, scale, bound < threshold ? bound : threshold);
  weights(row.near, count, row.near_weight);
  return select(row.near, row.near_weight, count, target);
}

// ---- one row ------------------------------------------------------------------------------------------------------

template <class T>
int64_t draw(const Row& row, float scale, int32_t threshold, uint64_t point) {
  int64_t block = 0;
  while (point >= row.block_sum[block]) point -= row.block_sum[block++];
  uint64_t weight[kBlock];
  kept_weights<T>(row, block, scale, threshold, weight);
  int64_t i = 0;
  while (point >= weight[i]) point -= weight[i++];
  return block * kBlock + i;
}

template <class T>
int64_t sample_row(const MiiSample& a, const Row& row, int64_t r) {
  const int32_t slot = a.slots[r], top_k = a.top_k[slot];
  const float temperature = a.temperature[slot], top_p = a.top_p[slot];
  if (!(temperature > 0.0f)) return row.best_id;
  const float scale = distance_scale(temperature);
  int32_t threshold = kLimit - 1;
  if (top_k > 0 && top_k < row.vocab) threshold = top_k_threshold<T>(row, scale, top_k);
  const int32_t min_p = min_p_distance(a.min_p[slot]);
  threshold = min_p < threshold ? min_p : threshold;
  uint64_t total = sum_kept<T>(row, scale, threshold);
  if (total == 0) return row.best_id;  // no finite logit
  if (top_p < 1.0f) {
    const int32_t nucleus = top_p_threshold<T>(row, scale, threshold, total, top_p);
    threshold = nucleus < threshold ? nucleus : threshold;
    total = sum_kept<T>(row, scale, threshold);
  }
  return draw<T>(row, scale, threshold, random_point(total, random62(a.seed[slot], a.positions[r])));
}

template <class T>
float log_probability(const Row& row, int64_t token) {
  if (__builtin_isinf(row.best)) return row.best > 0.0f ? 0.0f : -INFINITY;
  const double total = static_cast<double>(sum_kept<T>(row, distance_scale(1.0f), kLimit - 1));
  const float logit = to_float(((const T*)row.logits)[token]);
  return static_cast<float>(static_cast<double>(logit) - row.best - log(total * 0x1p-40));
}

template <class T>
void run_row(const MiiSample& a, int64_t r) {
  if (a.slots[r] < 0) return;
  Row row = {};
  row.logits = (const T*)a.logits + r * a.logits_stride;
  row.vocab = a.vocab;
  row.blocks = (a.vocab + kBlock - 1) / kBlock;
  row.hidden = a.suppress_ids;
  row.num_hidden = a.suppress != nullptr && a.suppress[r] != 0 ? a.num_suppress : 0;
  uint64_t* memory = (uint64_t*)scratch(12 * (row.blocks + row.vocab));
  row.block_sum = memory;
  row.near_weight = row.block_sum + row.blocks;
  row.near = (int32_t*)(row.near_weight + row.vocab);
  row.block_best = (float*)(row.near + row.vocab);
  find_best<T>(row);
  const int64_t token = sample_row<T>(a, row, r);
  a.tokens[r] = static_cast<int32_t>(token);
  if (a.last_token != nullptr) a.last_token[a.slots[r]] = static_cast<int32_t>(token);
  if (a.logprobs != nullptr) a.logprobs[r] = log_probability<T>(row, token);
}

}  // namespace

int32_t sample_rows(const MiiSample& a, int64_t rows) {
  with_dtype(a.dtype, [&](auto tag) {
    const auto run = [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) run_row<decltype(tag)>(a, r);
    };
    if (2 * rows <= max_threads())
      run(0, rows);  // each row's passes share the threads
    else
      parallel(rows, a.vocab, run);
  });
  return MII_OK;
}

}  // namespace mii::cpu::MII_ISA
