// Launches the kernel that makes attention's work list.
#include "attention.cuh"
#include "mii/attention_plan.cuh"

namespace mii {

int32_t launch_plan(const MiiAttention& a, Bounds bounds, bool may_part, void* stream) {
  const size_t shared = plan_shared(a.max_seqs);
  MII_REQUIRE(shared <= static_cast<size_t>(card().shared_per_block), MII_UNSUPPORTED,
              "attention plan: %lld sequences in a step are more than one CTA can list", (long long)a.max_seqs);
  if (shared > 48 * 1024) cudaFuncSetAttribute(plan_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  const PlanParams p = {a, work_list(a, bounds), bounds, a.q_heads / a.kv_heads, may_part ? card().sms : 0};
  return launch("mii_attention_plan", plan_kernel, {dim3(1), dim3(kPlanThreads), shared}, stream, p);
}

}  // namespace mii
