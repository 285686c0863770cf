// Scores of single tokens in bfloat16 on AMX tiles: the keys are read as they lie in the cache, 16 at a time, as the
// left operand, and the query heads of the group, at most 16, are the columns of the right one.
#pragma once
#include "amx.h"
#include "attention_item.h"

#if defined(__AMX_BF16__)

namespace mii::cpu::MII_ISA {

class DecodeTiles {
 public:
  static bool serves(const MiiAttention& a, int rows) {
    return a.head_dim % 32 == 0 && a.head_dim <= kMaxDepth && rows <= 16;
  }

  explicit DecodeTiles(bool used) : used_(used) {}
  ~DecodeTiles() {
    if (used_) _tile_release();
  }

  // Queries as tiles of 16 pairs of dimensions x 16 rows.
  void load_queries(const Item<bf16>& item) {
    configure_tiles({16, 16, 16, 16, 16, 16, 16, 16});
    for (int s = 0; s < item.a.head_dim / 32; ++s) {
      __m512i rows[16];
      for (int r = 0; r < 16; ++r)
        rows[r] = r < item.rows ? _mm512_loadu_si512(item.q(r) + s * 32) : _mm512_setzero_si512();
      transpose_16x16(rows);
      for (int r = 0; r < 16; ++r) _mm512_store_si512(queries_ + s * 512 + r * 32, rows[r]);
    }
  }

  // Scaled scores of the keys first + [lo, count) to scores[row][64]; what lies beside them is undefined. `first` is a
  // multiple of 16, so a tile of keys never leaves its block of the cache.
  void score(const Item<bf16>& item, int first, int lo, int count, float* scores) {
    const int64_t stride = item.a.head_dim * 2;
    const bf16* keys[4];
    for (int tile = 0; tile < 4; ++tile) {  // tiles without keys repeat one that has some
      const int at = tile * 16 < lo / 16 * 16 ? lo / 16 * 16 : (tile * 16 < count ? tile * 16 : (count - 1) / 16 * 16);
      keys[tile] = (const bf16*)item.a.k_cache + item.offset(first + at);
    }
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int s = 0; s < item.a.head_dim / 32; ++s) {
      _tile_loadd(7, queries_ + s * 512, 64);
      _tile_loadd(4, keys[0] + s * 32, stride);
      _tile_dpbf16ps(0, 4, 7);
      _tile_loadd(5, keys[1] + s * 32, stride);
      _tile_dpbf16ps(1, 5, 7);
      _tile_loadd(6, keys[2] + s * 32, stride);
      _tile_dpbf16ps(2, 6, 7);
      _tile_loadd(4, keys[3] + s * 32, stride);
      _tile_dpbf16ps(3, 4, 7);
    }
    _tile_stored(0, sums_, 64);
    _tile_stored(1, sums_ + 256, 64);
    _tile_stored(2, sums_ + 512, 64);
    _tile_stored(3, sums_ + 768, 64);
    const __m512 scale = _mm512_set1_ps(item.a.scale);
    for (int tile = 0; tile * 16 < count; ++tile) {
      __m512i rows[16];
      for (int i = 0; i < 16; ++i) rows[i] = _mm512_load_si512(sums_ + tile * 256 + i * 16);
      transpose_16x16(rows);
      for (int r = 0; r < item.rows; ++r)
        _mm512_storeu_ps(scores + r * 64 + tile * 16, _mm512_mul_ps(_mm512_castsi512_ps(rows[r]), scale));
    }
  }

 private:
  static constexpr int kMaxDepth = 256;
  bool used_;
  alignas(64) bf16 queries_[kMaxDepth * 16];
  alignas(64) float sums_[4 * 256];
};

}  // namespace mii::cpu::MII_ISA

#endif
