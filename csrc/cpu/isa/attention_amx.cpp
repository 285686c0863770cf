// Attention of prompts in bfloat16 on AMX tiles, with the softmax in float.
//
// A row tile is 16 query tokens of one query head. For each block of 64 keys, K and V are rearranged once for all row
// tiles of the item (the tile unit wants pairs of the summed dimension side by side):
//   K  [head_dim / 32][4 key tiles]  tiles of 16 pairs of dimensions x 16 keys
//   V  [2 halves][head_dim / 16]     tiles of 16 pairs of keys x 16 dimensions, dimensions in the order of `kDimOrder`
// Then, per row tile: scores = Q K^T (16 x 64 floats), softmax along the rows, which leaves the probabilities as
// bfloat16 rows, just as the tile unit reads its left operand, and sums += P V. Dimensions are padded with zeros to a
// multiple of 32.
#include "attention_item.h"

#include "amx.h"

#if defined(__AMX_BF16__)

namespace mii::cpu::MII_ISA {
namespace {

constexpr int kKeys = 64, kRows = 16, kTile = 512;  // a tile of bfloat16: 16 rows of 32 elements
constexpr float kLog2e = 1.44269504f;

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
    char* next = (char*)scratch(rows * depth * 6 + kKeys * depth * 4 + kRows * kKeys * 10 + rows * 17 * 4 + 64);
    const auto take = [&next](int64_t bytes) {
      char* at = next;
      next += (bytes + 63) / 64 * 64;
      return (void*)at;
    };
    q = (bf16*)take(rows * depth * 2);
    sums = (float*)take(rows * depth * 4);
    k = (bf16*)take(kKeys * depth * 2);
    v = (bf16*)take(kKeys * depth * 2);
    scores = (float*)take(2 * kRows * kKeys * 4);
    p = (bf16*)take(kRows * kKeys * 2);
    totals = (float*)take(rows * kRows * 4);
    max = (float*)take(rows * 4);
  }

