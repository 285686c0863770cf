// out = x @ weight^T + bias for packed weights.
//
// Layout (every instruction set shares it): panels of 16 output features. Within a panel
//   float32, float16   [in_features][16]                            one input feature after the other
//   bfloat16           [in_features / 2][16][2], padded to 32       pairs of input features side by side
// Padding (features past the end, input features past the end) is zeros. So a matrix-vector product streams the weight
// once from front to back with no horizontal sums, and a bfloat16 panel is a column of AMX tiles as it stands.
#include "linear.h"
#include "pairs.h"

namespace mii::cpu::MII_ISA {
namespace {

// ---- packing ------------------------------------------------------------------------------------------------------

template <class T>
void pack_panel(const MiiLinearPack& a, int64_t panel) {
  const int64_t depth = padded_depth(a.dtype, a.in_features);
  constexpr bool kPairs = is_same<T, bf16>;
  T* to = (T*)a.packed + panel * kPanel * depth;
  memset((void*)to, 0, kPanel * depth * sizeof(T));
  const int64_t first = panel * kPanel, count = a.out_features - first < kPanel ? a.out_features - first : kPanel;
  for (int64_t k0 = 0; k0 < a.in_features; k0 += 64) {  // by blocks, so that what is written stays in the first cache
    const int64_t k1 = k0 + 64 < a.in_features ? k0 + 64 : a.in_features;
    for (int64_t n = 0; n < count; ++n) {
      const T* from = (const T*)a.weight + (first + n) * a.weight_stride;
      for (int64_t k = k0; k < k1; ++k) to[kPairs ? (k / 2 * kPanel + n) * 2 + k % 2 : k * kPanel + n] = from[k];
    }
  }
}

// ---- the product: R rows of x by P panels, sums in registers --------------------------------------------------------

constexpr int kVectors = kPanel / W;
constexpr int kRowBlock = W == 16 ? 12 : (W == 8 ? 4 : 2);
constexpr int kRowChunk = 96;
constexpr int kFewRows = 8;  // of which weights are asked for a little ahead

// One step of the packed weight: kVectors vectors for each Value, which is what a row of x has to be multiplied with at once.
template <class T>
struct Step {  // float32, float16: one input feature
  using Value = float;
  static constexpr int kFeatures = 1, kValues = 1;
  MII_INLINE V load_part(const T* w, int v, int) { return load(w + v * W); }
  MII_INLINE V load_values(const T* x, int n) { return n == W ? load(x) : load_n(x, n); }
  MII_INLINE V spread(Value x) { return set1(x); }
  MII_INLINE V multiply(V weights, V value, V sum) { return fma(weights, value, sum); }
};
#if defined(__AVX512BF16__)
template <>
struct Step<bf16> {  // a pair of input features: the sum of two products is one instruction
  using Value = Pair;
  static constexpr int kFeatures = 2, kValues = 1;
  MII_INLINE V load_part(const bf16* w, int v, int) { return load_pairs(w + v * 2 * W); }
  MII_INLINE V load_values(const bf16* x, int n) { return load_pairs_n(x, n); }
  MII_INLINE V spread(Value x) { return spread_pair(x); }
  MII_INLINE V multiply(V weights, V value, V sum) { return add_products(sum, weights, value); }
};
#else
template <>
struct Step<bf16> {  // two input features, interleaved
  using Value = float;
  static constexpr int kFeatures = 2, kValues = 2;
  MII_INLINE V load_values(const bf16* x, int n) { return n == W ? load(x) : load_n(x, n); }
  MII_INLINE V spread(Value x) { return set1(x); }
  MII_INLINE V multiply(V weights, V value, V sum) { return fma(weights, value, sum); }
  MII_INLINE V load_part(const bf16* w, int v, int feature) {
#if defined(__AVX512F__)
    const __m512i pair = _mm512_loadu_si512(w + v * 2 * W);
    return {_mm512_castsi512_ps(feature ? _mm512_and_si512(pair, _mm512_set1_epi32(0xffff0000))
                                        : _mm512_slli_epi32(pair, 16))};
#elif defined(__AVX2__)
    const __m256i pair = _mm256_loadu_si256((const __m256i*)(w + v * 2 * W));
    return {_mm256_castsi256_ps(feature ? _mm256_and_si256(pair, _mm256_set1_epi32(0xffff0000))
                                        : _mm256_slli_epi32(pair, 16))};
#else
    BitLanes pair;
    memcpy(&pair, w + v * 2 * W, 16);
    return {(Lanes)(feature ? pair & 0xffff0000u : pair << 16)};
#endif
  }
};
#endif
template <class T>
using Value = typename Step<T>::Value;

template <class T>
MII_INLINE void finish(const MiiLinear& a, int64_t row, int64_t feature, V x) {
  const int64_t left = a.out_features - feature;
  if (left <= 0) return;
  const int n = static_cast<int>(left < W ? left : W);
  if (a.bias != nullptr) x = x + load_n((const T*)a.bias + feature, n);
  T* out = (T*)a.out + row * a.out_stride + feature;
  n == W ? store(out, x) : store_n(out, x, n);
}

// Steps [steps.begin, steps.end) of R rows by P panels. x: copy of the rows, [values][R]. What a range of steps leaves for the
// next one goes through `carry`, [R][P * kPanel].
struct Steps {
  int64_t begin, end, all;
  int64_t ahead;  // how many bytes before they are needed weights are fetched, which come from memory; 0: they are not
};

template <class T, int R, int P>
void block(const MiiLinear& a, const Value<T>* x, Steps steps, float* carry, int64_t row, int64_t panel) {
  using S = Step<T>;
  constexpr int kUnroll = R * P * kVectors <= 4 ? 2 : 1;  // too few sums to hide the latency of an addition
  constexpr int kStepSize = kPanel * S::kFeatures;
  V sums[kUnroll][R][P][kVectors];
  for (int u = 0; u < kUnroll; ++u)
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < P; ++p)
        for (int v = 0; v < kVectors; ++v)
          sums[u][r][p][v] = u == 0 && steps.begin > 0 ? load(carry + (r * P + p) * kPanel + v * W) : set1(0.0f);
  const T* w = (const T*)a.weight + panel * kStepSize * steps.all;
  const int64_t panel_size = kStepSize * steps.all, ahead = steps.ahead;
  const auto step = [&](int64_t s, int u) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int f = 0; f < S::kValues; ++f) {
      if (ahead > 0 && f == 0)
        for (int p = 0; p < P; ++p)
          __builtin_prefetch((const char*)(w + p * panel_size + s * kStepSize) + ahead, 0, 2);
      V weights[P][kVectors];
      for (int p = 0; p < P; ++p)
        for (int v = 0; v < kVectors; ++v) weights[p][v] = S::load_part(w + p * panel_size + s * kStepSize, v, f);
      const Value<T>* values = x + (s * S::kValues + f) * R;
      for (int r = 0; r < R; ++r) {
        const V value = S::spread(values[r]);
        for (int p = 0; p < P; ++p)
          for (int v = 0; v < kVectors; ++v) sums[u][r][p][v] = S::multiply(weights[p][v], value, sums[u][r][p][v]);
      }
    }
  };
  int64_t s = steps.begin;
  for (; s + kUnroll <= steps.end; s += kUnroll) {
    step(s, 0);
    if constexpr (kUnroll == 2) step(s + 1, 1);
  }
  for (; s < steps.end; ++s) step(s, 0);
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p)
      for (int v = 0; v < kVectors; ++v) {
        V total = sums[0][r][p][v];
        if constexpr (kUnroll == 2) total = total + sums[1][r][p][v];
        if (steps.end < steps.all) store(carry + (r * P + p) * kPanel + v * W, total);
        else finish<T>(a, row + r, (panel + p) * kPanel + v * W, total);
      }
}

