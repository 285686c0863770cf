// Launches the Hopper kernel of prompts: heads of 64 and 128 elements on compute capability 9.0.
//
// Keys and values are copied in boxes by the copy engine (TMA) for heads of 128 elements without extras. Else threads copy
// them row by row, which is the faster way there.
#include <mutex>

#include "attention.cuh"
#include "mii/attention_hopper.cuh"
#include "tensor_map.cuh"

namespace mii {
namespace {

// A cache as [rows, head_dim] in boxes of 64 elements by `box_rows` rows; false: the driver does not make one of it.
bool encode_cache(TensorMap* map, const MiiAttention& a, const void* cache, int box_rows) {
  const int64_t rows = static_cast<int64_t>(a.num_blocks) * a.kv_heads * a.block_size;
  return encode_matrix(map, a.dtype, cache, rows, a.head_dim, a.head_dim, box_rows);
}

HopperParams with_maps(const AttentionParams& p) {
  HopperParams params = {p, {}, {}, 0};
  const int box_rows = p.a.block_size < 64 ? p.a.block_size : 64;
  const bool in_boxes = p.a.head_dim == 128 && !needs_extras(p.a) &&
                        encode_cache(&params.k, p.a, p.a.k_cache, box_rows) &&
                        encode_cache(&params.v, p.a, p.a.v_cache, box_rows);
  if (in_boxes) params.box_rows = box_rows;
  return params;
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
         card().minor == 0;
}

int32_t launch_hopper(const AttentionParams& p, void* stream) {
  const HopperParams params = with_maps(p);
  return p.a.head_dim == 64 ? launch_head<64>(params, stream) : launch_head<128>(params, stream);
}

}  // namespace mii
