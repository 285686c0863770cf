// One float vector per instruction set: V with W lanes (plain 4, AVX2 8, AVX-512 and AMX 16), its loads and stores for
// float32, float16 and bfloat16, and the functions that softmax and activations need. Everything else is written on V
// once.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 says so of its own _mm512_undefined_ps
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "../cpu.h"
#include "../threads.h"

namespace mii::cpu::MII_ISA {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

template <class A, class B>
constexpr bool is_same = false;
template <class A>
constexpr bool is_same<A, A> = true;

#define MII_INLINE static inline __attribute__((always_inline))
#define MII_INLINE_MEMBER inline __attribute__((always_inline))

// ---- scalars ------------------------------------------------------------------------------------------------------

MII_INLINE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

MII_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

MII_INLINE float to_float(float x) { return x; }
MII_INLINE float to_float(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
MII_INLINE float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ff) << 13);
  // An exponent shift by multiplication makes subnormals come out right.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * bits_to_float(0x77800000u)));
}

MII_INLINE void from_float(float& out, float x) { out = x; }
MII_INLINE void from_float(bf16& out, float x) {
  const uint32_t bits = float_to_bits(x);
  out.bits = x != x ? static_cast<uint16_t>(bits >> 16 | 0x40)
                    : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
MII_INLINE void from_float(f16& out, float x) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000u) {
    out.bits = static_cast<uint16_t>(sign | 0x7e00);
    return;
  }
  if (rest >= 0x477ff000u) {
    out.bits = static_cast<uint16_t>(sign | 0x7c00);
    return;
  }
  if (rest < 0x38800000u) {  // subnormal: adding 0.5 aligns the units in the last place, rounding to nearest even
    out.bits = static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u));
    return;
  }
  out.bits = static_cast<uint16_t>(sign | (rest - 0x38000000u + 0xfff + (rest >> 13 & 1)) >> 13);
}

// ---- the vector ---------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)

constexpr int W = 16;
struct V {
  __m512 r;
};

MII_INLINE V set1(float x) { return {_mm512_set1_ps(x)}; }
MII_INLINE V load(const float* p) { return {_mm512_loadu_ps(p)}; }
MII_INLINE V widen(__m256i x, bf16) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))}; }
MII_INLINE V widen(__m256i x, f16) { return {_mm512_cvtph_ps(x)}; }
MII_INLINE __m256i narrow(V x, f16) { return _mm512_cvtps_ph(x.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
MII_INLINE __m256i narrow(V x, bf16) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(x.r);
#else
  const __m512i bits = _mm512_castps_si512(x.r);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.r, x.r, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
#endif
}
template <class T>
MII_INLINE V load(const T* p) {
  return widen(_mm256_loadu_si256((const __m256i*)p), T{});
}
MII_INLINE void store(float* p, V x) { _mm512_storeu_ps(p, x.r); }
template <class T>
MII_INLINE void store(T* p, V x) {
  _mm256_storeu_si256((__m256i*)p, narrow(x, T{}));
}

MII_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
MII_INLINE V load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
template <class T>
MII_INLINE V load_n(const T* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(first(n), p), T{});
}
MII_INLINE void store_n(float* p, V x, int n) { _mm512_mask_storeu_ps(p, first(n), x.r); }
template <class T>
MII_INLINE void store_n(T* p, V x, int n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow(x, T{}));
}

