// Buffers that are filled and emptied in turn, with a barrier for each.
#pragma once
#include "mii/attention_mma.cuh"

namespace mii {

// A place in a ring of kCount that is gone round again and again, and the parity of its present turn.
template <int kCount>
struct RingPlace {
  int at = 0;
  uint32_t parity = 0;
  MII_DEVICE void next() {
    if (++at == kCount) {
      at = 0;
      parity ^= 1;
    }
  }
};

}  // namespace mii
