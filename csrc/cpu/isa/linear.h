// The layout of packed weights, shared by the bodies of the matrix product.
#pragma once
#include "mii/abi/linear.h"
#include "simd.h"

namespace mii::cpu::MII_ISA {

constexpr int kPanel = 16;  // output features side by side

MII_INLINE int64_t panel_count(int64_t out_features) { return (out_features + kPanel - 1) / kPanel; }

// Input features as stored: bfloat16 goes up to a multiple of 32, the depth of an AMX tile.
MII_INLINE int64_t padded_depth(int32_t dtype, int64_t in_features) {
  return dtype == MII_BF16 ? (in_features + 31) / 32 * 32 : in_features;
}

// Panels [begin, end) of a product, in this thread.
void linear_panels(const MiiLinear& a, int64_t begin, int64_t end);
void linear_panels_amx(const MiiLinear& a, int64_t begin, int64_t end);  // bfloat16; in the AMX variant only

}  // namespace mii::cpu::MII_ISA