MII_INLINE V operator+(V a, V b) { return {_mm512_add_ps(a.r, b.r)}; }
MII_INLINE V operator-(V a, V b) { return {_mm512_sub_ps(a.r, b.r)}; }
MII_INLINE V operator*(V a, V b) { return {_mm512_mul_ps(a.r, b.r)}; }
MII_INLINE V operator/(V a, V b) { return {_mm512_div_ps(a.r, b.r)}; }
MII_INLINE V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.r, b.r, c.r)}; }
MII_INLINE V min(V a, V b) { return {_mm512_min_ps(a.r, b.r)}; }  // b where either is NaN
MII_INLINE V max(V a, V b) { return {_mm512_max_ps(a.r, b.r)}; }
MII_INLINE V abs(V a) { return {_mm512_abs_ps(a.r)}; }
MII_INLINE V copysign(V magnitude, V sign) {  // 0xd8: b where the mask is 0, else a
  return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(magnitude.r), _mm512_castps_si512(sign.r),
                                                        _mm512_set1_epi32(0x80000000), 0xd8))};
}
MII_INLINE V round(V a) { return {_mm512_roundscale_ps(a.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
MII_INLINE V scale2(V a, V exponent) { return {_mm512_scalef_ps(a.r, exponent.r)}; }
MII_INLINE float sum(V a) { return _mm512_reduce_add_ps(a.r); }
MII_INLINE float maximum(V a) { return _mm512_reduce_max_ps(a.r); }

#elif defined(__AVX2__)

constexpr int W = 8;
struct V {
  __m256 r;
};

MII_INLINE V set1(float x) { return {_mm256_set1_ps(x)}; }
MII_INLINE V load(const float* p) { return {_mm256_loadu_ps(p)}; }
MII_INLINE V widen(__m128i x, bf16) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))}; }
MII_INLINE V widen(__m128i x, f16) { return {_mm256_cvtph_ps(x)}; }
MII_INLINE __m128i narrow(V x, f16) { return _mm256_cvtps_ph(x.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
MII_INLINE __m128i narrow(V x, bf16) {
  const __m256i bits = _mm256_castps_si256(x.r);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 nan = _mm256_cmp_ps(x.r, x.r, _CMP_UNORD_Q);
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan)), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  return _mm256_castsi256_si128(packed);
}
template <class T>
MII_INLINE V load(const T* p) {
  return widen(_mm_loadu_si128((const __m128i*)p), T{});
}
MII_INLINE void store(float* p, V x) { _mm256_storeu_ps(p, x.r); }
template <class T>
MII_INLINE void store(T* p, V x) {
  _mm_storeu_si128((__m128i*)p, narrow(x, T{}));
}

