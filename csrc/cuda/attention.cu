// The C functions of attention: checks, and which kernel serves what.
#include "attention.cuh"

#include "mii/attention_mma.cuh"
#include "mii/attention_score.cuh"

#include <mutex>

namespace mii {
namespace {

// Calls body with the head size as a compile-time constant; `otherwise` where no tensor-core kernel has it.
template <typename Result, typename Body>
Result dispatch_head(int head_dim, Result otherwise, Body&& body) {
  switch (head_dim) {
    case 64:
      return body(std::integral_constant<int, 64>());
    case 80:
      return body(std::integral_constant<int, 80>());
    case 96:
      return body(std::integral_constant<int, 96>());
    case 128:
      return body(std::integral_constant<int, 128>());
    case 192:
      return body(std::integral_constant<int, 192>());
    case 256:
      return body(std::integral_constant<int, 256>());
    default:
      return otherwise;
  }
}

// CTAs of the tensor-core kernel on the current device, 0 where there is none for these shapes.
Bounds bounds_of(const MiiAttention& a) {
  const bool block_fits = a.block_size >= 16 && a.block_size <= 128 && (a.block_size & (a.block_size - 1)) == 0;
  if (a.dtype == MII_F32 || !block_fits) return {0};
  return dispatch_head(a.head_dim, Bounds{0}, [](auto head) {
    constexpr int kDevices = 64;
    static std::once_flag asked[kDevices];
    static int32_t ctas[kDevices];
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return Bounds{0};
    std::call_once(asked[device], [device] { ctas[device] = card().sms * tiled_occupancy<decltype(head)::value>(); });
    return Bounds{ctas[device]};
  });
}

int32_t check(const MiiAttention& a) {
  MII_REQUIRE(a.kv_heads > 0 && a.q_heads > 0 && a.q_heads % a.kv_heads == 0, MII_INVALID,
              "attention: %d query heads are no multiple of %d KV heads", a.q_heads, a.kv_heads);
  MII_REQUIRE(a.head_dim > 0 && a.block_size > 0, MII_INVALID, "attention: head size %d, block size %d", a.head_dim,
              a.block_size);
  MII_REQUIRE(a.dtype >= MII_F32 && a.dtype <= MII_BF16, MII_INVALID, "attention: dtype code %d is unknown", a.dtype);
  return MII_OK;
}

// Rows and pages are copied 16 bytes at a time.
bool copies_fit(const MiiAttention& a) {
  return aligned(a.out, 16) && aligned(a.q, 16) && aligned(a.k_cache, 16) && aligned(a.v_cache, 16) &&
         a.q_stride % 8 == 0 && a.out_stride % 8 == 0;
}

int log2_of(int power) {
  int bits = 0;
  while (1 << bits < power) ++bits;
  return bits;
}

AttentionParams params_of(const MiiAttention& a, Bounds bounds) {
  return {a, work_list(a, bounds), workspace(a, bounds), a.q_heads / a.kv_heads, log2_of(a.block_size), a.scale * kLog2e};
}

}  // namespace
}  // namespace mii

using namespace mii;

extern "C" {

MII_API int64_t mii_attention_work_bytes(const MiiAttention* args) {
  const Bounds bounds = bounds_of(*args);
  return bounds.ctas > 0 ? work_bytes(*args, bounds) : 0;
}

MII_API int64_t mii_attention_workspace_bytes(const MiiAttention* args) {
  const Bounds bounds = bounds_of(*args);
  return bounds.ctas > 0 ? workspace_bytes(*args, bounds) : 0;
}

MII_API int32_t mii_attention_plan(const MiiAttention* args, void* stream) {
  if (const int32_t code = check(*args)) return code;
  const Bounds bounds = bounds_of(*args);
  return bounds.ctas > 0 ? launch_plan(*args, bounds, hopper_serves(*args), stream) : MII_OK;
}

MII_API int32_t mii_attention(const MiiAttention* args, void* stream) {
  if (const int32_t code = check(*args)) return code;
  const Bounds bounds = bounds_of(*args);
  if (bounds.ctas == 0 || !copies_fit(*args)) return launch_generic(*args, stream);
  const AttentionParams p = params_of(*args, bounds);
  if (hopper_serves(*args)) {
    if (const int32_t code = launch_hopper(p, stream)) return code;
  }
  return dispatch_head(args->head_dim, int32_t(MII_UNSUPPORTED),
                       [&](auto head) { return launch_tiled<decltype(head)::value>(p, bounds, stream); });
}

MII_API int32_t mii_decode_attention(const MiiDecodeAttention* args, void* stream) {
  const MiiAttention& a = args->attention;
  if (const int32_t code = check(a)) return code;
  MII_REQUIRE(args->kv_slots != nullptr && (args->cos_sin == nullptr || (args->positions && args->max_positions > 0)),
              MII_INVALID, "decode attention: slots are missing, or positions or rows of a table of angles");
  const Bounds bounds = bounds_of(a);
  const bool fits = bounds.ctas > 0 && a.head_dim <= kAloneHead && a.q_heads / a.kv_heads <= kDecodeRows;
  if (!fits || needs_extras(a) || !copies_fit(a) || !aligned(args->cos_sin, 8) || args->max_positions > INT32_MAX) {
    return MII_UNSUPPORTED;
  }
  const DecodeAttentionParams n = {params_of(a, bounds), args->cos_sin, args->positions, args->kv_slots,
                                   static_cast<int32_t>(args->max_positions)};
  return dispatch_head(a.head_dim, int32_t(MII_UNSUPPORTED), [&](auto head) {
    constexpr int D = decltype(head)::value;
    if constexpr (D <= kAloneHead) return launch_decode<D>(n, bounds, stream);
    return int32_t(MII_UNSUPPORTED);
  });
}

}  // extern "C"
