// Attention in bfloat16 by dot products of pairs (AVX512-BF16): for scores pairs of dimensions, and where rows are many for what
// is made of the values pairs of keys, with probabilities rounded to bfloat16. Processors with AMX have attention_amx.cpp.
#pragma once
#include "attention_block.h"
#include "pairs.h"

namespace mii::cpu::MII_ISA {

template <class T>
struct Pairs {
  MII_INLINE bool serves(const MiiAttention&) { return false; }
  MII_INLINE void score(const Item<T>&, const Buffers&, const KeyBlock<T>&) {}
  MII_INLINE void score_few(const Item<T>&, const Buffers&, const KeyBlock<T>&) {}
  MII_INLINE void add_values(const Item<T>&, const Buffers&, const KeyBlock<T>&, const KeyBlock<T>*) {}
};

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)

template <>
struct Pairs<bf16> {
  static constexpr int kVectors = kKeys / W;  // of a row's scores

  MII_INLINE bool serves(const MiiAttention& a) { return a.head_dim % 32 == 0; }

  // ---- scores
  static void score(const Item<bf16>& item, const Buffers& b, const KeyBlock<bf16>& block) {
    transpose_keys(b, block, item.a.head_dim / 2, [&](int key, int i) { return load_pairs(block.keys[key] + 2 * i); });
    for (int row = 0; row < item.rows; row += kRowGroup) score_rows(item, b, row);
  }
  // Of kRowGroup rows; those past the last one are the last one again.
  static void score_rows(const Item<bf16>& item, const Buffers& b, int row) {
    const Pair* q[kRowGroup];
    for (int r = 0; r < kRowGroup; ++r) q[r] = (const Pair*)item.q(row + r < item.rows ? row + r : item.rows - 1);
    V sums[kRowGroup][kVectors];
    for (int r = 0; r < kRowGroup; ++r)
      for (int v = 0; v < kVectors; ++v) sums[r][v] = set1(0.0f);
    for (int i = 0; i < item.a.head_dim / 2; ++i) {
      V k[kVectors];
      for (int v = 0; v < kVectors; ++v) k[v] = load(b.k + i * kKeys + v * W);
      for (int r = 0; r < kRowGroup; ++r) {
        const V x = spread_pair(q[r][i]);
        for (int v = 0; v < kVectors; ++v) sums[r][v] = add_products(sums[r][v], k[v], x);
      }
    }
    const V scale = set1(item.a.scale);
    for (int r = 0; r < kRowGroup; ++r)
      for (int v = 0; v < kVectors; ++v) store(b.scores + (row + r) * kKeys + v * W, sums[r][v] * scale);
  }

  static void score_few(const Item<bf16>& item, const Buffers& b, const KeyBlock<bf16>& block) {
    const int d = item.a.head_dim;
    const auto query = [&](int row) { return item.q(row); };
    score_few_rows(item.rows, b, block, set1(item.a.scale), query, [&](auto& sums, const bf16* key, const bf16* const* q) {
      for (int i = 0; i < d; i += 32) {
        const V k = load_pairs(key + i);
        for (int r = 0; r < sums.kRows; ++r) sums.row[r] = add_products(sums.row[r], k, load_pairs(q[r] + i));
      }
    });
  }

  // ---- values
  static void add_values(const Item<bf16>& item, const Buffers& b, const KeyBlock<bf16>& block,
                         const KeyBlock<bf16>* next) {
    for (int r = 0; r < item.rows; ++r) round_row(b.scores + r * kKeys, block);
    for (int row = 0; row < item.rows; row += kRowGroup)
      add_values_of<kRowGroup>(item.rows - row < kRowGroup ? item.rows - row : kRowGroup, item.a.head_dim, b, block, row,
                               row == 0 ? next : nullptr);
  }
  // A row's probabilities in bfloat16, at the beginning of their place; keys that are not of the item have none.
  MII_INLINE void round_row(float* scores, const KeyBlock<bf16>& block) {
    bf16* to = (bf16*)scores;
    for (int i = 0; i < kKeys; i += W) store(to + i, load(scores + i));
    for (int i = block.lo / 2 * 2; i < block.lo; ++i) to[i].bits = 0;
    for (int i = block.count; i < (block.count + 1) / 2 * 2; ++i) to[i].bits = 0;
  }
  template <int R>
  MII_INLINE void add_values_of(int rows, int d, const Buffers& b, const KeyBlock<bf16>& block, int row,
                                const KeyBlock<bf16>* next) {
    if (rows < R) {
      if constexpr (R > 1) add_values_of<R - 1>(rows, d, b, block, row, next);
      return;
    }
    int at = 0;
    for (; at + 64 <= d; at += 64, next = nullptr) add_pairs<R, 2>(b, block, row, at, d, next);
    if (at < d) add_pairs<R, 1>(b, block, row, at, d, next);
  }
  // Dimensions at .. at + 32 C of R rows. Meanwhile `next` is fetched.
  template <int R, int C>
  static void add_pairs(const Buffers& b, const KeyBlock<bf16>& block, int row, int at, int d, const KeyBlock<bf16>* next) {
    V sums[R][2 * C];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < 2 * C; ++c) sums[r][c] = load(b.sums + (row + r) * b.width + at + c * W);
    const int first = block.lo / 2, last = (block.count + 1) / 2;
    for (int pair = first; pair < last; ++pair) {
      if (next != nullptr) next->fetch(pair - first, last - first, d * static_cast<int64_t>(sizeof(bf16)));
      const int even = 2 * pair < block.lo ? block.lo : 2 * pair, odd = 2 * pair + 1 < block.count ? 2 * pair + 1 : even;
      V v[2 * C];
      for (int c = 0; c < C; ++c) interleave(block.values[even] + at + 32 * c, block.values[odd] + at + 32 * c, v + 2 * c);
      for (int r = 0; r < R; ++r) {
        const V p = spread_pair(((const Pair*)(b.scores + (row + r) * kKeys))[pair]);
        for (int c = 0; c < 2 * C; ++c) sums[r][c] = add_products(sums[r][c], v[c], p);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < 2 * C; ++c) store(b.sums + (row + r) * b.width + at + c * W, sums[r][c]);
  }
  // The elements of two rows in turn, 32 of each.
  MII_INLINE void interleave(const bf16* even, const bf16* odd, V* to) {
    alignas(64) static constexpr uint16_t kOrder[2][32] = {
        {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62,
         31, 63}};
    const __m512i a = _mm512_loadu_si512(even), c = _mm512_loadu_si512(odd);
    for (int half = 0; half < 2; ++half)
      to[half] = pair_bits(_mm512_permutex2var_epi16(a, _mm512_load_si512(kOrder[half]), c));
  }
};

#endif  // __AVX512BF16__

}  // namespace mii::cpu::MII_ISA
