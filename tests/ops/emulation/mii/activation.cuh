// In place of csrc/include/mii/activation.cuh: SiLU.
#pragma once
#include "mii/abi/activation.h"
#include "mii/attention_mma.cuh"

namespace mii {

template <typename T, int>
float activate(float x) {
  return x / (1.0f + std::exp(-x));
}

template <typename T>
float activate_one(float x, int) {
  return activate<T, MII_SILU>(x);
}
template <typename T>
float activate_any(float x, int) {
  return activate<T, MII_SILU>(x);
}

}  // namespace mii
