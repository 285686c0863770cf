// Launcher of the matrix product by warpgroup products.
#include "linear_checks.cuh"
#include "mii/linear_wide.cuh"
#include "shared_memory.cuh"
#include "tensor_map.cuh"
#include "wide_gate.cuh"

namespace mii {
namespace {

constexpr int kBand = 16;  // tiles of rows
constexpr int kSharedRows = 1024;  // more rows fill the card by whole tiles
static_assert(WideShape<128, 256>::kSumBytes <= kSharedTileBytes);

// A CTA for each multiprocessor: of `tiles`, at most one a tile; of shared ones, as many groups as there are, at most one a unit.
int ctas_of(const LinearWideArgs& args) {
  const int64_t tiles = int64_t(args.row_tiles) * args.column_tiles;
  if (!args.shared) return static_cast<int>(tiles < card().sms ? tiles : card().sms);
  const int64_t units = int64_t(args.column_tiles) * ceil_div(args.k, kWideUnit * kWideDepth);
  const int64_t groups = card().sms / args.row_tiles;
  return static_cast<int>(groups < units ? groups : units) * args.row_tiles;
}

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
  const Shape shape{dim3(ctas_of(args)), dim3(S::kThreads), S::kSharedBytes};
  return launch("mii_linear_wide", kernel, shape, stream, args);
}

template <typename T, bool Gated>
int32_t choose_tile(LinearWideArgs& args, const MiiLinearStreamed& a, void* stream) {
  const int64_t rows = a.product.rows;
  if (rows <= 64) return launch_wide<T, 64, 128, Gated>(args, a, stream);
  if (rows <= 128) return launch_wide<T, 128, 128, Gated>(args, a, stream);
  return launch_wide<T, 128, 256, Gated>(args, a, stream);
}

template <typename T>
int32_t linear(const MiiLinearStreamed& a, bool shared, void* stream) {
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
  args.shared = shared;
  if (shared) {
    args.left = static_cast<int*>(p.workspace);
    args.partial = reinterpret_cast<float4*>(static_cast<int*>(p.workspace) + kWorkCounters);
  }
  if (!a.gated) return choose_tile<T, false>(args, a, stream);
  MII_REQUIRE(gate_of(a.activation, &args.gate), MII_UNSUPPORTED, "mii_linear_wide: no gate by activation %d", a.activation);
  return choose_tile<T, true>(args, a, stream);
}

int32_t wide(const MiiLinearStreamed& a, bool shared, void* stream) {
  const MiiLinear& p = a.product;
  if (p.rows == 0 || p.out_features == 0) return MII_OK;
  if (const int32_t status = check_linear("mii_linear_wide", a, 8); status != MII_OK) return status;
  return p.dtype == MII_BF16 ? linear<__nv_bfloat16>(a, shared, stream) : linear<__half>(a, shared, stream);
}

}  // namespace
}  // namespace mii

extern "C" int32_t mii_linear_wide(const MiiLinearStreamed* a, void* stream) { return mii::wide(*a, false, stream); }

extern "C" int32_t mii_linear_shared(const MiiLinearStreamed* a, void* stream) {
  using namespace mii;
  const MiiLinear& p = a->product;
  MII_REQUIRE(p.rows <= kSharedRows && p.workspace && aligned(p.workspace, 16), MII_UNSUPPORTED,
              "mii_linear_shared: up to %d rows, with a workspace", kSharedRows);
  return wide(*a, true, stream);
}
