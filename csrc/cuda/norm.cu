// Launcher of the norms: chooses how many packs a thread holds and whether a warp or a CTA takes a row.
#include "launch.cuh"
#include "norm_args.cuh"

namespace mii {
namespace {

template <typename T>
bool vectorised(const MiiNorm& a) {
  const bool strides = a.width % kPack<T> == 0 && a.x_stride % kPack<T> == 0 && a.out_stride % kPack<T> == 0;
  const bool pointers =
      aligned(a.out, 16) && aligned(a.x, 16) && aligned(a.residual, 16) && aligned(a.weight, 16) && aligned(a.bias, 16) &&
      aligned(a.x_weight, 16);
  return strides && pointers && a.width / kPack<T> <= 8 * norm_threads(8, false);
}

// The kernel for what the arguments add.
template <typename T, int Packs, bool WarpRows>
int32_t launch_rows(const NormArgs<T>& args, const Shape& shape, void* stream) {
  if (args.x_weight != nullptr) return launch("mii_norm", norm_rows<T, Packs, WarpRows, kNormNormedX>, shape, stream, args);
  if (args.parts == nullptr) return launch("mii_norm", norm_rows<T, Packs, WarpRows, kNormX>, shape, stream, args);
  if constexpr (sizeof(T) == 2) {
    if (args.parts_dtype != MII_F32) return launch("mii_norm", norm_rows<T, Packs, WarpRows, kNormParts>, shape, stream, args);
  }
  return launch("mii_norm", norm_rows<T, Packs, WarpRows, kNormFloats>, shape, stream, args);
}

template <typename T, int Packs>
int32_t launch_cta_rows(const NormArgs<T>& args, int count, void* stream) {
  const Shape shape = {dim3(args.rows), dim3(ceil_div(ceil_div(count, Packs), kWarp) * kWarp)};
  return launch_rows<T, Packs, false>(args, shape, stream);
}

template <typename T, int Packs>
int32_t launch_warp_rows(const NormArgs<T>& args, void* stream) {
  const Shape shape = {dim3(ceil_div(args.rows, int64_t(kWarpRowThreads / kWarp))), dim3(kWarpRowThreads)};
  return launch_rows<T, Packs, true>(args, shape, stream);
}

template <typename T>
int32_t norm(const MiiNorm& a, void* stream) {
  const NormArgs<T> args = norm_args<T>(a);
  if (!vectorised<T>(a)) {
    MII_REQUIRE(a.parts == nullptr, MII_UNSUPPORTED, "norm: parts of rows that are not whole packs");
    return launch("mii_norm", norm_rows_any<T>, Shape{dim3(a.rows), dim3(256)}, stream, args);
  }
  const int count = static_cast<int>(a.width / kPack<T>);  // packs of a row
  if (count <= kWarp) return launch_warp_rows<T, 1>(args, stream);
  if (count <= 2 * kWarp) return launch_warp_rows<T, 2>(args, stream);
  if (count <= 4 * kWarp) return launch_warp_rows<T, 4>(args, stream);
  // Few rows leave most of the card idle: more threads on each shorten the wait. Many rows want loads in flight.
  if (count <= 1024 && a.rows <= card().sms) return launch_cta_rows<T, 1>(args, count, stream);
  if (count <= 1024) return launch_cta_rows<T, 2>(args, count, stream);
  if (count <= 2048) return launch_cta_rows<T, 4>(args, count, stream);
  return launch_cta_rows<T, 8>(args, count, stream);
}

}  // namespace
}  // namespace mii

extern "C" int32_t mii_norm(const MiiNorm* a, void* stream) {
  using namespace mii;
  MII_REQUIRE(a->rows >= 0 && a->rows <= INT32_MAX, MII_INVALID, "norm: %lld rows", (long long)a->rows);
  MII_REQUIRE(a->width > 0 && a->width <= (1 << 24), MII_UNSUPPORTED, "norm: width %lld", (long long)a->width);
  MII_REQUIRE(a->kind >= MII_RMS && a->kind <= MII_LAYER, MII_INVALID, "norm: kind %d", a->kind);
  const bool plain_x = a->x_weight == nullptr || (a->residual != nullptr && a->kind != MII_LAYER);
  MII_REQUIRE(plain_x, MII_INVALID, "norm: an x_weight needs a residual and an RMS kind, not kind %d", a->kind);
  const bool known = a->parts_dtype == MII_F32 || a->parts_dtype == a->dtype;
  const bool packs = aligned(a->parts, 16) && a->part_stride % 8 == 0 && a->part_row_stride % 8 == 0;
  MII_REQUIRE(a->parts == nullptr || (a->x_weight == nullptr && known && packs && a->num_parts > 0), MII_UNSUPPORTED,
              "norm: %lld parts of dtype code %d", (long long)a->num_parts, a->parts_dtype);
  if (a->rows == 0) return MII_OK;
  return dispatch_dtype(a->dtype, [&](auto tag) { return norm<decltype(tag)>(*a, stream); });
}
