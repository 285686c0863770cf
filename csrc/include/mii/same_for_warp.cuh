// Values that the compiler shall see to be the same for all lanes of a warp.
#pragma once
#include "mii/attention_mma.cuh"

namespace mii {

// What follows from it then costs no registers of each thread, and branches on it are taken to be taken by all. Descriptors of
// warpgroup products want it above all: they are read from registers that a warp shares, into which each thread's own are
// brought one by one, in the way of the product that waits for them.
template <typename T>
MII_DEVICE T same_for_warp(T value) {
  return __shfl_sync(kFullMask, value, 0);
}

}  // namespace mii
