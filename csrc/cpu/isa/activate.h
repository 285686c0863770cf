// The activations on vectors: equations in mii/ops/activation.py.
#pragma once
#include "mii/abi/activation.h"
#include "simd.h"

namespace mii::cpu::MII_ISA {

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

template <int kKind>
MII_INLINE V activate(V x, float limit) {
  if constexpr (kKind == MII_SOFTCAP) return set1(limit) * tanh(x / set1(limit));
  const V half = set1(0.5f), one = set1(1.0f);
  if constexpr (kKind == MII_SILU) return x * sigmoid(x);
  if constexpr (kKind == MII_GELU) return half * x * (one + erf(x * set1(0.70710678f)));
  if constexpr (kKind == MII_GELU_TANH) {
    const V inner = set1(0.7978845608f) * fma(x * x * x, set1(0.044715f), x);
    return half * x * (one + tanh(inner));
  }
  if constexpr (kKind == MII_GELU_QUICK) return x * sigmoid(set1(1.702f) * x);
  const V positive = max(set1(0.0f), x);
  if constexpr (kKind == MII_RELU2) return positive * positive;
  return positive;
}

// Calls body with the number of a MiiActivationKind as a constant.
template <class Body>
MII_INLINE void with_activation(int32_t kind, const Body& body) {
  switch (kind) {
    case MII_SILU:
      return body(Constant<MII_SILU>{});
    case MII_GELU:
      return body(Constant<MII_GELU>{});
    case MII_GELU_TANH:
      return body(Constant<MII_GELU_TANH>{});
    case MII_RELU:
      return body(Constant<MII_RELU>{});
    case MII_GELU_QUICK:
      return body(Constant<MII_GELU_QUICK>{});
    case MII_SOFTCAP:
      return body(Constant<MII_SOFTCAP>{});
    default:
      return body(Constant<MII_RELU2>{});
  }
}

}  // namespace mii::cpu::MII_ISA