template <class T, int P, int R = kRowBlock>
MII_INLINE void block_of(int64_t rows, const MiiLinear& a, const Value<T>* x, Steps steps, float* carry, int64_t row,
                         int64_t panel) {
  if (rows == R) return block<T, R, P>(a, x, steps, carry, row, panel);
  if constexpr (R > 1) block_of<T, P, R - 1>(rows, a, x, steps, carry, row, panel);
}

template <class T>
struct Chunk {        // rows whose copy stays in the second cache while the weight passes by
  const Value<T>* x;  // blocks of rows one after another, each [values][rows of the block]
  float* carry;       // [rows][panels at once][kPanel]
  int64_t first, rows, block_rows, steps;

  int64_t values() const { return steps * Step<T>::kValues; }  // of a row
};

// P panels by all rows of a chunk. With more than one block of rows the features go in ranges whose weights stay in the
// first cache.
template <class T, int P>
void multiply(const MiiLinear& a, const Chunk<T>& c, int64_t panel) {
  constexpr int64_t kStepBytes = kPanel * Step<T>::kFeatures * static_cast<int64_t>(sizeof(T));
  constexpr int64_t kCached = (24 << 10) / (P * kStepBytes);
  Steps steps = {0, 0, c.steps, 0};
  const int64_t range = c.rows > c.block_rows ? kCached : steps.all;
  for (; steps.end < steps.all; steps.begin = steps.end) {
    steps.end = steps.all - steps.begin < range + range / 2 ? steps.all : steps.begin + range;
    for (int64_t r = 0; r < c.rows; r += c.block_rows) {
      const int64_t rows = c.rows - r < c.block_rows ? c.rows - r : c.block_rows;
      // A few rows wait for memory. The last ones of more take the weights of a range from the cache, and have time to ask for
      // those of the next one, which may be that of the next panels.
      const bool only = c.rows <= c.block_rows, last = r + c.block_rows >= c.rows;
      const int64_t to_next = steps.end < steps.all ? range : P * steps.all - steps.begin;
      steps.ahead = only ? (rows <= kFewRows ? 1024 : 0) : (last ? to_next * kStepBytes : 0);
      block_of<T, P>(rows, a, c.x + r * c.values(), steps, c.carry + r * P * kPanel, c.first + r, panel);
    }
  }
}

