// Launcher of the matrix product by warpgroup products.
#include "linear_checks.cuh"
#include "mii/linear_wide.cuh"
#include "shared_memory.cuh"
#include "tensor_map.cuh"
#include "wide_gate.cuh"

namespace mii {
namespace {

constexpr int kMostRows = 128, kMostPartedRows = 64;

template <typename T, int Rows, WideEnd End>
int32_t launch_wide(LinearWideArgs& args, const MiiLinearStreamed& a, void* stream) {
  using S = WideShape<Rows, kWideColumns>;
  const MiiLinear& p = a.product;
  constexpr auto kernel = linear_wide<T, Rows, End>;
  if (const int32_t status = grant_shared<kernel>("mii_linear_wide", S::kSharedBytes); status != MII_OK) return status;
  const bool mapped =
      encode_matrix(&args.x, p.dtype, p.x, p.rows, p.in_features, p.x_stride, Rows) &&
      encode_matrix(&args.weight, p.dtype, p.weight, p.out_features, p.in_features, p.in_features,
                    End == kWideGated ? kWideColumns / 2 : kWideColumns);
  MII_REQUIRE(mapped, MII_UNSUPPORTED, "mii_linear_wide: the driver makes no tensor map of this product");
  args.tiles = static_cast<int>(ceil_div(p.out_features, int64_t(kWideColumns)));
  const int items = args.tiles * args.parts;
  const Shape shape{dim3(items < card().sms ? items : card().sms), dim3(S::kThreads), S::kSharedBytes};
  return launch("mii_linear_wide", kernel, shape, stream, args);
}

template <typename T, WideEnd End>
int32_t choose_tile(LinearWideArgs& args, const MiiLinearStreamed& a, void* stream) {
  return a.product.rows <= 64 ? launch_wide<T, 64, End>(args, a, stream) : launch_wide<T, 128, End>(args, a, stream);
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
  args.parts = a.parts > 0 ? a.parts : 1;
  if (a.parts > 0) return launch_wide<T, 64, kWideParts>(args, a, stream);
  if (!a.gated) return choose_tile<T, kWidePlain>(args, a, stream);
  MII_REQUIRE(gate_of(a.activation, &args.gate), MII_UNSUPPORTED, "mii_linear_wide: no gate by activation %d", a.activation);
  return choose_tile<T, kWideGated>(args, a, stream);
}

}  // namespace
}  // namespace mii

extern "C" int32_t mii_linear_wide(const MiiLinearStreamed* a, void* stream) {
  using namespace mii;
  const MiiLinear& p = a->product;
  if (p.rows == 0 || p.out_features == 0) return MII_OK;
  if (const int32_t status = check_linear("mii_linear_wide", *a, 8); status != MII_OK) return status;
  MII_REQUIRE(p.rows <= kMostRows, MII_UNSUPPORTED, "mii_linear_wide: up to %d rows", kMostRows);
  const bool pairs = p.out_features % 2 == 0 && aligned(p.out, 8), few = p.rows <= kMostPartedRows;
  const bool parts = a->parts > 0 && a->parts <= ceil_div(p.in_features, int64_t(kWideDepth)) && !a->gated && pairs && few;
  MII_REQUIRE(a->parts == 0 || parts, MII_UNSUPPORTED, "mii_linear_wide: %d parts of %lld rows by a weight of %lld x %lld",
              a->parts, static_cast<long long>(p.rows), static_cast<long long>(p.out_features),
              static_cast<long long>(p.in_features));
  return p.dtype == MII_BF16 ? linear<__nv_bfloat16>(*a, stream) : linear<__half>(*a, stream);
}