  int head(int tile) const { return tile / tiles_per_head; }                 // query head within the group
  int first_token(int tile) const { return tile % tiles_per_head * kRows; }  // within the item
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

void pack_keys(const Amx& m, int first, int count) {
  const bf16* cache = (const bf16*)m.item.a.k_cache;
  for (int tile = 0; tile < kKeys / 16; ++tile) {
    const bf16* rows[16];
    for (int i = 0; i < 16; ++i)
      rows[i] = tile * 16 + i < count ? cache + m.item.offset(first + tile * 16 + i) : nullptr;
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

// Interleaving two rows of 32 dimensions within 128-bit parts gives dimensions 0-3, 8-11, 16-19, 24-27 in the low
// result and the others in the high one; this order puts [low | high] back.
alignas(64) constexpr uint16_t kDimOrder[32] = {0, 1, 2,  3,  16, 17, 18, 19, 4,  5,  6,  7,  20, 21, 22, 23,
                                                8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31};

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

// ---- one row tile by one block of keys ------------------------------------------------------------------------------

// Where the scores of a row tile lie: two buffers take turns, so that the next scores are made during a softmax.
MII_INLINE float* scores_of(const Amx& m, int tile) { return m.scores + tile % 2 * kRows * kKeys; }

MII_INLINE void score_tile(const Amx& m, int tile) {
  const int steps = m.depth / 32;
  const bf16 *q = m.q + tile * steps * kTile, *k = m.k;
  float* scores = scores_of(m, tile);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int s = 0; s < steps; ++s, q += kTile, k += 4 * kTile) {
    _tile_loadd(4, q, 64);
    _tile_loadd(5, k, 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, k + kTile, 64);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(7, k + 2 * kTile, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_loadd(5, k + 3 * kTile, 64);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_stored(0, scores, kKeys * 4);
  _tile_stored(1, scores + 16, kKeys * 4);
  _tile_stored(2, scores + 32, kKeys * 4);
  _tile_stored(3, scores + 48, kKeys * 4);
}

// Keys of the block that token `token` of the item sees: [from, to).
struct Seen {
  int from, to;
};
MII_INLINE Seen seen_keys(const Item<bf16>& item, int token, int first, int count) {
  const int position = item.position + token;
  const int from = item.a.window > 0 ? position - item.a.window + 1 - first : 0;
  const int to = position + 1 - first;
  return {from > 0 ? from : 0, to < 0 ? 0 : (to < count ? to : count)};
}

// Soft-cap and alibi of one row of scores: they ask for scaled scores, and leave them in units of log2 e.
void shape_row(const Amx& m, float* scores, int head, float position) {
  const MiiAttention& a = m.item.a;
  const float slope = a.alibi_slopes == nullptr ? 0.0f : a.alibi_slopes[m.item.head * m.item.group + head];
  const V lanes = {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
  for (int i = 0; i < kKeys; i += 16) {
    V x = load(scores + i) * set1(a.scale);
    if (a.softcap > 0.0f) x = tanh(x * set1(1.0f / a.softcap)) * set1(a.softcap);
    const V distance = lanes + set1(static_cast<float>(i) - position);
    store(scores + i, fma(distance, set1(slope), x) * set1(kLog2e));
  }
}

void mask_row(float* scores, Seen seen) {
  const uint64_t below = seen.to >= 64 ? ~uint64_t{0} : (uint64_t{1} << seen.to) - 1;
  const uint64_t bits = seen.from >= 64 ? 0 : below & (~uint64_t{0} << seen.from);
  for (int i = 0; i < kKeys; i += 16)
    _mm512_mask_storeu_ps(scores + i, static_cast<__mmask16>(~(bits >> i)), _mm512_set1_ps(kNone));
}

// What most blocks need not: soft-cap, alibi, and the mask where not every row sees every key of the block.
MII_INLINE void shape_tile(const Amx& m, int tile, int first, int count) {
  const MiiAttention& a = m.item.a;
  const int token = m.first_token(tile), rows = m.tokens(tile);
  float* scores = scores_of(m, tile);
  if (a.softcap > 0.0f || a.alibi_slopes != nullptr)
    for (int r = 0; r < rows; ++r)
      shape_row(m, scores + r * kKeys, m.head(tile), static_cast<float>(m.item.position + token + r - first));
  const bool full =
      seen_keys(m.item, token, first, count).to == kKeys && seen_keys(m.item, token + rows - 1, first, count).from == 0;
  for (int r = 0; r < rows && !full; ++r) mask_row(scores + r * kKeys, seen_keys(m.item, token + r, first, count));
}

// 2^x for x <= 0 to 2^-13 (least maximum error, degree 3): the result is rounded to bfloat16.
MII_INLINE __m512 exp2_fast(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-120.0f));  // masked: a result below the normal numbers would take 100 cycles
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm512_sub_ps(x, n);
  __m512 y = _mm512_fmadd_ps(_mm512_set1_ps(5.517166e-2f), f, _mm512_set1_ps(2.4261112e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.9326099e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.9992807e-1f));
  return _mm512_scalef_ps(y, n);
}

// The maxima of 16 vectors as one vector.
MII_INLINE __m512 maxima(const __m512 (&r)[16]) {
  __m512 a[8], b[4], c[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    a[i] = _mm512_max_ps(_mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]), _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d x = _mm512_castps_pd(a[2 * i]), y = _mm512_castps_pd(a[2 * i + 1]);
    b[i] = _mm512_max_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    c[i] = _mm512_max_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
  return _mm512_max_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
}

void rescale_tile(float* sums, int columns, const float* factors) {
  for (int c = 0; c < columns; ++c)
    for (int r = 0; r < kRows; ++r, sums += 16)
      _mm512_store_ps(sums, _mm512_mul_ps(_mm512_load_ps(sums), _mm512_set1_ps(factors[r])));
}

// Scores -> probabilities against the running maximum, as bfloat16 rows in m.p; what was summed before is rescaled
// where the maximum grew. Rows of padding run along with zeros for scores.
void softmax_tile(const Amx& m, int tile) {
  const float* scores = scores_of(m, tile);
  const bool shaped = m.item.a.softcap > 0.0f || m.item.a.alibi_slopes != nullptr;
  const __m512 unit = _mm512_set1_ps(shaped ? 1.0f : m.item.a.scale * kLog2e);
  float *max = m.max + tile * kRows, *total = m.totals + tile * kRows * 16;
  __m512 tops[16];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const float* s = scores + r * kKeys;
    tops[r] = _mm512_max_ps(_mm512_max_ps(_mm512_load_ps(s), _mm512_load_ps(s + 16)),
                            _mm512_max_ps(_mm512_load_ps(s + 32), _mm512_load_ps(s + 48)));
  }
  const __m512 before = _mm512_load_ps(max), now = _mm512_max_ps(before, _mm512_mul_ps(maxima(tops), unit));
  alignas(64) float shifts[16], factors[16];
  const __mmask16 none = _mm512_cmp_ps_mask(now, _mm512_set1_ps(kNone), _CMP_EQ_OQ);
  _mm512_store_ps(shifts, _mm512_mask_blend_ps(none, now, _mm512_setzero_ps()));
  _mm512_store_ps(max, now);
  if (_mm512_cmp_ps_mask(now, before, _CMP_NEQ_UQ) != 0) {
    // Nothing seen before: -inf - now gives a tiny factor for sums that are zero.
    _mm512_store_ps(factors, exp2_fast(_mm512_sub_ps(before, _mm512_mask_blend_ps(none, now, _mm512_setzero_ps()))));
    rescale_tile(m.sums + tile * kRows * m.depth, m.depth / 16, factors);
    rescale_tile(total, 1, factors);
  }
  bf16* p = m.p;
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r, scores += kKeys, total += 16, p += kKeys) {
    const __m512 shift = _mm512_set1_ps(shifts[r]);
    __m512 s[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) s[i] = exp2_fast(_mm512_fmsub_ps(_mm512_load_ps(scores + 16 * i), unit, shift));
    const __m512 sum = _mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3]));
    _mm512_store_ps(total, _mm512_add_ps(_mm512_load_ps(total), sum));
    _mm512_store_si512(p, (__m512i)_mm512_cvtne2ps_pbh(s[1], s[0]));
    _mm512_store_si512(p + 32, (__m512i)_mm512_cvtne2ps_pbh(s[3], s[2]));
  }
}