MII_INLINE V operator+(V a, V b) { return {_mm256_add_ps(a.r, b.r)}; }
MII_INLINE V operator-(V a, V b) { return {_mm256_sub_ps(a.r, b.r)}; }
MII_INLINE V operator*(V a, V b) { return {_mm256_mul_ps(a.r, b.r)}; }
MII_INLINE V operator/(V a, V b) { return {_mm256_div_ps(a.r, b.r)}; }
MII_INLINE V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.r, b.r, c.r)}; }
MII_INLINE V min(V a, V b) { return {_mm256_min_ps(a.r, b.r)}; }
MII_INLINE V max(V a, V b) { return {_mm256_max_ps(a.r, b.r)}; }
MII_INLINE V abs(V a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.r)}; }
MII_INLINE V copysign(V magnitude, V sign) {
  const __m256 mask = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(mask, magnitude.r), _mm256_and_ps(mask, sign.r))};
}
MII_INLINE V round(V a) { return {_mm256_round_ps(a.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
MII_INLINE V scale2(V a, V exponent) {  // a * 2^exponent for an integral exponent in [-126, 127]
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(exponent.r), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(a.r, _mm256_castsi256_ps(power))};
}
MII_INLINE float sum(V a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.r), _mm256_extractf128_ps(a.r, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
MII_INLINE float maximum(V a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.r), _mm256_extractf128_ps(a.r, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

#else  // any processor: the compiler's own vectors of four

constexpr int W = 4;
typedef float Lanes __attribute__((vector_size(16)));
typedef int32_t IntLanes __attribute__((vector_size(16)));
typedef uint32_t BitLanes __attribute__((vector_size(16)));
struct V {
  Lanes r;
};

MII_INLINE V set1(float x) { return {Lanes{x, x, x, x}}; }
MII_INLINE V load(const float* p) {
  V x;
  memcpy(&x.r, p, 16);
  return x;
}
template <class T>
MII_INLINE V load(const T* p) {
  return {Lanes{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
MII_INLINE void store(float* p, V x) { memcpy(p, &x.r, 16); }
template <class T>
MII_INLINE void store(T* p, V x) {
  for (int i = 0; i < W; ++i) from_float(p[i], x.r[i]);
}
MII_INLINE V operator+(V a, V b) { return {a.r + b.r}; }
MII_INLINE V operator-(V a, V b) { return {a.r - b.r}; }
MII_INLINE V operator*(V a, V b) { return {a.r * b.r}; }
MII_INLINE V operator/(V a, V b) { return {a.r / b.r}; }
MII_INLINE V fma(V a, V b, V c) { return {a.r * b.r + c.r}; }
MII_INLINE V min(V a, V b) { return {a.r < b.r ? a.r : b.r}; }
MII_INLINE V max(V a, V b) { return {a.r > b.r ? a.r : b.r}; }
MII_INLINE V copysign(V magnitude, V sign) {
  const BitLanes mask = BitLanes{} + 0x80000000u;
  return {(Lanes)(((BitLanes)magnitude.r & ~mask) | ((BitLanes)sign.r & mask))};
}
MII_INLINE V abs(V a) { return copysign(a, set1(0.0f)); }
MII_INLINE V round(V a) {  // adding 1.5 * 2^23 drops the fraction; exact for |a| < 2^22, all that is asked of it here
  return {(a.r + 12582912.0f) - 12582912.0f};
}
MII_INLINE V scale2(V a, V exponent) {
  return {a.r * (Lanes)((__builtin_convertvector(exponent.r, IntLanes) + 127) << 23)};
}
MII_INLINE float sum(V a) { return (a.r[0] + a.r[2]) + (a.r[1] + a.r[3]); }
MII_INLINE float maximum(V a) {
  const float x = a.r[0] > a.r[1] ? a.r[0] : a.r[1], y = a.r[2] > a.r[3] ? a.r[2] : a.r[3];
  return x > y ? x : y;
}

#endif

#if !defined(__AVX512F__)
template <class T>
MII_INLINE V load_n(const T* p, int n) {
  T full[W] = {};
  for (int i = 0; i < n; ++i) full[i] = p[i];
  return load(full);
}
template <class T>
MII_INLINE void store_n(T* p, V x, int n) {
  T full[W];
  store(full, x);
  for (int i = 0; i < n; ++i) p[i] = full[i];
}
#endif

// ---- functions ----------------------------------------------------------------------------------------------------

// The value that a store as T and a load would give.
MII_INLINE V rounded(V x, float) { return x; }
template <class T>
MII_INLINE V rounded(V x, T) {
#if defined(__AVX2__)
  return widen(narrow(x, T{}), T{});
#else
  T lanes[W];
  store(lanes, x);
  return load(lanes);
#endif
}

// e^x by 2^n * p(r), |r| <= ln 2 / 2; relative error about 2^-23; x is clamped to -87.3 .. 88, where float is normal;
// NaN stays.
MII_INLINE V exp(V x) {
  x = min(set1(88.0f), max(set1(-87.33654f), x));
  const V n = round(x * set1(1.44269504f));
  V r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  V p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r + set1(1.0f));
  return scale2(p, n);
}

MII_INLINE V sigmoid(V x) { return set1(1.0f) / (set1(1.0f) + exp(set1(0.0f) - x)); }

// tanh x = 1 - 2 / (e^2x + 1); absolute error below 2e-7.
MII_INLINE V tanh(V x) { return set1(1.0f) - set1(2.0f) / (exp(x + x) + set1(1.0f)); }

// Abramowitz and Stegun 7.1.26; absolute error below 2e-7.
MII_INLINE V erf(V x) {
  const V a = abs(x), t = set1(1.0f) / fma(a, set1(0.3275911f), set1(1.0f));
  V p = set1(1.061405429f);
  p = fma(p, t, set1(-1.453152027f));
  p = fma(p, t, set1(1.421413741f));
  p = fma(p, t, set1(-0.284496736f));
  p = fma(p, t, set1(0.254829592f));
  return copysign(set1(1.0f) - p * t * exp(set1(0.0f) - a * a), x);
}

// a and b hold partial sums of Keys things each, lanes in turn from one to the next; so does what comes back, of both. W vectors
// of a sum's parts become one of W sums by W - 1 of these.
template <int Keys>
MII_INLINE V join_sums(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (Keys == 1) return {_mm512_add_ps(_mm512_unpacklo_ps(a.r, b.r), _mm512_unpackhi_ps(a.r, b.r))};
  if constexpr (Keys == 2) {
    const __m512d c = _mm512_castps_pd(a.r), d = _mm512_castps_pd(b.r);
    return {_mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)))};
  }
  return {_mm512_add_ps(_mm512_shuffle_f32x4(a.r, b.r, 0x88), _mm512_shuffle_f32x4(a.r, b.r, 0xdd))};
#elif defined(__AVX2__)
  if constexpr (Keys == 1) return {_mm256_add_ps(_mm256_unpacklo_ps(a.r, b.r), _mm256_unpackhi_ps(a.r, b.r))};
  if constexpr (Keys == 2) {
    const __m256d c = _mm256_castps_pd(a.r), d = _mm256_castps_pd(b.r);
    return {_mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(c, d)), _mm256_castpd_ps(_mm256_unpackhi_pd(c, d)))};
  }
  return {_mm256_add_ps(_mm256_permute2f128_ps(a.r, b.r, 0x20), _mm256_permute2f128_ps(a.r, b.r, 0x31))};
#else
  if constexpr (Keys == 1)
    return {Lanes{a.r[0] + a.r[2], b.r[0] + b.r[2], a.r[1] + a.r[3], b.r[1] + b.r[3]}};
  return {Lanes{a.r[0] + a.r[2], a.r[1] + a.r[3], b.r[0] + b.r[2], b.r[1] + b.r[3]}};
#endif
}

// Lane i of four vectors, side by side at to + i * stride.
MII_INLINE void store_columns(const V (&x)[4], float* to, int64_t stride) {
#if defined(__AVX512F__)
  const __m512 low[2] = {_mm512_unpacklo_ps(x[0].r, x[1].r), _mm512_unpacklo_ps(x[2].r, x[3].r)};
  const __m512 high[2] = {_mm512_unpackhi_ps(x[0].r, x[1].r), _mm512_unpackhi_ps(x[2].r, x[3].r)};
  const auto join = [](__m512 a, __m512 b, bool second) __attribute__((always_inline)) {
    const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
    return _mm512_castpd_ps(second ? _mm512_unpackhi_pd(c, d) : _mm512_unpacklo_pd(c, d));
  };
  const __m512 of[4] = {join(low[0], low[1], false), join(low[0], low[1], true), join(high[0], high[1], false),
                        join(high[0], high[1], true)};
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {  // of lanes 4 i + j
    _mm_storeu_ps(to + j * stride, _mm512_castps512_ps128(of[j]));
    _mm_storeu_ps(to + (4 + j) * stride, _mm512_extractf32x4_ps(of[j], 1));
    _mm_storeu_ps(to + (8 + j) * stride, _mm512_extractf32x4_ps(of[j], 2));
    _mm_storeu_ps(to + (12 + j) * stride, _mm512_extractf32x4_ps(of[j], 3));
  }
#elif defined(__AVX2__)
  const __m256 low[2] = {_mm256_unpacklo_ps(x[0].r, x[1].r), _mm256_unpacklo_ps(x[2].r, x[3].r)};
  const __m256 high[2] = {_mm256_unpackhi_ps(x[0].r, x[1].r), _mm256_unpackhi_ps(x[2].r, x[3].r)};
  const auto join = [](__m256 a, __m256 b, bool second) __attribute__((always_inline)) {
    const __m256d c = _mm256_castps_pd(a), d = _mm256_castps_pd(b);
    return _mm256_castpd_ps(second ? _mm256_unpackhi_pd(c, d) : _mm256_unpacklo_pd(c, d));
  };
  const __m256 of[4] = {join(low[0], low[1], false), join(low[0], low[1], true), join(high[0], high[1], false),
                        join(high[0], high[1], true)};
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    _mm_storeu_ps(to + j * stride, _mm256_castps256_ps128(of[j]));
    _mm_storeu_ps(to + (4 + j) * stride, _mm256_extractf128_ps(of[j], 1));
  }
#else
  for (int i = 0; i < W; ++i)
    for (int r = 0; r < 4; ++r) to[i * stride + r] = x[r].r[i];
#endif
}

