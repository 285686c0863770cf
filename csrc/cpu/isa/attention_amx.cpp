// Attention of prompts in bfloat16 on AMX tiles, with the softmax in float.
//
// A row tile is 16 query tokens of one query head. For each block of 64 keys, K and V are rearranged once for all row
// tiles of the item (the tile unit wants pairs of the summed dimension side by side):
//   K  [head_dim / 32][4 key tiles]  tiles of 16 pairs of dimensions x 16 keys
//   V  [2 halves][head_dim / 16]     tiles of 16 pairs of keys x 16 dimensions, dimensions in the order of `kDimOrder`
// Then, per row tile: scores = Q K^T (16 x 64 floats), softmax along the rows, which leaves the probabilities as bfloat16
// rows, just as the tile unit reads its left operand, and sums += P V. Dimensions are padded with zeros to a multiple of 32.
#include "attention_item.h"

#include "amx.h"

#if defined(__AMX_BF16__)

namespace mii::cpu::MII_ISA {
namespace {

constexpr int kKeys = 64, kRows = 16, kTile = 512;  // a tile of bfloat16: 16 rows of 32 elements

struct Amx {
  const Item<bf16>& item;
  int depth, tiles_per_head, row_tiles;  // depth: head_dim padded
  bf16 *q, *k, *v, *p;                   // q: [row tile][depth / 32] tiles
  float *sums, *scores, *totals, *max;   // sums: [row tile][depth / 16] tiles of 16 x 16; totals: a vector for each row

  explicit Amx(const Item<bf16>& work) : item(work) {
    depth = (item.a.head_dim + 31) / 32 * 32;
    tiles_per_head = (item.tokens + kRows - 1) / kRows;
    row_tiles = tiles_per_head * item.group;
    const int64_t rows = row_tiles * kRows;
    char* next = (char*)scratch(rows * depth * 6 + kKeys * depth * 4 + kRows * kKeys * 6 + rows * 17 * 4 + 64);
    const auto take = [&next](int64_t bytes) {
      char* at = next;
      next += (bytes + 63) / 64 * 64;
      return (void*)at;
    };
    q = (bf16*)take(rows * depth * 2);
    sums = (float*)take(rows * depth * 4);
    k = (bf16*)take(kKeys * depth * 2);
    v = (bf16*)take(kKeys * depth * 2);
    scores = (float*)take(kRows * kKeys * 4);
    p = (bf16*)take(kRows * kKeys * 2);
    totals = (float*)take(rows * kRows * 4);
    max = (float*)take(rows * 4);
  }

