// In place of csrc/include/mii/dynamic_shared.cuh.
#pragma once
#include "card.h"

namespace mii {

inline unsigned char* dynamic_shared() { return card::shared; }

}  // namespace mii
