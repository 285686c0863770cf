// Causal attention over the paged cache (see MiiAttention): online softmax over blocks of keys (Milakov and Gimelshein
// 2018, Dao et al. 2022), in float. Query rows are (token, query head of the group), so a block of keys is read once
// for all query heads that share it. The plan cuts a step into items that the threads take in turn; a long decode is
// cut along the keys too and its parts are joined at the end.
#include "attention_block.h"
#include "attention_decode_amx.h"
#include "attention_pairs.h"

namespace mii::cpu::MII_ISA {
namespace {

template <class T>
void load_queries(const Item<T>& item, const Buffers& b) {
  const int d = item.a.head_dim;
  const V scale = set1(item.a.scale);
  for (int r = 0; r < item.rows; ++r) {
    const T* q = item.q(r);
    for (int i = 0; i < d; i += W) store(b.q + r * b.width + i, load_tail(q + i, d - i) * scale);
  }
}

void clear_sums(const Buffers& b, int rows) {
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < b.width; i += W) store(b.sums + r * b.width + i, set1(0.0f));
    b.max[r] = kNone;
    b.total[r] = 0.0f;
  }
}

// ---- scores: few rows, dot products straight from the cache ---------------------------------------------------------

template <class T>
void dot_scores(const Item<T>& item, const Buffers& b, const KeyBlock<T>& block) {
  const int d = item.a.head_dim;
  const auto query = [&](int row) -> const float* { return b.q + row * b.width; };
  score_few_rows(item.rows, b, block, set1(1.0f), query, [&](auto& sums, const T* key, const float* const* q) {
    for (int i = 0; i < d; i += W) {
      const V x = load_tail(key + i, d - i);
      for (int r = 0; r < sums.kRows; ++r) sums.row[r] = fma(x, load(q[r] + i), sums.row[r]);
    }
  });
}

// ---- scores: many rows, keys transposed to [head_dim][kKeys] floats first -------------------------------------------

constexpr int kScoreVectors = W == 16 ? 4 : 2;  // score vectors per row in registers

void block_scores(const Buffers& b, int rows, int d) {
  constexpr int kRows = W == 16 ? kRowGroup : (W == 8 ? 6 : 3);
  for (int row = 0; row < rows; row += kRows)
    for (int key = 0; key < kKeys; key += kScoreVectors * W) {
      V sums[kRows][kScoreVectors];
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kScoreVectors; ++v) sums[r][v] = set1(0.0f);
      for (int i = 0; i < d; ++i) {
        V k[kScoreVectors];
        for (int v = 0; v < kScoreVectors; ++v) k[v] = load(b.k + i * kKeys + key + v * W);
        for (int r = 0; r < kRows; ++r) {
          const V q = set1(b.q[(row + r) * b.width + i]);
          for (int v = 0; v < kScoreVectors; ++v) sums[r][v] = fma(k[v], q, sums[r][v]);
        }
      }
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kScoreVectors; ++v) store(b.scores + (row + r) * kKeys + key + v * W, sums[r][v]);
    }
}

// ---- softmax ------------------------------------------------------------------------------------------------------

// Soft-cap, alibi and the mask of one row; keys first .. first + kKeys, of which [lo, count) belong to the item.
template <class T>
MII_INLINE void shape_scores(const Item<T>& item, float* scores, int row, int first, int lo, int count) {
  const MiiAttention& a = item.a;
  const int position = item.position + row / item.group;
  if (a.softcap > 0.0f)
    for (int i = 0; i < kKeys; i += W)
      store(scores + i, tanh(load(scores + i) * set1(1.0f / a.softcap)) * set1(a.softcap));
  if (a.alibi_slopes != nullptr) {
    const float slope = a.alibi_slopes[item.head * item.group + row % item.group];
    for (int i = lo; i < count; ++i) scores[i] += slope * static_cast<float>(first + i - position);
  }
  const int from = a.window > 0 && position - a.window + 1 > first + lo ? position - a.window + 1 - first : lo;
  const int to = position + 1 - first < count ? position + 1 - first : count;
  for (int i = 0; i < from && i < kKeys; ++i) scores[i] = kNone;
  for (int i = to < 0 ? 0 : to; i < kKeys; ++i) scores[i] = kNone;
}

// scores -> probabilities relative to the running maximum; rescales what was summed before.
void softmax_row(const Buffers& b, int row) {
  float* scores = b.scores + row * kKeys;
  V top = load(scores);
  for (int i = W; i < kKeys; i += W) top = max(top, load(scores + i));
  const float block_max = maximum(top);
  const float before = b.max[row], now = block_max > before ? block_max : before;
  if (now == kNone) {
    for (int i = 0; i < kKeys; i += W) store(scores + i, set1(0.0f));
    return;
  }
  V total = set1(0.0f);
  const V shift = set1(now);
  for (int i = 0; i < kKeys; i += W) {
    // Masked scores give e^-80, which vanishes beside 1; less would make subnormal products, which are slow.
    const V p = exp(max(set1(-80.0f), load(scores + i) - shift));
    total = total + p;
    store(scores + i, p);
  }
  if (now != before) {
    const float factor = before == kNone ? 0.0f : expf(before - now);
    for (int i = 0; i < b.width; i += W)
      store(b.sums + row * b.width + i, load(b.sums + row * b.width + i) * set1(factor));
    b.total[row] *= factor;
    b.max[row] = now;
  }
  b.total[row] += sum(total);
}

