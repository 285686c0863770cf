// What csrc/include/mii/common.cuh needs of CUDA's header: float16 with a sign, 5 and 10 bits, rounded to nearest even.
#pragma once
#include "card.h"

struct __half {
  _Float16 value;
};
struct alignas(4) __half2 {
  __half x, y;
};
inline float __half2float(__half h) { return static_cast<float>(h.value); }
inline __half __float2half_rn(float f) { return {static_cast<_Float16>(f)}; }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
