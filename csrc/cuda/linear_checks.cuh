// What all products by kernels of Hopper ask of their arguments.
#pragma once
#include "launch.cuh"
#include "mii/abi/linear.h"

namespace mii {

// `name` is for the message; rows of x and weight must be whole multiples of `step` elements.
inline int32_t check_linear(const char* name, const MiiLinearStreamed& a, int step) {
  constexpr int64_t kMost = int64_t(1) << 30;
  const MiiLinear& p = a.product;
  const auto rows = static_cast<long long>(p.rows), n = static_cast<long long>(p.out_features);
  MII_REQUIRE(card().major == 9 && card().minor == 0, MII_UNSUPPORTED, "%s: for compute capability 9.0 only", name);
  MII_REQUIRE(p.dtype == MII_BF16 || p.dtype == MII_F16, MII_UNSUPPORTED, "%s: 16-bit formats only", name);
  const bool steps = p.in_features % step == 0 && p.x_stride % 8 == 0 && p.in_features > 0;
  MII_REQUIRE(steps && aligned(p.x, 16) && aligned(p.weight, 16), MII_UNSUPPORTED,
              "%s: rows of x and weight must be whole steps of %d, and aligned to 16 bytes", name, step);
  MII_REQUIRE(p.rows < kMost && p.out_features < kMost && p.in_features < kMost, MII_UNSUPPORTED,
              "%s: %lld rows by a weight of %lld x %lld are too many", name, rows, n, static_cast<long long>(p.in_features));
  MII_REQUIRE(!a.gated || p.out_features % 2 == 0, MII_INVALID, "%s: %lld gated features are not pairs", name, n);
  MII_REQUIRE(a.next == nullptr || aligned(a.next, 16), MII_INVALID, "%s: what comes next must be aligned to 16 bytes", name);
  return MII_OK;
}

}  // namespace mii
