// The arithmetic of the sampler that the CPU and CUDA bodies share; mii/ops/sampler.py describes the method.
//
// A token's distance X counts how many octaves, in units of 2^-25, it is less probable than the best one; its weight is
// 2^(40 - X / 2^25) as an integer. Every float operation rounds on its own (no fused multiply-add), so that all bodies
// get the same bits; the float part is therefore written once for each kind of vector: below for CUDA, in
// csrc/cpu/isa/sampler.cpp for the CPU.
#pragma once
#include <stdint.h>
#include <string.h>

#include "mii/philox.h"

namespace mii {

constexpr int kUnitBits = 25;                    // of a distance
constexpr int32_t kLimit = 40 << kUnitBits;      // distance from which a weight is 0
constexpr int64_t kMaxVocab = int64_t{1} << 22;  // keeps sums of weights below 2^62
constexpr float kDistanceScale = 48408812.0f;    // 2^25 log2 e
constexpr float kMaxScale = 1e30f;               // a temperature near 0 leaves the best token at distance 0
constexpr float kUnit = 1.0f / (1 << kUnitBits);
// 2^-f on [0, 1] = 1 + f (kC1 + f (kC2 + ...)), relative error 2.5e-7 as evaluated
constexpr float kC1 = -0.6931437253952026f, kC2 = 0.2401801496744156f, kC3 = -0.0552973598241806f,
                kC4 = 0.009205798618495464f, kC5 = -0.0009449038770981133f;

// Distance for each unit of logit.
MII_SHARED float distance_scale(float temperature) {
  const float scale = kDistanceScale / temperature;
  return scale < kMaxScale ? scale : kMaxScale;
}

// The weight from its mantissa 2^30 * 2^-fraction and the distance's whole octaves.
MII_SHARED uint64_t shifted_weight(int32_t mantissa, int32_t octaves) {
  return (static_cast<uint64_t>(static_cast<uint32_t>(mantissa)) << 10) >> octaves;
}

// -log2(min_p) as a distance, rounded up, at most kLimit - 1 (filter off): squaring gives one binary digit after
// another.
MII_SHARED int32_t min_p_distance(float min_p) {
  if (!(min_p > 0x1p-40f)) return kLimit - 1;
  if (min_p >= 1.0f) return 0;
  uint32_t bits;
  memcpy(&bits, &min_p, 4);
  int64_t logarithm = static_cast<int64_t>(bits >> 23) - 127;
  uint64_t value = static_cast<uint64_t>((bits & 0x7fffffu) | 0x800000u) << 7;  // [1, 2) in units of 2^-30
  for (int digit = 0; digit < kUnitBits; ++digit) {
    value = (value * value) >> 30;
    const uint32_t bit = static_cast<uint32_t>(value >> 31);
    value >>= bit;
    logarithm = logarithm * 2 + bit;
  }
  return logarithm > -kLimit ? static_cast<int32_t>(-logarithm) : kLimit - 1;
}

// floor(total * top_p) with top_p cut to 31 bits, at least 1: the weight that a nucleus must reach.
MII_SHARED uint64_t nucleus_weight(uint64_t total, float top_p) {
  const uint64_t share = static_cast<uint64_t>((top_p > 0.0f ? top_p : 0.0f) * 2147483648.0f);
  const uint64_t weight = (total >> 31) * share + (((total & 0x7fffffffu) * share) >> 31);
  return weight > 0 ? weight : 1;
}

// floor(total * random / 2^62), both below 2^62: a uniform point in [0, total).
MII_SHARED uint64_t random_point(uint64_t total, uint64_t random) {
  const uint64_t high = total >> 31, low = total & 0x7fffffffu, r1 = random >> 31, r0 = random & 0x7fffffffu;
  return high * r1 + ((high * r0 + low * r1 + ((low * r0) >> 31)) >> 31);
}

#if defined(__CUDACC__)

// NaN (from NaN, or +inf against a best logit of +inf) gives kLimit: fminf returns its other argument.
__device__ __forceinline__ int32_t distance(float best, float logit, float scale) {
  return __float2int_rz(fminf(__fmul_rn(__fsub_rn(best, logit), scale), static_cast<float>(kLimit)));
}

// For distances below kLimit.
__device__ __forceinline__ uint64_t weight(int32_t distance) {
  const float f = __fmul_rn(__int2float_rn(distance & ((1 << kUnitBits) - 1)), kUnit);
  float p = __fadd_rn(__fmul_rn(kC5, f), kC4);
  p = __fadd_rn(__fmul_rn(p, f), kC3);
  p = __fadd_rn(__fmul_rn(p, f), kC2);
  p = __fadd_rn(__fmul_rn(p, f), kC1);
  p = __fadd_rn(__fmul_rn(p, f), 1.0f);
  return shifted_weight(__float2int_rz(__fmul_rn(p, 1073741824.0f)), distance >> kUnitBits);
}

#endif

}  // namespace mii
