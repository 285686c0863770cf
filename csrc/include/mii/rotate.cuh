// The rotation of a pair of elements, in the one order of roundings that all kernels which rotate share.
#pragma once
#include <math.h>

namespace mii {

__device__ __forceinline__ void rotate(float& x, float& y, float cos, float sin) {
  const float first = fmaf(x, cos, -(y * sin));
  y = fmaf(y, cos, x * sin);
  x = first;
}

}  // namespace mii
