// What the bodies of attention share: an item's buffers, and where a block of its keys lies.
#pragma once
#include "attention_item.h"

namespace mii::cpu::MII_ISA {

constexpr int kKeys = 64;     // keys of a block
constexpr int kRowGroup = 6;  // query rows in registers at once

struct Buffers {  // of one item, in this thread's scratch memory
  float *q, *k, *scores, *sums, *max, *total;
  int64_t width;  // head_dim rounded up to whole vectors

  Buffers(int head_dim, int rows) {
    width = (head_dim + W - 1) / W * W;
    const int64_t padded = (rows + kRowGroup - 1) / kRowGroup * kRowGroup;
    const int64_t floats = padded * (2 * width + kKeys + 2) + head_dim * kKeys + 64;
    q = (float*)scratch(floats * sizeof(float));
    sums = q + padded * width;
    k = sums + padded * width;
    scores = k + head_dim * kKeys;
    max = scores + padded * kKeys;
    total = max + padded;
  }
};

template <class T>
MII_INLINE V load_tail(const T* p, int left) {
  return left >= W ? load(p) : load_n(p, left);
}

// ---- the keys of a block --------------------------------------------------------------------------------------------

// Where the keys first .. first + kKeys lie, of which [lo, count) belong to the item.
template <class T>
struct KeyBlock {
  int first, lo, count;
  const T *keys[kKeys], *values[kKeys];

  void find(const Item<T>& item, int from) {
    first = from;
    lo = item.key_begin > first ? item.key_begin - first : 0;
    count = item.key_end - first < kKeys ? item.key_end - first : kKeys;
    for (int i = lo; i < count; ++i) {
      const int64_t offset = item.offset(first + i);
      keys[i] = (const T*)item.a.k_cache + offset;
      values[i] = (const T*)item.a.v_cache + offset;
    }
  }
  void find_first(const Item<T>& item) { find(item, item.key_begin / 16 * 16); }

  // Has part `part` of `parts` of the keys and values fetched: blocks of the cache lie anywhere, so the processor
  // cannot foresee the next one.
  MII_INLINE_MEMBER void fetch(int part, int parts, int64_t bytes) const {
    for (int i = lo + part; i < count; i += parts)
      for (int64_t at = 0; at < bytes; at += 64) {
        __builtin_prefetch((const char*)keys[i] + at, 0, 2);
        __builtin_prefetch((const char*)values[i] + at, 0, 2);
      }
  }
};

// The keys of a block as columns of b.k, [values][kKeys]; vector(key, i) has values i .. i + W - 1 of a key.
template <class T, class Vector>
MII_INLINE void transpose_keys(const Buffers& b, const KeyBlock<T>& block, int values, const Vector& vector) {
  for (int i = 0; i < values; i += W) {
    const int n = values - i < W ? values - i : W;
    float *to = b.k + i * kKeys, lanes[W];
    int key = block.lo;
    for (; n == W && key + 4 <= block.count; key += 4) {
      const V four[4] = {vector(key, i), vector(key + 1, i), vector(key + 2, i), vector(key + 3, i)};
      store_columns(four, to + key, kKeys);
    }
    for (; key < block.count; ++key) {
      store(lanes, vector(key, i));
      for (int j = 0; j < n; ++j) to[j * kKeys + key] = lanes[j];
    }
    for (int j = 0; j < n; ++j) {
      for (key = 0; key < block.lo; ++key) to[j * kKeys + key] = 0.0f;
      for (key = block.count; key < kKeys; ++key) to[j * kKeys + key] = 0.0f;
    }
  }
}

// ---- scores of a few rows -------------------------------------------------------------------------------------------
// Dot products of W keys at once, added up within their vectors by halves against one another.
constexpr int kFewRows = W == 16 ? 4 : 3;  // in registers at once

template <int R>
struct RowSums {
  static constexpr int kRows = R;
  V row[R];
};

// add(sums, key, q): adds products of a key with R query rows, whose sums over the lanes are the scores.
template <int R, int Keys, class T, class Query, class Add>
MII_INLINE RowSums<R> dot_keys(const T* const* keys, const Query* const* q, const Add& add) {
  RowSums<R> sums;
  if constexpr (Keys == 1) {
    for (int r = 0; r < R; ++r) sums.row[r] = set1(0.0f);
    add(sums, keys[0], q);
  } else {
    const RowSums<R> a = dot_keys<R, Keys / 2>(keys, q, add), b = dot_keys<R, Keys / 2>(keys + Keys / 2, q, add);
    for (int r = 0; r < R; ++r) sums.row[r] = join_sums<Keys / 2>(a.row[r], b.row[r]);
  }
  return sums;
}

template <int R = kFewRows, class T, class Query, class Add>
MII_INLINE void score_few_at(int row, int rows, const Buffers& b, const KeyBlock<T>& block, V scale, const Query& query,
                             const Add& add) {
  if (rows - row < R) {
    if constexpr (R > 1) score_few_at<R - 1>(row, rows, b, block, scale, query, add);
    return;
  }
  decltype(query(0)) q[R];
  for (int r = 0; r < R; ++r) q[r] = query(row + r);
  for (int key = block.lo / W * W; key < block.count; key += W) {
    const T* keys[W];  // those that are not of the item are another one of it, whose scores the mask takes away
    for (int i = 0; i < W; ++i) {
      const int at = key + i < block.lo ? block.lo : key + i;
      keys[i] = block.keys[at < block.count ? at : block.count - 1];
    }
    const RowSums<R> sums = dot_keys<R, W>(keys, q, add);
    for (int r = 0; r < R; ++r) store(b.scores + (row + r) * kKeys + key, sums.row[r] * scale);
  }
}
// query(row): where a row's elements lie.
template <class T, class Query, class Add>
MII_INLINE void score_few_rows(int rows, const Buffers& b, const KeyBlock<T>& block, V scale, const Query& query,
                               const Add& add) {
  for (int row = 0; row < rows; row += kFewRows) score_few_at(row, rows, b, block, scale, query, add);
}

}  // namespace mii::cpu::MII_ISA