// ---- threads ------------------------------------------------------------------------------------------------------

// Calls body(part) for each part in [0, parts).
template <class Body>
MII_INLINE void each_part(int64_t parts, const Body& body) {
  run_parts(parts, [](void* context, int64_t part) { (*static_cast<const Body*>(context))(part); }, (void*)&body);
}

// Calls body(begin, end) over parts of [0, items); in this thread alone when the work (items * cost, in elements
// touched) would not repay handing it out.
template <class Body>
MII_INLINE void parallel(int64_t items, int64_t cost, const Body& body) {
  constexpr int64_t kAlone = 1 << 13, kPart = 1 << 16;  // a part worth claiming is some ten microseconds of work
  const int64_t work = items * cost, threads = work < kAlone ? 1 : max_threads();
  if (threads <= 1 || items <= 1) {
    if (items > 0) body(int64_t{0}, items);
    return;
  }
  int64_t parts = work / kPart / threads * threads;
  parts = parts < threads ? threads : (parts > 4 * threads ? 4 * threads : parts);
  if (parts > items) parts = items;
  each_part(parts, [&](int64_t part) { body(items * part / parts, items * (part + 1) / parts); });
}

// Runs body(T{}) with the C++ type of a MiiDtype.
template <class Body>
MII_INLINE void with_dtype(int32_t dtype, const Body& body) {
  if (dtype == MII_F32) body(float{});
  else if (dtype == MII_F16) body(f16{});
  else body(bf16{});
}

}  // namespace mii::cpu::MII_ISA
