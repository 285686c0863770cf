// Launches the Hopper kernel of prompts: heads of 64 and 128 elements on compute capability 9.0.
#include <mutex>

#include "attention.cuh"
#include "mii/attention_hopper.cuh"
#include "tensor_map.cuh"

namespace mii {
namespace {

constexpr int kLongestBox = 64;  // rows

// A cache as [rows, head_dim] in boxes of 64 elements by `box_rows` rows; false: the driver does not make one of it.
bool encode_cache(TensorMap* map, const MiiAttention& a, const void* cache, int box_rows) {
  const int64_t rows = static_cast<int64_t>(a.num_blocks) * a.kv_heads * a.block_size;
  return encode_matrix(map, a.dtype, cache, rows, a.head_dim, a.head_dim, box_rows);
}

template <int D, void (*kernel)(HopperParams)>
int32_t launch_instance(const HopperParams& params, void* stream) {
  constexpr int kDevices = 64, kBytes = HopperShape<D>::kShared;
  static std::once_flag granted[kDevices];
  int device = 0;
  if (cudaGetDevice(&device) == cudaSuccess && device < kDevices) {
    // where this is refused the launch is too, and says so
    std::call_once(granted[device],
                   [] { cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes); });
  }
  return launch("mii_attention", kernel, {dim3(card().sms), dim3(kHopperThreads), kBytes}, stream, params);
}

template <int D>
int32_t launch_head(const HopperParams& params, void* stream) {
  const bool extras = needs_extras(params.p.a);
  if (params.p.a.dtype == MII_BF16) {
    return extras ? launch_instance<D, hopper_prefill_kernel<__nv_bfloat16, D, true>>(params, stream)
                  : launch_instance<D, hopper_prefill_kernel<__nv_bfloat16, D, false>>(params, stream);
  }
  return extras ? launch_instance<D, hopper_prefill_kernel<__half, D, true>>(params, stream)
                : launch_instance<D, hopper_prefill_kernel<__half, D, false>>(params, stream);
}

}  // namespace

bool hopper_serves(const MiiAttention& a) {
  return (a.head_dim == 64 || a.head_dim == 128) && a.max_tokens > a.max_seqs && card().major == 9 &&
         card().minor == 0 && makes_tensor_maps();
}

int32_t launch_hopper(const AttentionParams& p, void* stream) {
  HopperParams params = {p, {}, {}, p.a.block_size < kLongestBox ? p.a.block_size : kLongestBox};
  MII_REQUIRE(encode_cache(&params.k, p.a, p.a.k_cache, params.box_rows) &&
                  encode_cache(&params.v, p.a, p.a.v_cache, params.box_rows),
              MII_UNSUPPORTED, "attention: the driver makes no tensor map of %lld blocks of %d tokens for %d KV heads",
              (long long)p.a.num_blocks, p.a.block_size, p.a.kv_heads);
  return p.a.head_dim == 64 ? launch_head<64>(params, stream) : launch_head<128>(params, stream);
}

}  // namespace mii
