// Launcher of the matrix product for few rows. More rows, and formats it does not take, belong to cuBLASLt.
#include "launch.cuh"
#include "mii/abi/linear.h"
#include "mii/linear_stream.cuh"
#include "shared_memory.cuh"

namespace mii {
namespace {

constexpr int kMaxRows = 64;
constexpr int kMaxPartials = 4096;  // float4 of a tile, or of all tiles at work on a multiprocessor

int64_t partial_bytes(int sms) { return int64_t(sms) * 2 * kMaxPartials * sizeof(float4); }

// `PerSm` CTAs to a multiprocessor, which share its memory.
template <typename T, typename S, int PerSm = 1>
int32_t launch_stream(const LinearStreamArgs<T>& args, void* stream) {
  static_assert(PerSm * S::kPartials * S::kConsumers <= kMaxPartials);
  static_assert(PerSm * S::kSharedBytes <= 216 << 10, "leaves no room for the light kernels beside it");
  const int32_t status = grant_shared<linear_stream<T, S>, true>("mii_linear_streamed", S::kSharedBytes);
  if (status != MII_OK) return status;
  const int64_t units = int64_t(ceil_div(args.n, S::kTileRows)) * ceil_div(args.k, S::kDepth);
  const int64_t places = int64_t(PerSm) * card().sms;
  const int ctas = static_cast<int>(units < places ? units : places);
  const Shape shape{dim3(ctas), dim3(S::kThreads), S::kSharedBytes};
  return launch("mii_linear_streamed", linear_stream<T, S>, shape, stream, args);
}

template <typename T>
int32_t launch_rows(const LinearStreamArgs<T>& args, int variant, void* stream) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // other cuts, to compare on a card
    if (args.rows <= 8) {
      if (variant == 1) return launch_stream<T, StreamShape<8, 1, 256, 3, 4, 1, 4, true>>(args, stream);
      if (variant == 2) return launch_stream<T, StreamShape<8, 1, 256, 5, 4, 1, 4, true>>(args, stream);
      if (variant == 3) return launch_stream<T, StreamShape<8, 1, 128, 5, 4, 1, 4, true>>(args, stream);
    } else if (args.rows <= 16) {
      if (variant == 1) return launch_stream<T, StreamShape<16, 1, 256, 2, 4, 1, 4, true>>(args, stream);
      if (variant == 2) return launch_stream<T, StreamShape<16, 1, 256, 5, 4, 1, 4, true>>(args, stream);
      if (variant == 3) return launch_stream<T, StreamShape<16, 1, 128, 5, 4, 1, 4, true>>(args, stream);
    } else if (args.rows <= 32) {
      if (variant == 1) return launch_stream<T, StreamShape<32, 1, 256, 4, 4, 1, 4, true>>(args, stream);
      if (variant == 2) return launch_stream<T, StreamShape<32, 2, 128, 5, 4, 1, 4, true>>(args, stream);
    } else {
      if (variant == 1) return launch_stream<T, StreamShape<64, 2, 128, 4, 4, 2, 4, true>>(args, stream);
      if (variant == 2) return launch_stream<T, StreamShape<64, 2, 64, 4, 8, 1, 4, true>>(args, stream);
      if (variant == 3) return launch_stream<T, StreamShape<64, 2, 128, 4, 4, 1, 4, true>>(args, stream);
    }
  }
  if (args.rows <= 8) return launch_stream<T, StreamShape<8, 1, 256, 5>>(args, stream);
  if (args.rows <= 16) return launch_stream<T, StreamShape<16, 1, 256, 5>>(args, stream);
  if (args.rows <= 32) return launch_stream<T, StreamShape<32, 1, 256, 4>>(args, stream);
  return launch_stream<T, StreamShape<64, 2, 128, 4, 4, 2>>(args, stream);
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
      static_cast<int*>(p.workspace),
      reinterpret_cast<float4*>(static_cast<int*>(p.workspace) + kStreamMaxTiles),
      p.x_stride,
      p.out_stride,
      a.next_bytes,
      a.next_fetch,
      static_cast<int>(p.rows),
      static_cast<int>(p.out_features),
      static_cast<int>(p.in_features),
      a.next_lag,
      a.gated ? a.activation : kPlain,
      start_early(),
  };
  return launch_rows(args, a.variant, stream);
}

}  // namespace
}  // namespace mii

extern "C" int32_t mii_linear_streamed(const MiiLinearStreamed* a, void* stream) {
  using namespace mii;
  const MiiLinear& p = a->product;
  if (p.rows == 0 || p.out_features == 0) return MII_OK;
  MII_REQUIRE(card().major == 9, MII_UNSUPPORTED, "mii_linear_streamed: for compute capability 9.0 only");
  MII_REQUIRE(p.dtype == MII_BF16 || p.dtype == MII_F16, MII_UNSUPPORTED, "mii_linear_streamed: 16-bit formats only");
  MII_REQUIRE(p.rows <= kMaxRows && p.workspace, MII_UNSUPPORTED, "mii_linear_streamed: up to %d rows, with a workspace",
              kMaxRows);
  const bool steps = p.in_features % 16 == 0 && p.x_stride % 8 == 0 && p.in_features > 0;
  MII_REQUIRE(steps && aligned(p.x, 16) && aligned(p.weight, 16) && aligned(p.workspace, 16), MII_UNSUPPORTED,
              "mii_linear_streamed: rows of x and weight must be whole steps of 16, and aligned to 16 bytes");
  MII_REQUIRE(p.out_features <= int64_t(64) * kStreamMaxTiles && p.in_features < (int64_t(1) << 24), MII_UNSUPPORTED,
              "mii_linear_streamed: a weight of %lld x %lld is too large", static_cast<long long>(p.out_features),
              static_cast<long long>(p.in_features));
  MII_REQUIRE(!a->gated || p.out_features % 2 == 0, MII_INVALID,
              "mii_linear_streamed: %lld gated features are not pairs", static_cast<long long>(p.out_features));
  MII_REQUIRE(!a->gated || a->activation != MII_SOFTCAP, MII_UNSUPPORTED, "mii_linear_streamed: a gate has no soft cap");
  MII_REQUIRE(a->next == nullptr || aligned(a->next, 16), MII_INVALID,
              "mii_linear_streamed: what comes next must be aligned to 16 bytes");
  return p.dtype == MII_BF16 ? linear<__nv_bfloat16>(*a, stream) : linear<__half>(*a, stream);
}

extern "C" int64_t mii_linear_workspace_bytes(const MiiLinear*) {
  using namespace mii;
  return kStreamMaxTiles * int64_t(sizeof(int)) + partial_bytes(card().sms);
}
