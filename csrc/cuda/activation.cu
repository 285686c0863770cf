// Launcher of the activations.
#include "launch.cuh"
#include "mii/activation.cuh"

namespace mii {
namespace {

constexpr int kThreads = 256;

template <typename T, int N, bool Gated>
int32_t activation(const MiiActivation& a, void* stream) {
  const int64_t count = a.width / N;
  const int64_t chunks = ceil_div(count, int64_t(kThreads * kActivationPacks));
  const int64_t threads = ceil_div(ceil_div(count, chunks * kActivationPacks), int64_t(kWarp)) * kWarp;
  const ActivationArgs<T> args = {
      static_cast<T*>(a.out), static_cast<const T*>(a.x), static_cast<const T*>(a.bias), a.x_stride, a.out_stride,
      a.limit,                static_cast<int>(count),    static_cast<int>(chunks),      a.kind};
  return launch("mii_activation", activation_rows<T, N, Gated>, Shape{dim3(a.rows * chunks), dim3(threads)}, stream,
                args);
}

template <typename T>
bool vectorised(const MiiActivation& a) {
  const bool strides = a.width % kPack<T> == 0 && a.x_stride % kPack<T> == 0 && a.out_stride % kPack<T> == 0;
  return strides && aligned(a.out, 16) && aligned(a.x, 16) && aligned(a.bias, 16);
}

template <typename T, int N>
int32_t either(const MiiActivation& a, void* stream) {
  return a.gated ? activation<T, N, true>(a, stream) : activation<T, N, false>(a, stream);
}

}  // namespace
}  // namespace mii

extern "C" int32_t mii_activation(const MiiActivation* a, void* stream) {
  using namespace mii;
  MII_REQUIRE(a->kind >= MII_SILU && a->kind <= MII_SOFTCAP, MII_INVALID, "activation: kind %d", a->kind);
  const bool fits = a->rows >= 0 && a->width > 0 && a->width < INT32_MAX / 2 &&
                    a->rows * ceil_div(a->width, int64_t(256)) <= INT32_MAX;
  MII_REQUIRE(fits, MII_UNSUPPORTED, "activation: %lld rows of %lld", (long long)a->rows, (long long)a->width);
  if (a->rows == 0) return MII_OK;
  return dispatch_dtype(a->dtype, [&](auto tag) {
    using T = decltype(tag);
    return vectorised<T>(*a) ? either<T, kPack<T>>(*a, stream) : either<T, 1>(*a, stream);
  });
}
