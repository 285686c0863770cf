// Launches the Hopper kernel of prompts: heads of 64 and 128 elements on compute capability 9.0, asked for by
// MII_WGMMA=1.
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "attention.cuh"
#include "mii/attention_hopper.cuh"

namespace mii {
namespace {

bool is_asked_for() {
  const char* value = std::getenv("MII_WGMMA");
  return value != nullptr && std::strcmp(value, "1") == 0;
}

template <int D, void (*kernel)(AttentionParams)>
int32_t launch_instance(const AttentionParams& p, void* stream) {
  constexpr int kDevices = 64, kBytes = HopperShape<D>::kShared;
  static std::once_flag granted[kDevices];
  int device = 0;
  if (cudaGetDevice(&device) == cudaSuccess && device < kDevices) {
    // where this is refused the launch is too, and says so
    std::call_once(granted[device],
                   [] { cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes); });
  }
  return launch("mii_attention", kernel, {dim3(card().sms), dim3(kHopperThreads), kBytes}, stream, p);
}

template <int D>
int32_t launch_head(const AttentionParams& p, void* stream) {
  const bool extras = needs_extras(p.a);
  if (p.a.dtype == MII_BF16) {
    return extras ? launch_instance<D, hopper_prefill_kernel<__nv_bfloat16, D, true>>(p, stream)
                  : launch_instance<D, hopper_prefill_kernel<__nv_bfloat16, D, false>>(p, stream);
  }
  return extras ? launch_instance<D, hopper_prefill_kernel<__half, D, true>>(p, stream)
                : launch_instance<D, hopper_prefill_kernel<__half, D, false>>(p, stream);
}

}  // namespace

bool hopper_serves(const MiiAttention& a) {
  return (a.head_dim == 64 || a.head_dim == 128) && a.max_tokens > a.max_seqs && is_asked_for() && card().major == 9 &&
         card().minor == 0;
}

int32_t launch_hopper(const AttentionParams& p, void* stream) {
  return p.a.head_dim == 64 ? launch_head<64>(p, stream) : launch_head<128>(p, stream);
}

}  // namespace mii
