// Launcher of the matrix product for few rows. More rows, and formats it does not take, belong to cuBLASLt.
#include <atomic>

#include "launch.cuh"
#include "mii/linear_stream.cuh"

namespace mii {
namespace {

constexpr int kMaxRows = 64;

int64_t partial_bytes(int ctas) { return int64_t(ctas) * 2 * (kMaxRows / 8) * kStreamThreads * sizeof(float4); }

// Lets a kernel have its shared memory; once for each device.
template <auto kernel>
int32_t grant_shared(int bytes) {
  static std::atomic<uint64_t> granted{0};
  MII_REQUIRE(bytes <= card().shared_per_block, MII_UNSUPPORTED, "mii_linear: needs %d bytes of shared memory", bytes);
  int device = 0;
  cudaGetDevice(&device);
  if (granted.load() >> device & 1) return MII_OK;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  MII_REQUIRE(error == cudaSuccess, MII_UNSUPPORTED, "mii_linear: %d bytes of shared memory: %s", bytes,
              cudaGetErrorString(error));
  granted.fetch_or(uint64_t(1) << device);
  return MII_OK;
}

template <typename T, int Tokens>
int32_t launch_stream(const LinearStreamArgs<T>& args, void* stream) {
  constexpr int kShared = StreamShape<Tokens>::kSharedBytes;
  if (const int32_t status = grant_shared<linear_stream<T, Tokens>>(kShared); status != MII_OK) return status;
  const int64_t units = int64_t(ceil_div(args.n, kStreamRows)) * ceil_div(args.k, kStreamDepth);
  const int ctas = static_cast<int>(units < card().sms ? units : card().sms);
  return launch("mii_linear", linear_stream<T, Tokens>, Shape{dim3(ctas), dim3(kStreamThreads), kShared}, stream, args);
}

template <typename T>
int32_t linear(const MiiLinear& a, void* stream) {
  const LinearStreamArgs<T> args = {static_cast<T*>(a.out),
                                    static_cast<const T*>(a.x),
                                    static_cast<const T*>(a.weight),
                                    static_cast<const T*>(a.bias),
                                    static_cast<int*>(a.workspace),
                                    reinterpret_cast<float4*>(static_cast<int*>(a.workspace) + kStreamMaxTiles),
                                    a.x_stride,
                                    a.out_stride,
                                    static_cast<int>(a.rows),
                                    static_cast<int>(a.out_features),
                                    static_cast<int>(a.in_features)};
  if (a.rows <= 8) return launch_stream<T, 8>(args, stream);
  if (a.rows <= 16) return launch_stream<T, 16>(args, stream);
  if (a.rows <= 32) return launch_stream<T, 32>(args, stream);
  return launch_stream<T, 64>(args, stream);
}

}  // namespace
}  // namespace mii

extern "C" int32_t mii_linear(const MiiLinear* a, void* stream) {
  using namespace mii;
  if (a->rows == 0 || a->out_features == 0) return MII_OK;
  MII_REQUIRE(a->dtype == MII_BF16 || a->dtype == MII_F16, MII_UNSUPPORTED, "mii_linear: 16-bit formats only");
  MII_REQUIRE(a->rows <= kMaxRows && a->workspace, MII_UNSUPPORTED, "mii_linear: up to %d rows, with a workspace", kMaxRows);
  const bool steps = a->in_features % 8 == 0 && a->x_stride % 8 == 0 && a->in_features > 0;
  MII_REQUIRE(steps && aligned(a->x, 16) && aligned(a->weight, 16) && aligned(a->workspace, 16), MII_UNSUPPORTED,
              "mii_linear: rows of x and weight must be whole chunks of 16 bytes");
  MII_REQUIRE(a->out_features <= int64_t(kStreamRows) * kStreamMaxTiles && a->in_features < (int64_t(1) << 30),
              MII_UNSUPPORTED, "mii_linear: a weight of %lld x %lld is too large", static_cast<long long>(a->out_features),
              static_cast<long long>(a->in_features));
  return a->dtype == MII_BF16 ? linear<__nv_bfloat16>(*a, stream) : linear<__half>(*a, stream);
}

extern "C" int64_t mii_linear_workspace_bytes(const MiiLinear*) {
  using namespace mii;
  return kStreamMaxTiles * int64_t(sizeof(int)) + partial_bytes(card().sms);
}
