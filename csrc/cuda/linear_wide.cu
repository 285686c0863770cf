// Launcher of the matrix product by warpgroup products.
#include "launch.cuh"
#include "mii/abi/linear.h"
#include "mii/linear_wide.cuh"
#include "shared_memory.cuh"
#include "tensor_map.cuh"
#include "wide_gate.cuh"

namespace mii {
namespace {

constexpr int kBand = 16;  // tiles of rows

template <typename T, int Rows, int Columns, bool Gated>
int32_t launch_wide(LinearWideArgs& args, const MiiLinearStreamed& a, void* stream) {
  using S = WideShape<Rows, Columns>;
  const MiiLinear& p = a.product;
  constexpr auto kernel = linear_wide<T, Rows, Columns, Gated>;
  if (const int32_t status = grant_shared<kernel>("mii_linear_wide", S::kSharedBytes); status != MII_OK) return status;
  const bool mapped =
      encode_matrix(&args.x, p.dtype, p.x, p.rows, p.in_features, p.x_stride, Rows) &&
      encode_matrix(&args.weight, p.dtype, p.weight, p.out_features, p.in_features, p.in_features, Columns / 2);
  MII_REQUIRE(mapped, MII_UNSUPPORTED, "mii_linear_wide: the driver makes no tensor map of this product");
  args.row_tiles = static_cast<int>(ceil_div(p.rows, int64_t(Rows)));
  args.column_tiles = static_cast<int>(ceil_div(p.out_features, int64_t(Columns)));
  const int64_t items = int64_t(args.row_tiles) * args.column_tiles;
  const int ctas = static_cast<int>(items < card().sms ? items : card().sms);
  return launch("mii_linear_wide", kernel, Shape{dim3(ctas), dim3(S::kThreads), S::kSharedBytes}, stream, args);
}

template <typename T>
int32_t linear(const MiiLinearStreamed& a, void* stream) {
  const MiiLinear& p = a.product;
  LinearWideArgs args = {};
  args.out = p.out;
  args.bias = p.bias;
  args.next = static_cast<const char*>(a.next);
  args.out_stride = p.out_stride;
  args.next_bytes = a.next_bytes;
  args.next_fetch = a.next_fetch;
  args.rows = static_cast<int>(p.rows);
  args.n = static_cast<int>(p.out_features);
  args.k = static_cast<int>(p.in_features);
  args.band = kBand;
  if (a.gated) {
    MII_REQUIRE(gate_of(a.activation, &args.gate), MII_UNSUPPORTED, "mii_linear_wide: no gate by activation %d", a.activation);
    if (p.rows <= 64) return launch_wide<T, 64, 128, true>(args, a, stream);
    return p.rows <= 128 ? launch_wide<T, 128, 128, true>(args, a, stream)
                         : launch_wide<T, 128, 256, true>(args, a, stream);
  }
  return p.rows <= 64 ? launch_wide<T, 64, 128, false>(args, a, stream)
                      : launch_wide<T, 128, 128, false>(args, a, stream);
}

}  // namespace
}  // namespace mii

extern "C" int32_t mii_linear_wide(const MiiLinearStreamed* a, void* stream) {
  using namespace mii;
  const MiiLinear& p = a->product;
  if (p.rows == 0 || p.out_features == 0) return MII_OK;
  MII_REQUIRE(card().major == 9 && card().minor == 0, MII_UNSUPPORTED, "mii_linear_wide: for compute capability 9.0 only");
  MII_REQUIRE(p.dtype == MII_BF16 || p.dtype == MII_F16, MII_UNSUPPORTED, "mii_linear_wide: 16-bit formats only");
  const bool boxes = p.in_features % 8 == 0 && p.x_stride % 8 == 0 && p.in_features > 0;
  MII_REQUIRE(boxes && aligned(p.x, 16) && aligned(p.weight, 16), MII_UNSUPPORTED,
              "mii_linear_wide: rows of x and weight must be whole chunks of 16 bytes, and aligned to them");
  MII_REQUIRE(p.rows < (int64_t(1) << 30) && p.out_features < (int64_t(1) << 30) && p.in_features < (int64_t(1) << 30),
              MII_UNSUPPORTED, "mii_linear_wide: %lld rows by a weight of %lld x %lld are too many",
              static_cast<long long>(p.rows), static_cast<long long>(p.out_features), static_cast<long long>(p.in_features));
  MII_REQUIRE(!a->gated || p.out_features % 2 == 0, MII_INVALID, "mii_linear_wide: %lld gated features are not pairs",
              static_cast<long long>(p.out_features));
  MII_REQUIRE(a->next == nullptr || aligned(a->next, 16), MII_INVALID,
              "mii_linear_wide: what comes next must be aligned to 16 bytes");
  return p.dtype == MII_BF16 ? linear<__nv_bfloat16>(*a, stream) : linear<__half>(*a, stream);
}
