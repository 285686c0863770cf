// The bfloat16 product of many rows with many input features on AMX tiles, blocked as in Goto and van de Geijn (2008):
// x is rearranged once into tiles; then, for a span of output features and a block of input features, the part of x
// stays in the second cache, two panels of weight in the first, and the sums of the span go back and forth as floats.
#include "linear_amx.h"

#if defined(__AMX_BF16__)

namespace mii::cpu::MII_ISA {
namespace {

constexpr int kTile = kTileRows * kTileDepth;
constexpr int64_t kSpan = 32;        // panels of a span: 512 output features
constexpr int64_t kBlockSteps = 12;  // tile depths of a block: 384 input features
constexpr int64_t kMostRows = 512, kLeastRows = 128;
constexpr int64_t kRowsBytes = 4 << 20;  // of rearranged x, which each thread has for itself

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Pass {  // some rows of x against a range of panels
  Job job;
  int64_t steps, block_steps, row_blocks;  // tile depths in all and of a block; blocks of 32 rows
  bf16* x;                                 // [blocks of depth][row block][step][2] tiles
  float* sums;                             // [pair of panels of the span][row block][4] tiles of 16 x 16
};

// One row of 32 input features; what lies past the end is zeros.
MII_INLINE __m512i load_step(const MiiLinear& a, int64_t row, int64_t k) {
  const bf16* from = (const bf16*)a.x + row * a.x_stride + k;
  const int64_t left = a.in_features - k;
  return left >= 32 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16((1u << left) - 1, from);
}

void rearrange(const Pass& p) {
  bf16* to = p.x;
  for (int64_t first = 0; first < p.steps; first += p.block_steps)
    for (int64_t block = 0; block < p.row_blocks; ++block)
      for (int64_t s = first; s < p.steps && s < first + p.block_steps; ++s)
        for (int64_t r = block * 32; r < block * 32 + 32; ++r, to += 32)
          _mm512_store_si512(to,
                             r < p.job.rows ? load_step(p.job.a, p.job.first_row + r, s * 32) : _mm512_setzero_si512());
}

// 32 rows by two panels over `steps` tile depths, added to what `sums` holds unless this is the first block.
template <bool kFirst>
MII_INLINE void add_block(const bf16* x, const bf16* w0, const bf16* w1, int64_t steps, float* sums) {
  if constexpr (kFirst) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    _tile_loadd(2, sums + 512, 64);
    _tile_loadd(3, sums + 768, 64);
  }
  for (int64_t s = 0; s < steps; ++s, x += 2 * kTile, w0 += kTile, w1 += kTile) {
    _tile_stream_loadd(4, x, 64);
    _tile_loadd(6, w0, 64);
    _tile_loadd(7, w1, 64);
    _tile_stream_loadd(5, x + kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
}

void finish_block(const Pass& p, const float* sums, int64_t block, int64_t panel, bool pair) {
  for (int half = 0; half < 2; ++half, sums += 512) {
    const int64_t row = block * 32 + half * kTileRows, left = p.job.rows - row;
    const int rows = static_cast<int>(left < 0 ? 0 : (left < kTileRows ? left : kTileRows));
    pair ? store_sums<2>(p.job, sums, row, rows, panel) : store_sums<1>(p.job, sums, row, rows, panel);
  }
}

// One block of input features, from tile depth `first`, by two panels. A last single panel is multiplied twice.
void add_panels(const Pass& p, const bf16* x, float* sums, int64_t first, int64_t panel, bool pair) {
  const int64_t left = p.steps - first, steps = left < p.block_steps ? left : p.block_steps;
  const bf16 *w0 = p.job.panel(panel) + first * kTile, *w1 = p.job.panel(panel + pair) + first * kTile;
  const int64_t ahead = pair ? 2 * kPanel * p.job.depth : 0;  // the next two panels
  const int64_t lines = steps * 16, share = ceil_div(lines, p.row_blocks);
  for (int64_t block = 0; block < p.row_blocks; ++block, x += steps * 2 * kTile, sums += 1024) {
    for (int64_t line = block * share; line < (block + 1) * share && line < lines; ++line) {
      _mm_prefetch((const char*)(w0 + ahead) + line * 64, _MM_HINT_T1);
      _mm_prefetch((const char*)(w1 + ahead) + line * 64, _MM_HINT_T1);
    }
    first == 0 ? add_block<true>(x, w0, w1, steps, sums) : add_block<false>(x, w0, w1, steps, sums);
    if (first + steps == p.steps) finish_block(p, sums, block, panel, pair);
  }
}

void multiply_pass(const Pass& p, int64_t begin, int64_t end) {
  rearrange(p);
  for (int64_t span = begin; span < end; span += kSpan) {
    const int64_t span_end = span + kSpan < end ? span + kSpan : end;
    const bf16* x = p.x;
    for (int64_t first = 0; first < p.steps; first += p.block_steps) {
      float* sums = p.sums;
      for (int64_t panel = span; panel < span_end; panel += 2, sums += p.row_blocks * 1024)
        add_panels(p, x, sums, first, panel, panel + 1 < span_end);
      x += p.row_blocks * p.block_steps * 2 * kTile;
    }
  }
}

}  // namespace

void linear_amx_blocked(const MiiLinear& a, int64_t begin, int64_t end) {
  const int64_t depth = padded_depth(MII_BF16, a.in_features), steps = depth / kTileDepth;
  int64_t most = kRowsBytes / (2 * depth);
  most = most < kLeastRows ? kLeastRows : (most > kMostRows ? kMostRows : most);
  const int64_t passes = ceil_div(a.rows, most), row_blocks = ceil_div(ceil_div(a.rows, passes), 32),
                rows = row_blocks * 32;
  float* sums = (float*)scratch(rows * (depth * sizeof(bf16) + kSpan * kPanel * sizeof(float)));
  bf16* x = (bf16*)(sums + rows * kSpan * kPanel);
  TileState tiles;
  tiles.set({16, 16, 16, 16, 16, 16, 16, 16});
  for (int64_t first = 0; first < a.rows; first += rows) {
    const int64_t left = a.rows - first, count = left < rows ? left : rows;
    const Job job = {a, nullptr, 0, depth, first, count};
    multiply_pass({job, steps, ceil_div(steps, ceil_div(steps, kBlockSteps)), ceil_div(count, 32), x, sums}, begin,
                  end);
  }
}

}  // namespace mii::cpu::MII_ISA

#endif
