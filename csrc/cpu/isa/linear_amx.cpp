// The bfloat16 matrix product on AMX tiles (and AVX512-BF16 dot products for a single row).
//
// A tile holds 16 rows of x by 32 input features as they lie in memory, a tile of the packed weight the same 32
// features of 16 output features (1 KiB, contiguous), so nothing is rearranged but the sums. Blocks of 2 x 2 tiles keep
// the tile unit busy with four loads for four products; the two panels of weight stay in the first cache while the rows
// pass by from the second, and the next two panels are fetched meanwhile.
#include "linear_amx.h"

#if defined(__AMX_BF16__)

namespace mii::cpu::MII_ISA {
namespace {

// From here on x no longer fits the second cache beside two panels of weight.
constexpr int64_t kBlockedDepth = 2048, kBlockedElements = 1 << 19;

// Tiles 0..3: sums (2 row tiles x 2 panels), 4 and 5: rows of x, 6 and 7: weights.
struct Tiles {
  TileState state;
  int upper = 0, lower = 0;
  void set(int new_upper, int new_lower) {
    if (new_upper == upper && new_lower == lower) return;
    upper = new_upper, lower = new_lower;
    const int last = lower > 0 ? lower : 1;
    state.set({upper, upper, last, last, upper, last, 16, 16});
  }
};

// 17 to 32 rows by two panels. `next` is fetched meanwhile, 64 bytes at a time, `next_lines` in all.
MII_INLINE void block_2x2(const Job& job, int64_t row, int rows, int64_t panel, const char* next, int next_lines) {
  alignas(64) float sums[4 * 256];
  const bf16 *x0 = job.x + row * job.x_stride, *x1 = x0 + kTileRows * job.x_stride;
  const bf16 *w0 = job.panel(panel), *w1 = job.panel(panel + 1);
  const int64_t stride = job.x_stride * 2;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < job.depth; k += kTileDepth) {
    _tile_stream_loadd(4, x0 + k, stride);
    _tile_loadd(6, w0 + k * kPanel, 64);
    _tile_loadd(7, w1 + k * kPanel, 64);
    _tile_stream_loadd(5, x1 + k, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    for (int line = 0; line < 2 && next_lines > 0; ++line, --next_lines, next += 64) _mm_prefetch(next, _MM_HINT_T1);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
  store_sums<2>(job, sums, row, kTileRows, panel);
  store_sums<2>(job, sums + 512, row + kTileRows, rows - kTileRows, panel);
}

// 17 to 32 rows by one panel.
MII_INLINE void block_2x1(const Job& job, int64_t row, int rows, int64_t panel) {
  alignas(64) float sums[2 * 256];
  const bf16 *x0 = job.x + row * job.x_stride, *x1 = x0 + kTileRows * job.x_stride, *w = job.panel(panel);
  const int64_t stride = job.x_stride * 2;
  _tile_zero(0);
  _tile_zero(2);
  for (int64_t k = 0; k < job.depth; k += kTileDepth) {
    _tile_loadd(4, x0 + k, stride);
    _tile_loadd(5, x1 + k, stride);
    _tile_loadd(6, w + k * kPanel, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(2, sums + 256, 64);
  store_sums<1>(job, sums, row, kTileRows, panel);
  store_sums<1>(job, sums + 256, row + kTileRows, rows - kTileRows, panel);
}

// Up to 16 rows by P panels (1 or 2).
template <int P>
MII_INLINE void block_1(const Job& job, int64_t row, int rows, int64_t panel) {
  alignas(64) float sums[2 * 256];
  const bf16 *x = job.x + row * job.x_stride, *w0 = job.panel(panel), *w1 = job.panel(panel + (P == 2));
  const int64_t stride = job.x_stride * 2;
  _tile_zero(0);
  if constexpr (P == 2) _tile_zero(1);
  for (int64_t k = 0; k < job.depth; k += kTileDepth) {
    _tile_loadd(4, x + k, stride);
    _tile_loadd(6, w0 + k * kPanel, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (P == 2) {
      _tile_loadd(7, w1 + k * kPanel, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
  }
  _tile_stored(0, sums, 64);
  if constexpr (P == 2) _tile_stored(1, sums + 256, 64);
  store_sums<P>(job, sums, row, rows, panel);
}

// All rows of the job by panels [begin, end).
void multiply(const Job& job, int64_t begin, int64_t end) {
  Tiles tiles;
  const int blocks = static_cast<int>((job.rows + 31) / 32);
  const int lines = static_cast<int>(job.depth);  // 64-byte lines of two panels: 2 * 16 * depth * 2 / 64
  const int lines_per_block = (lines + blocks - 1) / blocks;
  int64_t panel = begin;
  for (; panel < end; panel += 2) {
    const bool pair = panel + 1 < end;
    for (int b = 0; b < blocks; ++b) {
      const int64_t row = b * 32;
      const int rows = static_cast<int>(job.rows - row < 32 ? job.rows - row : 32);
      tiles.set(rows < 16 ? rows : 16, rows - 16);
      const int first = b * lines_per_block;
      const int fetch = panel + 3 < end ? (first + lines_per_block < lines ? lines_per_block : lines - first) : 0;
      const char* next = (const char*)job.panel(panel + 2) + first * 64;
      if (rows > 16) pair ? block_2x2(job, row, rows, panel, next, fetch) : block_2x1(job, row, rows, panel);
      else pair ? block_1<2>(job, row, rows, panel) : block_1<1>(job, row, rows, panel);
    }
  }
}

// ---- one row ------------------------------------------------------------------------------------------------------

// One row by P panels: a vector holds 16 output features, an instruction takes two input features. Four panels are four
// streams through memory, which keeps more of it on the way than one; 1 KiB ahead is fetched into the second cache.
template <int P>
MII_INLINE void dot_panels(const Job& job, int64_t panel) {
  constexpr int kChains = 4 / P;
  __m512 sums[P][kChains];
  for (int p = 0; p < P; ++p)
    for (int c = 0; c < kChains; ++c) sums[p][c] = _mm512_setzero_ps();
  const char* w = (const char*)job.panel(panel);
  const int64_t panel_bytes = kPanel * job.depth * 2;
  for (int64_t pair = 0; pair < job.depth / 2; pair += kChains, w += 64 * kChains)
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      int32_t two;
      memcpy(&two, job.x + 2 * (pair + c), 4);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const char* from = w + p * panel_bytes + 64 * c;
        _mm_prefetch(from + 1024, _MM_HINT_T1);
        sums[p][c] = _mm512_dpbf16_ps(sums[p][c], (__m512bh)_mm512_loadu_si512(from), x);
      }
    }
  alignas(64) float total[16];
  for (int p = 0; p < P; ++p) {
    for (int c = 1; c < kChains; ++c) sums[p][0] = _mm512_add_ps(sums[p][0], sums[p][c]);
    _mm512_store_ps(total, sums[p][0]);
    store_sums<1>(job, total, 0, 1, panel + p);
  }
}

void multiply_row(const Job& job, int64_t begin, int64_t end) {
  int64_t panel = begin;
  for (; panel + 4 <= end; panel += 4) dot_panels<4>(job, panel);
  for (; panel < end; ++panel) dot_panels<1>(job, panel);
}

// x copied to a multiple of kTileDepth, padding zeros.
const bf16* padded_rows(const MiiLinear& a, int64_t depth) {
  bf16* copy = (bf16*)scratch(a.rows * depth * sizeof(bf16));
  for (int64_t r = 0; r < a.rows; ++r) {
    memcpy((void*)(copy + r * depth), (const bf16*)a.x + r * a.x_stride, a.in_features * sizeof(bf16));
    memset((void*)(copy + r * depth + a.in_features), 0, (depth - a.in_features) * sizeof(bf16));
  }
  return copy;
}

}  // namespace

void linear_panels_amx(const MiiLinear& a, int64_t begin, int64_t end) {
  const int64_t depth = padded_depth(MII_BF16, a.in_features);
  if (a.rows > 64 && depth >= kBlockedDepth && a.rows * depth >= kBlockedElements)
    return linear_amx_blocked(a, begin, end);
  Job job = {a, (const bf16*)a.x, a.x_stride, depth, 0, a.rows};
  if (depth != a.in_features) job.x = padded_rows(a, depth), job.x_stride = depth;
  a.rows == 1 ? multiply_row(job, begin, end) : multiply(job, begin, end);
}

}  // namespace mii::cpu::MII_ISA

#endif
