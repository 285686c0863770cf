// In place of csrc/include/mii/activation.cuh: SiLU.
#pragma once
#include "mii/abi/activation.h"
#include "mii/attention_mma.cuh"

namespace mii {

template <typename T, int>
float activate(float x) {
  return x / (1.0f + std::exp(-x));
}

template <typename T, int N>
void activate_pack(float (&x)[N], int, float) {
  for (float& value : x) value /= 1.0f + std::exp(-value);
}

}  // namespace mii
