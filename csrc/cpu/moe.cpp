// Mixture of experts in libmii_cpu.so: argument checks, then the kernel table of the chosen instruction set.
#include "cpu.h"
#include "mii/abi/moe.h"

namespace mii::cpu {
namespace {

int32_t check(const char* operation, int32_t dtype, int32_t experts, int32_t top_k) {
  if (dtype != MII_F32 && dtype != MII_F16 && dtype != MII_BF16)
    return fail(MII_INVALID, "%s takes dtype codes 0 (float32), 1 (float16) and 2 (bfloat16), not %d", operation, dtype);
  if (top_k < 1 || top_k > experts)
    return fail(MII_INVALID, "%s: a token cannot go to %d of %d experts", operation, top_k, experts);
  return MII_OK;
}

int64_t tokens_of(const int32_t* counts, int64_t most) {
  return counts != nullptr && counts[MII_NUM_TOKENS] < most ? counts[MII_NUM_TOKENS] : most;
}

int32_t product(const char* operation, const MiiMoeLinear& a, bool gated) {
  const int32_t status = check(operation, a.dtype, a.experts, a.top_k);
  return status != MII_OK ? status : active_kernels().moe_linear(a, gated);
}

}  // namespace
}  // namespace mii::cpu

using namespace mii::cpu;

extern "C" {

int32_t mii_moe_route(const MiiMoeRoute* args, void*) {
  const int32_t status = check("moe_route", args->dtype, args->experts, args->top_k);
  if (status != MII_OK) return status;
  if (args->tile_rows < 1) return fail(MII_INVALID, "moe_route needs tiles of at least one row, not %d", args->tile_rows);
  if (args->groups < 1 || args->experts % args->groups != 0 || args->top_groups < 1 || args->top_groups > args->groups ||
      args->top_k > args->experts / args->groups * args->top_groups)
    return fail(MII_INVALID, "moe_route: %d of %d groups of %d experts, of which a token goes to %d", args->top_groups,
                args->groups, args->experts, args->top_k);
  return active_kernels().moe_route(*args, tokens_of(args->counts, args->tokens));
}

int32_t mii_moe_up(const MiiMoeLinear* args, void*) {
  if (args->activation < MII_SILU || args->activation > MII_RELU2)
    return fail(MII_INVALID, "moe_up takes activations 0 to %d, not %d", MII_RELU2, args->activation);
  return product("moe_up", *args, true);
}

int32_t mii_moe_down(const MiiMoeLinear* args, void*) { return product("moe_down", *args, false); }

int32_t mii_moe_combine(const MiiMoeCombine* args, void*) {
  const int32_t status = check("moe_combine", args->dtype, args->top_k, args->top_k);
  return status != MII_OK ? status : active_kernels().moe_combine(*args, tokens_of(args->counts, args->tokens));
}

int32_t mii_moe_pack(const MiiMoePack* args, void*) {
  const int32_t status = check("moe_pack", args->dtype, 1, 1);
  return status != MII_OK ? status : active_kernels().moe_pack(*args);
}

int64_t mii_moe_packed_bytes(const MiiMoePack* args) { return active_kernels().moe_packed_bytes(*args); }

}  // extern "C"