  int head(int tile) const { return tile / tiles_per_head; }                  // query head within the group
  int first_token(int tile) const { return tile % tiles_per_head * kRows; }   // within the item
  int tokens(int tile) const {
    const int left = item.tokens - first_token(tile);
    return left < kRows ? left : kRows;
  }
};

// Masked load of up to 32 elements; dimensions at and past head_dim are zeros.
MII_INLINE __m512i load_dims(const bf16* row, int from, int head_dim) {
  const int n = head_dim - from;
  return n >= 32 ? _mm512_loadu_si512(row + from)
                 : _mm512_maskz_loadu_epi16(n > 0 ? static_cast<__mmask32>((1u << n) - 1) : 0u, row + from);
}

void load_queries(const Amx& m) {
  const int steps = m.depth / 32;
  for (int tile = 0; tile < m.row_tiles; ++tile)
    for (int r = 0; r < kRows; ++r) {
      const bool real = r < m.tokens(tile);
      const bf16* from = real ? m.item.q((m.first_token(tile) + r) * m.item.group + m.head(tile)) : nullptr;
      for (int s = 0; s < steps; ++s)
        _mm512_store_si512(m.q + (tile * steps + s) * kTile + r * 32,
                           real ? load_dims(from, s * 32, m.item.a.head_dim) : _mm512_setzero_si512());
    }
  memset(m.sums, 0, sizeof(float) * m.row_tiles * kRows * m.depth);
  memset(m.totals, 0, sizeof(float) * m.row_tiles * kRows * kRows);
  for (int r = 0; r < m.row_tiles * kRows; ++r) m.max[r] = kNone;
}

// ---- K and V for the tile unit ------------------------------------------------------------------------------------

// 16 rows of 16 pairs -> 16 pairs of 16 rows.
MII_INLINE void transpose_16x16(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // r[4g + i]: column i of each 128-bit part, rows 4g .. 4g + 3
    const __m512i a = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), b = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88), d = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    t[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[8 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
    t[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

void pack_keys(const Amx& m, int first, int count) {
  const bf16* cache = (const bf16*)m.item.a.k_cache;
  for (int tile = 0; tile < kKeys / 16; ++tile) {
    const bf16* rows[16];
    for (int i = 0; i < 16; ++i) rows[i] = tile * 16 + i < count ? cache + m.item.offset(first + tile * 16 + i) : nullptr;
    for (int s = 0; s < m.depth / 32; ++s) {
      __m512i r[16];
      for (int i = 0; i < 16; ++i)
        r[i] = rows[i] ? load_dims(rows[i], s * 32, m.item.a.head_dim) : _mm512_setzero_si512();
      transpose_16x16(r);
      bf16* to = m.k + (s * (kKeys / 16) + tile) * kTile;
      for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 32, r[i]);
    }
  }
}

// Interleaving two rows of 32 dimensions within 128-bit parts gives dimensions 0-3, 8-11, 16-19, 24-27 in the low result
// and the others in the high one; this order puts [low | high] back.
alignas(64) constexpr uint16_t kDimOrder[32] = {0,  1,  2,  3,  16, 17, 18, 19, 4,  5,  6,  7,  20, 21, 22, 23,
                                                8,  9,  10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31};

void pack_values(const Amx& m, int first, int count) {
  const bf16* cache = (const bf16*)m.item.a.v_cache;
  for (int pair = 0; pair < kKeys / 2; ++pair) {
    const int key = 2 * pair;
    const bf16* even = key < count ? cache + m.item.offset(first + key) : nullptr;
    const bf16* odd = key + 1 < count ? cache + m.item.offset(first + key + 1) : nullptr;
    bf16* to = m.v + (pair / 16 * (m.depth / 16)) * kTile + pair % 16 * 32;
    for (int s = 0; s < m.depth / 32; ++s, to += 2 * kTile) {
      const __m512i a = even ? load_dims(even, s * 32, m.item.a.head_dim) : _mm512_setzero_si512();
      const __m512i b = odd ? load_dims(odd, s * 32, m.item.a.head_dim) : _mm512_setzero_si512();
      _mm512_store_si512(to, _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(to + kTile, _mm512_unpackhi_epi16(a, b));
    }
  }
}

// ---- one row tile by one block of keys --------------------------------------------------------------------------------

MII_INLINE void score_tile(const Amx& m, int tile) {
  const int steps = m.depth / 32;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int s = 0; s < steps; ++s) {
    const bf16* k = m.k + s * 4 * kTile;
    _tile_loadd(4, m.q + (tile * steps + s) * kTile, 64);
    _tile_loadd(5, k, 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, k + kTile, 64);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(7, k + 2 * kTile, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_loadd(5, k + 3 * kTile, 64);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_stored(0, m.scores, kKeys * 4);
  _tile_stored(1, m.scores + 16, kKeys * 4);
  _tile_stored(2, m.scores + 32, kKeys * 4);
  _tile_stored(3, m.scores + 48, kKeys * 4);
}

// Keys of the block that row `token` of the item sees: [from, to).
struct Seen {
  int from, to;
};
MII_INLINE Seen seen_keys(const Item<bf16>& item, int token, int first, int count) {
  const int position = item.position + token;
  const int from = item.a.window > 0 ? position - item.a.window + 1 - first : 0;
  const int to = position + 1 - first;
  return {from > 0 ? from : 0, to < 0 ? 0 : (to < count ? to : count)};
}

// Soft-cap and alibi, which ask for scaled scores; then the mask. Scores leave in units of log2 e.
MII_INLINE void shape_row(const Amx& m, int tile, int row, int first, Seen seen, __m512 (&s)[4]) {
  const MiiAttention& a = m.item.a;
  const float unit = 1.44269504f;
  if (a.softcap > 0.0f || a.alibi_slopes != nullptr) {
    const float position = static_cast<float>(m.item.position + m.first_token(tile) + row - first);
    const float slope = a.alibi_slopes == nullptr ? 0.0f : a.alibi_slopes[m.item.head * m.item.group + m.head(tile)];
    const __m512 lanes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int i = 0; i < 4; ++i) {
      V x = V{s[i]} * set1(a.scale);
      if (a.softcap > 0.0f) x = tanh(x * set1(1.0f / a.softcap)) * set1(a.softcap);
      const V distance = V{lanes} + set1(static_cast<float>(16 * i) - position);
      s[i] = (fma(distance, set1(slope), x) * set1(unit)).r;
    }
  } else {
    for (int i = 0; i < 4; ++i) s[i] = _mm512_mul_ps(s[i], _mm512_set1_ps(a.scale * unit));
  }
  if (seen.from == 0 && seen.to == kKeys) return;
  const uint64_t below = seen.to >= 64 ? ~uint64_t{0} : (uint64_t{1} << seen.to) - 1;
  const uint64_t bits = seen.from >= 64 ? 0 : below & (~uint64_t{0} << seen.from);
  for (int i = 0; i < 4; ++i)
    s[i] = _mm512_mask_blend_ps(static_cast<__mmask16>(bits >> (16 * i)), _mm512_set1_ps(kNone), s[i]);
}

// 2^x for x <= 0, to 2^-14 (Taylor): the result is rounded to bfloat16.
MII_INLINE __m512 exp2_fast(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-140.0f));
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm512_sub_ps(x, n);
  __m512 y = _mm512_fmadd_ps(_mm512_set1_ps(9.6181291e-3f), f, _mm512_set1_ps(5.5504109e-2f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.4022651e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.9314718e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, n);
}

// Scores -> probabilities against the running maximum. Writes the factor for what was summed before; true if any is not 1.
bool softmax_tile(const Amx& m, int tile, int first, int count, float* factors) {
  bool rescale = false;
  const int rows = m.tokens(tile);
  float* max = m.max + tile * kRows;
  for (int r = 0; r < rows; ++r) {
    __m512 s[4];
    for (int i = 0; i < 4; ++i) s[i] = _mm512_load_ps(m.scores + r * kKeys + 16 * i);
    shape_row(m, tile, r, first, seen_keys(m.item, m.first_token(tile) + r, first, count), s);
    const float block = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(s[0], s[1]), _mm512_max_ps(s[2], s[3])));
    const float before = max[r], now = block > before ? block : before;
    factors[r] = 1.0f;
    if (now != before) {
      max[r] = now;
      factors[r] = before == kNone ? 0.0f : exp2f(before - now);
      rescale = true;
    }
    const __m512 shift = _mm512_set1_ps(now == kNone ? 0.0f : now);
    for (int i = 0; i < 4; ++i) s[i] = exp2_fast(_mm512_sub_ps(s[i], shift));
    float* total = m.totals + (tile * kRows + r) * 16;
    const __m512 sum = _mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3]));
    _mm512_store_ps(total, _mm512_fmadd_ps(_mm512_load_ps(total), _mm512_set1_ps(factors[r]), sum));
    _mm512_store_si512(m.p + r * kKeys, (__m512i)_mm512_cvtne2ps_pbh(s[1], s[0]));
    _mm512_store_si512(m.p + r * kKeys + 32, (__m512i)_mm512_cvtne2ps_pbh(s[3], s[2]));
  }
  return rescale;
}