// Two columns of 16 dimensions: sums += P V.
MII_INLINE void value_tile(const Amx& m, int tile) {
  const int columns = m.depth / 16;
  float* sums = m.sums + tile * kRows * m.depth;
  const bf16 *v = m.v, *lower = m.v + columns * kTile;
  _tile_loadd(4, m.p, kKeys * 2);
  _tile_loadd(5, m.p + 32, kKeys * 2);
  for (int c = 0; c < columns; c += 2, sums += 512, v += 2 * kTile, lower += 2 * kTile) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(6, v, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(1, sums + 256, 64);
    _tile_loadd(7, v + kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(6, lower, 64);
    _tile_dpbf16ps(0, 5, 6);
    _tile_loadd(7, lower + kTile, 64);
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
        const __m512 low = _mm512_mul_ps(_mm512_load_ps(sums), factor),
                     high = _mm512_mul_ps(_mm512_load_ps(sums + 256), factor);
        const __m512i row = _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        const int n = head_dim - d;
        if (n >= 32) _mm512_storeu_si512(out + d, row);
        else _mm512_mask_storeu_epi16(out + d, (1u << n) - 1, row);
      }
    }
}

// The first row tile from `tile` on that sees a key of the block.
MII_INLINE int next_tile(const Amx& m, int tile, int first, int count) {
  for (; tile < m.row_tiles; ++tile) {
    const int token = m.first_token(tile);
    const bool future = seen_keys(m.item, token + m.tokens(tile) - 1, first, count).to == 0;
    if (!future && seen_keys(m.item, token, first, count).from < count) break;
  }
  return tile;
}

}  // namespace

void attend_amx(const Item<bf16>& item) {
  const Amx m(item);
  TileState tiles;
  tiles.set({16, 16, 16, 16, 16, 16, 16, 16});
  load_queries(m);
  for (int first = item.key_begin; first < item.key_end; first += kKeys) {
    const int count = item.key_end - first < kKeys ? item.key_end - first : kKeys;
    pack_keys(m, first, count);
    pack_values(m, first, count);
    int tile = next_tile(m, 0, first, count);
    if (tile < m.row_tiles) score_tile(m, tile);
    while (tile < m.row_tiles) {
      int next = next_tile(m, tile + 1, first, count);
      if (next < m.row_tiles && next % 2 != tile % 2) score_tile(m, next);  // runs while the softmax does
      shape_tile(m, tile, first, count);
      softmax_tile(m, tile);
      value_tile(m, tile);
      if (next < m.row_tiles && next % 2 == tile % 2) score_tile(m, next);
      tile = next;
    }
  }
  write_rows(m);
}

}  // namespace mii::cpu::MII_ISA

#endif
