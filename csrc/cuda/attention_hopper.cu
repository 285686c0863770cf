// Launches the Hopper kernel of prompts: heads of 64 and 128 elements on compute capability 9.0.
//
// Keys and values are copied in boxes by the copy engine (TMA) for heads of 128 elements without extras. Else threads copy
// them row by row, which is the faster way there.
#include <cuda.h>

#include <mutex>

#include "attention.cuh"
#include "mii/attention_hopper.cuh"

namespace mii {
namespace {

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));

// cuTensorMapEncodeTiled by way of the runtime, so that nothing has to be linked with the driver; null: not there.
decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess) cudaGetLastError();
    const bool found = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found ? entry : nullptr);
  }();
  return encoder;
}

// A cache as [rows, head_dim] in boxes of 64 elements by `box_rows` rows; false: the driver does not make one of it.
bool encode_cache(TensorMap* map, const MiiAttention& a, const void* cache, int box_rows) {
  const auto encode = tensor_map_encoder();
  const cuuint64_t rows = static_cast<cuuint64_t>(a.num_blocks) * a.kv_heads * a.block_size;
  if (encode == nullptr || rows == 0 || rows >= cuuint64_t(1) << 31) return false;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(a.head_dim), rows};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(a.head_dim) * 2};  // bytes
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const auto type = a.dtype == MII_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode(reinterpret_cast<CUtensorMap*>(map), type, 2, const_cast<void*>(cache), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
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
