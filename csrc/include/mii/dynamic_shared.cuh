// The shared memory whose size a launch says.
#pragma once
#include "mii/attention_mma.cuh"

namespace mii {

MII_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dynamic_memory[];
  return dynamic_memory;
}

}  // namespace mii
