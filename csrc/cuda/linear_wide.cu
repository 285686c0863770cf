// Launcher of the matrix product by warpgroup products.
#include "linear_checks.cuh"
#include "mii/linear_wide.cuh"
#include "shared_memory.cuh"
#include "tensor_map.cuh"
#include "wide_gate.cuh"

namespace mii {
namespace {

constexpr int kMostRows = 128;

template <typename T, int Rows, bool Gated>
int32_t launch_wide(LinearWideArgs& args, const MiiLinearStreamed& a, void* stream) {
  using S = WideShape<Rows, kWideColumns>;
  const MiiLinear& p = a.product;
  constexpr auto kernel = linear_wide<T, Rows, Gated>;
  if (const int32_t status = grant_shared<kernel>("mii_linear_wide", S::kSharedBytes); status != MII_OK) return status;
  const bool mapped =
      encode_matrix(&args.x, p.dtype, p.x, p.rows, p.in_features, p.x_stride, Rows) &&
      encode_matrix(&args.weight, p.dtype, p.weight, p.out_features, p.in_features, p.in_features, kWideColumns / 2);
  MII_REQUIRE(mapped, MII_UNSUPPORTED, "mii_linear_wide: the driver makes no tensor map of this product");
  args.tiles = static_cast<int>(ceil_div(p.out_features, int64_t(kWideColumns)));
  const Shape shape{dim3(args.tiles < card().sms ? args.tiles : card().sms), dim3(S::kThreads), S::kSharedBytes};
  return launch("mii_linear_wide", kernel, shape, stream, args);
}

template <typename T, bool Gated>
int32_t choose_tile(LinearWideArgs& args, const MiiLinearStreamed& a, void* stream) {
  return a.product.rows <= 64 ? launch_wide<T, 64, Gated>(args, a, stream) : launch_wide<T, 128, Gated>(args, a, stream);
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
  if (!a.gated) return choose_tile<T, false>(args, a, stream);
  MII_REQUIRE(gate_of(a.activation, &args.gate), MII_UNSUPPORTED, "mii_linear_wide: no gate by activation %d", a.activation);
  return choose_tile<T, true>(args, a, stream);
}

}  // namespace
}  // namespace mii

extern "C" int32_t mii_linear_wide(const MiiLinearStreamed* a, void* stream) {
  using namespace mii;
  const MiiLinear& p = a->product;
  if (p.rows == 0 || p.out_features == 0) return MII_OK;
  if (const int32_t status = check_linear("mii_linear_wide", *a, 8); status != MII_OK) return status;
  MII_REQUIRE(p.rows <= kMostRows, MII_UNSUPPORTED, "mii_linear_wide: up to %d rows", kMostRows);
  return p.dtype == MII_BF16 ? linear<__nv_bfloat16>(*a, stream) : linear<__half>(*a, stream);
}