// The copy of `rows` rows: [values][rows]; padding of the depth is zeros.
template <class T>
void copy_rows(const MiiLinear& a, int64_t first, int64_t rows, int64_t values, Value<T>* x) {
  using S = Step<T>;
  constexpr int64_t kFeatures = W * S::kFeatures / S::kValues;  // of a vector of values
  float* to = (float*)x;
  for (int64_t i = 0; i < values; i += W, to += W * rows) {
    const int64_t k = i / W * kFeatures, left = a.in_features - k;
    const int n = static_cast<int>(left <= 0 ? 0 : (left < kFeatures ? left : kFeatures));
    const int stored = static_cast<int>(values - i < W ? values - i : W);
    const auto vector = [&](int64_t r) __attribute__((always_inline)) {
      return S::load_values((const T*)a.x + (first + r) * a.x_stride + k, n);
    };
    if (rows == 1) {
      store_n(to, vector(0), stored);
      continue;
    }
    int64_t r = 0;
    for (; stored == W && r + 4 <= rows; r += 4) {
      const V four[4] = {vector(r), vector(r + 1), vector(r + 2), vector(r + 3)};
      store_columns(four, to + r, rows);
    }
    for (; r < rows; ++r) {
      float lanes[W];
      store(lanes, vector(r));
      for (int l = 0; l < stored; ++l) to[l * rows + r] = lanes[l];
    }
  }
}