// ---- values -------------------------------------------------------------------------------------------------------

// Dimensions at .. at + C * W of R rows; kFull: none of them lies past head_dim. Meanwhile `next` is fetched.
template <class T, int R, int C, bool kFull>
MII_INLINE void add_values(const Buffers& b, const KeyBlock<T>& block, int row, int at, int left,
                           const KeyBlock<T>* next, int64_t bytes) {
  V sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = load(b.sums + (row + r) * b.width + at + c * W);
  const float* scores = b.scores + row * kKeys;
  for (int key = block.lo; key < block.count; ++key) {
    if (next != nullptr) next->fetch(key - block.lo, block.count - block.lo, bytes);
    V v[C];
    for (int c = 0; c < C; ++c)
      v[c] = kFull ? load(block.values[key] + at + c * W) : load_tail(block.values[key] + at + c * W, left - c * W);
    for (int r = 0; r < R; ++r) {
      const V p = set1(scores[r * kKeys + key]);
      for (int c = 0; c < C; ++c) sums[r][c] = fma(p, v[c], sums[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store(b.sums + (row + r) * b.width + at + c * W, sums[r][c]);
}

constexpr int kValueVectors = W == 16 ? 4 : 2;

template <class T, int R>
void add_values_row(const Buffers& b, const KeyBlock<T>& block, int row, int d, const KeyBlock<T>* next) {
  const int64_t bytes = d * static_cast<int64_t>(sizeof(T));
  int at = 0;
  for (; at + kValueVectors * W <= d; at += kValueVectors * W, next = nullptr)
    add_values<T, R, kValueVectors, true>(b, block, row, at, d - at, next, bytes);
  for (; at + W <= d; at += W, next = nullptr) add_values<T, R, 1, true>(b, block, row, at, d - at, next, bytes);
  if (at < d) add_values<T, R, 1, false>(b, block, row, at, d - at, next, bytes);
}

template <class T, int R = kRowGroup>
MII_INLINE void add_values_of(int rows, const Buffers& b, const KeyBlock<T>& block, int row, int d,
                              const KeyBlock<T>* next) {
  if (rows == R) return add_values_row<T, R>(b, block, row, d, next);
  if constexpr (R > 1) add_values_of<T, R - 1>(rows, b, block, row, d, next);
}

// ---- an item ------------------------------------------------------------------------------------------------------

constexpr int kDotRows = 2 * kRowGroup;  // up to so many rows the keys are not worth a transposition

// `next` is what this thread does afterwards, or null: its first keys are fetched during the last block of this item.
template <class T>
void attend(const Item<T>& item, const Buffers& b, const Item<T>* next) {
  const bool many = item.rows > kDotRows, in_pairs = Pairs<T>::serves(item.a);
  if (!in_pairs) load_queries(item, b);
  clear_sums(b, item.rows);
#if defined(__AMX_BF16__)
  const bool tiles = is_same<T, bf16> && DecodeTiles::serves(item.a, item.rows);
  DecodeTiles decode(tiles);
  if constexpr (is_same<T, bf16>)
    if (tiles) decode.load_queries(item);
#endif
  KeyBlock<T> blocks[2];
  blocks[0].find_first(item);
  for (int turn = 0; blocks[turn].first < item.key_end; turn ^= 1) {
    const KeyBlock<T>& block = blocks[turn];
    KeyBlock<T>& following = blocks[turn ^ 1];
    following.find(item, block.first + kKeys);
    const bool last = following.first >= item.key_end;
    KeyBlock<T> other;
    if (last && next != nullptr) other.find_first(*next);
    const KeyBlock<T>* fetched = !last ? &following : (next != nullptr ? &other : nullptr);
    bool scored = false;
#if defined(__AMX_BF16__)
    if constexpr (is_same<T, bf16>)
      if ((scored = tiles)) decode.score(item, block.first, block.lo, block.count, b.scores);
#endif
    if (in_pairs) {
      many ? Pairs<T>::score(item, b, block) : Pairs<T>::score_few(item, b, block);
    } else if (!scored && many) {
      const int d = item.a.head_dim;
      transpose_keys(b, block, d, [&](int key, int i) { return load_tail(block.keys[key] + i, d - i); });
      block_scores(b, item.rows, d);
    } else if (!scored) {
      dot_scores(item, b, block);
    }
    for (int r = 0; r < item.rows; ++r) {
      shape_scores(item, b.scores + r * kKeys, r, block.first, block.lo, block.count);
      softmax_row(b, r);
    }
    if (in_pairs && many) {
      Pairs<T>::add_values(item, b, block, fetched);
      continue;
    }
    for (int row = 0; row < item.rows; row += kRowGroup) {
      const int rows = item.rows - row < kRowGroup ? item.rows - row : kRowGroup;
      add_values_of<T>(rows, b, block, row, item.a.head_dim, row == 0 ? fetched : nullptr);
    }
  }
}

template <class T>
void write_rows(const Item<T>& item, const Buffers& b) {
  const int d = item.a.head_dim;
  for (int r = 0; r < item.rows; ++r) {
    const V factor = set1(b.total[r] > 0.0f ? 1.0f / b.total[r] : 0.0f);
    for (int i = 0; i < d; i += W)
      store_n(item.out(r) + i, load(b.sums + r * b.width + i) * factor, d - i < W ? d - i : W);
  }
}

// A part's row in the workspace: [maximum, total, sums of head_dim].
MII_INLINE float* part_row(const MiiAttention& a, int slot, int row) {
  const int group = a.q_heads / a.kv_heads;
  return (float*)a.workspace + (static_cast<int64_t>(slot) * group + row) * (a.head_dim + 2);
}

template <class T>
void write_part(const Item<T>& item, const Buffers& b) {
  for (int r = 0; r < item.rows; ++r) {
    float* to = part_row(item.a, item.slot + item.part, r);
    to[0] = b.max[r];
    to[1] = b.total[r];
    memcpy(to + 2, b.sums + r * b.width, item.a.head_dim * sizeof(float));
  }
}

template <class T>
void join_parts(const Item<T>& item) {
  const int d = item.a.head_dim;
  for (int r = 0; r < item.rows; ++r) {
    float top = kNone, total = 0.0f, factors[kMaxParts];
    for (int p = 0; p < item.parts; ++p) top = fmaxf(top, part_row(item.a, item.slot + p, r)[0]);
    for (int p = 0; p < item.parts; ++p) {
      const float* part = part_row(item.a, item.slot + p, r);
      factors[p] = part[0] == kNone ? 0.0f : expf(part[0] - top);
      total += factors[p] * part[1];
    }
    for (int i = 0; i < d; i += W) {
      const int n = d - i < W ? d - i : W;
      V sums = set1(0.0f);
      for (int p = 0; p < item.parts; ++p)
        sums = fma(load_n(part_row(item.a, item.slot + p, r) + 2 + i, n), set1(factors[p] / total), sums);
      store_n(item.out(r) + i, sums, n);
    }
  }
}

template <class T>
void run_item(const Item<T>& item, const Item<T>* next) {
#if defined(__AMX_BF16__)
  if constexpr (is_same<T, bf16>)
    if (item.tokens > 1) return attend_amx(item);
#endif
  const Buffers b(item.a.head_dim, item.rows);
  attend(item, b, next);
  item.parts > 1 ? write_part(item, b) : write_rows(item, b);
}

// Items [begin, end) of the list, one after another.
template <class T>
void run_items(const MiiAttention& a, int begin, int end) {
  const WorkItem* items = ((const WorkList*)a.work)->item;
  for (int i = begin; i < end; ++i) {
    const Item<T> item(a, items[i]), next(a, items[i + 1 < end ? i + 1 : i]);
    run_item(item, i + 1 < end ? &next : nullptr);
  }
}

// Decodes are claimed some at a time, so that a thread knows which keys it needs next; prompts one by one.
template <class T>
void run(const MiiAttention& a) {
  const WorkList& list = *(const WorkList*)a.work;
  const auto join = [&](int64_t i) { join_parts<T>(Item<T>(a, list.item[i])); };
  if (list.cost < 1 << 13) {
    run_items<T>(a, 0, list.items);
    for (int i = 0; i < list.joins; ++i) join(i);
    return;
  }
  const int share = list.decodes / (4 * max_threads()), claim = share < 1 ? 1 : (share > 8 ? 8 : share);
  const int claims = (list.decodes + claim - 1) / claim;
  each_part(claims + list.items - list.decodes, [&](int64_t part) {
    const int begin = static_cast<int>(part) * claim, prompt = list.decodes + static_cast<int>(part) - claims;
    if (prompt >= list.decodes) run_items<T>(a, prompt, prompt + 1);
    else run_items<T>(a, begin, begin + claim < list.decodes ? begin + claim : list.decodes);
  });
  if (list.joins > 0) each_part(list.joins, join);
}

}  // namespace

int32_t attention(const MiiAttention& a) {
  with_dtype(a.dtype, [&](auto tag) { run<decltype(tag)>(a); });
  return MII_OK;
}

}  // namespace mii::cpu::MII_ISA
