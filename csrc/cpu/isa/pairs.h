// Pairs of bfloat16 as the lanes of a vector, and their products (AVX512-BF16).
#pragma once
#include "simd.h"

#if defined(__AVX512BF16__)

namespace mii::cpu::MII_ISA {

typedef uint32_t Pair __attribute__((may_alias, aligned(2)));  // two elements of a row

MII_INLINE V pair_bits(__m512i pairs) { return {_mm512_castsi512_ps(pairs)}; }
MII_INLINE V load_pairs(const bf16* x) { return pair_bits(_mm512_loadu_si512(x)); }
MII_INLINE V load_pairs_n(const bf16* x, int n) {  // n elements, up to 32; the others are zeros
  return pair_bits(_mm512_maskz_loadu_epi16(n == 32 ? 0xffffffffu : (1u << n) - 1, x));
}
MII_INLINE V spread_pair(uint32_t pair) { return pair_bits(_mm512_set1_epi32(static_cast<int>(pair))); }
// sum + a0 b0 + a1 b1 in each lane.
MII_INLINE V add_products(V sum, V a, V b) { return {_mm512_dpbf16_ps(sum.r, (__m512bh)a.r, (__m512bh)b.r)}; }

}  // namespace mii::cpu::MII_ISA

#endif  // __AVX512BF16__
