// Launcher of the matrix product for few rows. More rows, and formats it does not take, belong to cuBLASLt.
#include "linear_checks.cuh"
#include "mii/linear_stream.cuh"
#include "shared_memory.cuh"

namespace mii {
namespace {

// One CTA a multiprocessor, or fewer where there are fewer units.
template <typename T, int Tokens>
int32_t launch_stream(const LinearStreamArgs<T>& args, void* stream) {
  constexpr auto kernel = linear_stream<T, Tokens>;
  constexpr int kShared = StreamShape<Tokens>::kSharedBytes;
  if (const int32_t status = grant_shared<kernel, true>("mii_linear_streamed", kShared); status != MII_OK) return status;
  const int64_t units = int64_t(ceil_div(args.n, kStreamTileRows)) * ceil_div(args.k, kStreamDepth);
  const int ctas = static_cast<int>(units < card().sms ? units : card().sms);
  const Shape shape{dim3(ctas), dim3(kStreamThreads), kShared};
  return launch("mii_linear_streamed", kernel, shape, stream, args);
}

template <typename T>
int32_t linear(const MiiLinearStreamed& a, void* stream) {
  const MiiLinear& p = a.product;
  const LinearStreamArgs<T> args = {
      static_cast<T*>(p.out),
      static_cast<const T*>(p.x),
      static_cast<const T*>(p.weight),
      static_cast<const T*>(p.bias),
      static_cast<const char*>(a.next),
      static_cast<float4*>(p.workspace),
      p.x_stride,
      p.out_stride,
      a.next_bytes,
      a.next_fetch,
      static_cast<int>(p.rows),
      static_cast<int>(p.out_features),
      static_cast<int>(p.in_features),
      a.gated ? a.activation : kPlain,
  };
  return args.rows <= 8 ? launch_stream<T, 8>(args, stream) : launch_stream<T, kStreamMostTokens>(args, stream);
}

}  // namespace
}  // namespace mii

extern "C" int32_t mii_linear_streamed(const MiiLinearStreamed* a, void* stream) {
  using namespace mii;
  const MiiLinear& p = a->product;
  if (p.rows == 0 || p.out_features == 0) return MII_OK;
  if (const int32_t status = check_linear("mii_linear_streamed", *a, 16); status != MII_OK) return status;
  MII_REQUIRE(p.rows <= kStreamMostTokens && p.workspace && aligned(p.workspace, 16), MII_UNSUPPORTED,
              "mii_linear_streamed: up to %d rows, with a workspace", kStreamMostTokens);
  MII_REQUIRE(p.out_features < (int64_t(1) << 24) && p.in_features < (int64_t(1) << 24), MII_UNSUPPORTED,
              "mii_linear_streamed: a weight of %lld x %lld is too large", static_cast<long long>(p.out_features),
              static_cast<long long>(p.in_features));
  MII_REQUIRE(a->parts == 0, MII_UNSUPPORTED, "mii_linear_streamed: leaves no parts, not %d", a->parts);
  MII_REQUIRE(!a->gated || a->activation != MII_SOFTCAP, MII_UNSUPPORTED, "mii_linear_streamed: a gate has no soft cap");
  return p.dtype == MII_BF16 ? linear<__nv_bfloat16>(*a, stream) : linear<__half>(*a, stream);
}

extern "C" int64_t mii_linear_workspace_bytes(const MiiLinear*) {
  using namespace mii;
  return card().sms * StreamShape<kStreamMostTokens>::kGroups * kStreamConsumers * int64_t(sizeof(float4));
}
