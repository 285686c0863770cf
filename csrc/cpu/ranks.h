// What is added up of several ranks; csrc/cpu/ranks.cpp brings it together.
#pragma once
#include "cpu.h"

namespace mii::cpu {

// out[i] = parts[0][i] + parts[1][i] + ..., in float in this order, rounded once. out may be one of the parts.
struct Addends {
  void* out;
  const void* const* parts;
  int64_t elements;
  int32_t count, dtype;
};

}  // namespace mii::cpu