template <class T>
void panels(const MiiLinear& a, int64_t begin, int64_t end) {
  constexpr int kPair = W == 16 ? 2 : 1;
  static_assert(sizeof(Value<T>) == sizeof(float));
  const int64_t depth = padded_depth(a.dtype, a.in_features);
  Chunk<T> c = {nullptr, nullptr, 0, 0, 0, depth / Step<T>::kFeatures};
  auto* x = (Value<T>*)scratch(kRowChunk * (c.values() + kPair * kPanel) * sizeof(float));
  c.x = x;
  c.carry = (float*)(x + kRowChunk * c.values());
  for (; c.first < a.rows; c.first += kRowChunk) {
    c.rows = a.rows - c.first < kRowChunk ? a.rows - c.first : kRowChunk;
    const int64_t blocks = (c.rows + kRowBlock - 1) / kRowBlock;
    c.block_rows = (c.rows + blocks - 1) / blocks;
    for (int64_t r = 0; r < c.rows; r += c.block_rows)
      copy_rows<T>(a, c.first + r, c.rows - r < c.block_rows ? c.rows - r : c.block_rows, c.values(), x + r * c.values());
    int64_t panel = begin;
    for (; panel + kPair <= end; panel += kPair) multiply<T, kPair>(a, c, panel);
    for (; panel < end; ++panel) multiply<T, 1>(a, c, panel);
  }
}

// Whether a part of the product begins with a copy of the rows; tiles read them as they are.
bool copies_rows(int32_t dtype) {
#if defined(__AMX_BF16__)
  return dtype != MII_BF16;
#else
  (void)dtype;
  return true;
#endif
}

// The product of several chunks of rows. A part is a chunk by a span of the panels, of which there are as many as keep the
// threads busy: each part copies its chunk. Parts of the same panels follow one another, so that these are in a cache.
void linear_of_chunks(const MiiLinear& a, int64_t count, int64_t pairs) {
  const int64_t chunks = (a.rows + kRowChunk - 1) / kRowChunk, threads = max_threads();
  const int64_t wanted = threads > 1 ? (4 * threads + chunks - 1) / chunks : 1, spans = wanted < pairs ? wanted : pairs;
  each_part(spans * chunks, [&](int64_t part) {
    const int64_t span = part / chunks, chunk = part % chunks, first = a.rows * chunk / chunks;
    const int64_t begin = 2 * (pairs * span / spans), end = 2 * (pairs * (span + 1) / spans), size = item_size(a.dtype);
    MiiLinear rows = a;
    rows.rows = a.rows * (chunk + 1) / chunks - first;
    rows.x = (const char*)a.x + first * a.x_stride * size;
    rows.out = (char*)a.out + first * a.out_stride * size;
    linear_panels(rows, begin, end < count ? end : count);
  });
}

}  // namespace

int64_t linear_packed_bytes(const MiiLinearPack& a) {
  return panel_count(a.out_features) * kPanel * padded_depth(a.dtype, a.in_features) * item_size(a.dtype);
}

int32_t linear_pack(const MiiLinearPack& a) {
  with_dtype(a.dtype, [&](auto tag) {
    parallel(panel_count(a.out_features), kPanel * a.in_features, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) pack_panel<decltype(tag)>(a, panel);
    });
  });
  return MII_OK;
}

void linear_panels(const MiiLinear& a, int64_t begin, int64_t end) {
#if defined(__AMX_BF16__)
  if (!copies_rows(a.dtype)) return linear_panels_amx(a, begin, end);
#endif
  with_dtype(a.dtype, [&](auto tag) { panels<decltype(tag)>(a, begin, end); });
}

int32_t linear(const MiiLinear& a) {
  if (a.rows <= 0) return MII_OK;
  // in pairs of panels, which is what the tiles take at once
  const int64_t count = panel_count(a.out_features), pairs = (count + 1) / 2;
  if (copies_rows(a.dtype) && a.rows > kRowChunk) {
    linear_of_chunks(a, count, pairs);
    return MII_OK;
  }
  parallel(pairs, 2 * a.rows * a.in_features * kPanel,
           [&](int64_t begin, int64_t end) { linear_panels(a, 2 * begin, 2 * end < count ? 2 * end : count); });
  return MII_OK;
}

}  // namespace mii::cpu::MII_ISA
