// One head size of the tensor-core kernels: include this and instantiate launch_tiled<D>, tiled_occupancy<D> and, of up to
// 128 elements, launch_decode<D>.
#pragma once
#include <mutex>

#include "attention.cuh"
#include "mii/attention_kernel.cuh"

namespace mii {

// What the code that the device really runs asks for: it differs between the architectures in the library.
template <int D>
int shared_bytes(const void* kernel) {
  cudaFuncAttributes attributes = {};
  if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return 0;
  return attributes.ptxVersion >= 90 ? attention_shared<D, kLargeBudget>() : attention_shared<D, kSmallBudget>();
}

// Shared memory of `kernel` on the current device, granted at first use; 0: the device cannot run it.
template <int D, auto kernel>
int granted_shared() {
  constexpr int kDevices = 64;
  static std::once_flag asked[kDevices];
  static int granted[kDevices];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return 0;
  std::call_once(asked[device], [device] {
    const void* function = reinterpret_cast<const void*>(kernel);
    const int bytes = shared_bytes<D>(function);
    const auto set = [function](cudaFuncAttribute attribute, int value) {
      return cudaFuncSetAttribute(function, attribute, value) == cudaSuccess;
    };
    const bool fits = bytes > 0 && set(cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) &&
                      set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    granted[device] = fits ? bytes : 0;
    if (!fits) cudaGetLastError();
  });
  return granted[device];
}

template <int D>
int tiled_occupancy() {
  constexpr auto kernel = attention_kernel<__nv_bfloat16, D, false>;
  const int shared = granted_shared<D, kernel>();
  int ctas = 0;
  if (shared == 0 ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&ctas, kernel, kAttentionThreads, shared) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return ctas;
}

template <int D, auto kernel, typename Params>
int32_t launch_instance(const Params& p, Bounds bounds, void* stream) {
  const size_t shared = granted_shared<D, kernel>();
  return launch("mii_attention", kernel, {dim3(bounds.ctas), dim3(kAttentionThreads), shared}, stream, p);
}

template <int D>
int32_t launch_tiled(const AttentionParams& p, Bounds bounds, void* stream) {
  const bool extras = needs_extras(p.a);
  if (p.a.dtype == MII_BF16) {
    return extras ? launch_instance<D, attention_kernel<__nv_bfloat16, D, true>>(p, bounds, stream)
                  : launch_instance<D, attention_kernel<__nv_bfloat16, D, false>>(p, bounds, stream);
  }
  return extras ? launch_instance<D, attention_kernel<__half, D, true>>(p, bounds, stream)
                : launch_instance<D, attention_kernel<__half, D, false>>(p, bounds, stream);
}

template <int D>
int32_t launch_decode(const DecodeAttentionParams& n, Bounds bounds, void* stream) {
  if (n.p.a.dtype == MII_BF16) return launch_instance<D, decode_attention_kernel<__nv_bfloat16, D>>(n, bounds, stream);
  return launch_instance<D, decode_attention_kernel<__half, D>>(n, bounds, stream);
}

}  // namespace mii
