// What the four lanes that share a row of a product's fragments do together.
#pragma once
#include "mii/attention_mma.cuh"

namespace mii {

// Of four groups of 8 columns a lane has columns 2 q, 2 q + 1, q = lane % 4; then it has all of group q.
MII_DEVICE void transpose_quad(uint32_t (&p)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  const uint32_t a = __shfl_xor_sync(kFullMask, odd ? p[0] : p[1], 1);
  const uint32_t b = __shfl_xor_sync(kFullMask, odd ? p[2] : p[3], 1);
  (odd ? p[0] : p[1]) = a, (odd ? p[2] : p[3]) = b;
  const uint32_t c = __shfl_xor_sync(kFullMask, high ? p[0] : p[2], 2);
  const uint32_t d = __shfl_xor_sync(kFullMask, high ? p[1] : p[3], 2);
  (high ? p[0] : p[2]) = c, (high ? p[1] : p[3]) = d;
}

}  // namespace mii