void rescale_tile(const Amx& m, int tile, const float* factors) {
  float* sums = m.sums + tile * kRows * m.depth;
  for (int c = 0; c < m.depth / 16; ++c)
    for (int r = 0; r < m.tokens(tile); ++r) {
      float* row = sums + c * 256 + r * 16;
      _mm512_store_ps(row, _mm512_mul_ps(_mm512_load_ps(row), _mm512_set1_ps(factors[r])));
    }
}

MII_INLINE void value_tile(const Amx& m, int tile) {
  float* sums = m.sums + tile * kRows * m.depth;
  const int columns = m.depth / 16;
  _tile_loadd(4, m.p, kKeys * 2);
  _tile_loadd(5, m.p + 32, kKeys * 2);
  for (int c = 0; c < columns; c += 2, sums += 512) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    _tile_loadd(6, m.v + c * kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, m.v + (c + 1) * kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(6, m.v + (columns + c) * kTile, 64);
    _tile_dpbf16ps(0, 5, 6);
    _tile_loadd(7, m.v + (columns + c + 1) * kTile, 64);
    _tile_dpbf16ps(1, 5, 7);
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
  }
}

void write_rows(const Amx& m) {
  const __m512i order = _mm512_load_si512(kDimOrder);
  const int head_dim = m.item.a.head_dim;
  for (int tile = 0; tile < m.row_tiles; ++tile)
    for (int r = 0; r < m.tokens(tile); ++r) {
      const float total = _mm512_reduce_add_ps(_mm512_load_ps(m.totals + (tile * kRows + r) * 16));
      const __m512 factor = _mm512_set1_ps(total > 0.0f ? 1.0f / total : 0.0f);
      bf16* out = m.item.out((m.first_token(tile) + r) * m.item.group + m.head(tile));
      const float* sums = m.sums + tile * kRows * m.depth + r * 16;
      for (int d = 0; d < head_dim; d += 32, sums += 512) {
        const __m512 low = _mm512_mul_ps(_mm512_load_ps(sums), factor), high = _mm512_mul_ps(_mm512_load_ps(sums + 256), factor);
        const __m512i row = _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        const int n = head_dim - d;
        if (n >= 32) _mm512_storeu_si512(out + d, row);
        else _mm512_mask_storeu_epi16(out + d, (1u << n) - 1, row);
      }
    }
}

}  // namespace

void attend_amx(const Item<bf16>& item) {
  const Amx m(item);
  TileState tiles;
  tiles.set({16, 16, 16, 16, 16, 16, 16, 16});
  load_queries(m);
  alignas(64) float factors[kRows];
  for (int first = item.key_begin; first < item.key_end; first += kKeys) {
    const int count = item.key_end - first < kKeys ? item.key_end - first : kKeys;
    pack_keys(m, first, count);
    pack_values(m, first, count);
    for (int tile = 0; tile < m.row_tiles; ++tile) {
      const int token = m.first_token(tile);
      const Seen last = seen_keys(item, token + m.tokens(tile) - 1, first, count), top = seen_keys(item, token, first, count);
      if (last.to == 0 || top.from >= count) continue;  // all in the future of the last row, or too old for the first
      score_tile(m, tile);
      if (softmax_tile(m, tile, first, count, factors)) rescale_tile(m, tile, factors);
      value_tile(m, tile);
    }
  }
  write_rows(m);
}

}  // namespace mii::cpu::MII_ISA

#endif
