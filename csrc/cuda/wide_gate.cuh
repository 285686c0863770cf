// The activations that products with a gate apply themselves.
#pragma once
#include "mii/wide_tile.cuh"

namespace mii {

// False: the activation is none of them.
inline bool gate_of(int32_t activation, WideGate* gate) {
  constexpr float kTanh = 2.0f * 0.79788456080286536f;  // (1 + tanh u) / 2 = sigmoid(2 u)
  switch (activation) {
    case MII_SILU:
      *gate = {1.0f, 0.0f};
      return true;
    case MII_GELU_TANH:
      *gate = {kTanh, kTanh * 0.044715f};
      return true;
    case MII_GELU_QUICK:
      *gate = {1.702f, 0.0f};
      return true;
    default:
      return false;
  }
}

}  // namespace mii
