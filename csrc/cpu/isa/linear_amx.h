// What the bodies of the bfloat16 product on AMX tiles share.
#pragma once
#include "amx.h"
#include "linear.h"

#if defined(__AMX_BF16__)

namespace mii::cpu::MII_ISA {

constexpr int kTileRows = 16, kTileDepth = 32;  // bfloat16 elements; a tile row is 64 bytes

struct Job {
  const MiiLinear& a;
  const bf16* x;  // the rows of this pass, row stride x_stride, readable up to a multiple of kTileDepth
  int64_t x_stride, depth, first_row, rows;

  const bf16* panel(int64_t p) const { return (const bf16*)a.weight + p * kPanel * depth; }
};

// Rounds, adds the bias and stores `rows` rows of sums [16][16] x panels at sums + p * 256.
template <int P>
MII_INLINE void store_sums(const Job& job, const float* sums, int64_t row, int rows, int64_t panel) {
  const int64_t feature = panel * kPanel, left = job.a.out_features - feature;
  const __mmask32 mask = left >= 32 ? 0xffffffffu : (1u << left) - 1;
  __m512 bias[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  if (job.a.bias != nullptr)
    for (int p = 0; p < P; ++p) {
      const int64_t n = left - p * kPanel;
      bias[p] = load_n((const bf16*)job.a.bias + feature + p * kPanel, static_cast<int>(n < kPanel ? n : kPanel)).r;
    }
  bf16* out = (bf16*)job.a.out + (job.first_row + row) * job.a.out_stride + feature;
  for (int r = 0; r < rows; ++r, out += job.a.out_stride) {
    const __m512 low = _mm512_add_ps(_mm512_load_ps(sums + r * kPanel), bias[0]);
    if constexpr (P == 2) {
      const __m512 high = _mm512_add_ps(_mm512_load_ps(sums + 256 + r * kPanel), bias[1]);
      _mm512_mask_storeu_epi16(out, mask, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    } else {
      _mm256_mask_storeu_epi16(out, static_cast<__mmask16>(mask), (__m256i)_mm512_cvtneps_pbh(low));
    }
  }
}

// For x too large for the second cache: panels [begin, end) of all rows.
void linear_amx_blocked(const MiiLinear& a, int64_t begin, int64_t end);

}  // namespace mii::cpu::MII_ISA

#endif
