// The kernel of all attention by products of warps and the one that makes its work list, on the host, for
// tests/ops/test_attention_tiled.py.
#include "mii/abi/attention.h"
#include "mii/attention_kernel.cuh"
#include "mii/attention_plan.cuh"

namespace mii {

using Body = void (*)(const AttentionParams&, unsigned char*);

template <typename T, int D, int kBudget>
Body body_of(const MiiAttention& a) {
  return needs_extras(a) ? attend<T, D, true, kBudget> : attend<T, D, false, kBudget>;
}
template <typename T, int D>
Body body_of(const MiiAttention& a, bool large) {
  return large ? body_of<T, D, kLargeBudget>(a) : body_of<T, D, kSmallBudget>(a);
}
template <typename T>
Body body_of(const MiiAttention& a, bool large) {
  if (a.head_dim == 192) return body_of<T, 192>(a, large);
  return a.head_dim == 80 ? body_of<T, 80>(a, large) : body_of<T, 128>(a, large);
}

struct alignas(128) Line {
  char bytes[128];
};
std::vector<Line> lines(int64_t bytes) { return std::vector<Line>((bytes + 127) / 128); }

const char* run(int block, int grid, int threads, const std::function<void()>& kernel) {
  std::memset(shared, 0xff, sizeof(shared));  // NaN
  copies.assign(threads, {});
  return emulation::run(block, grid, threads, block, kernel);
}

}  // namespace mii

using namespace mii;

// A step on `ctas` CTAs, one after the other, with the shared memory of sm_90 (`large`) or sm_80; null, or why that came to
// no end.
extern "C" const char* attention_on_host(const MiiAttention* args, int ctas, bool large) {
  const Bounds bounds = {ctas};
  auto work = lines(work_bytes(*args, bounds)), space = lines(workspace_bytes(*args, bounds));
  MiiAttention a = *args;
  a.work = work.data(), a.workspace = space.data();
  AttentionParams p = {a, work_list(a, bounds), workspace(a, bounds), a.q_heads / a.kv_heads, 0, a.scale * kLog2e};
  while (1 << p.block_bits < a.block_size) ++p.block_bits;
  const PlanParams plan = {a, p.work, bounds, p.group, 0};
  if (const char* failure = run(0, 1, kPlanThreads, [&] { plan_kernel(plan); })) return failure;
  const Body body = a.dtype == MII_F16 ? body_of<__half>(a, large) : body_of<__nv_bfloat16>(a, large);
  for (int i = 0; i < ctas; ++i) {
    if (const char* failure = run(i, ctas, kAttentionThreads, [&] { body(p, shared); })) return failure;
  }
  const int32_t* counters = p.space.queue;
  const bool zero = std::all_of(counters, counters + 32 + bounds.max_chunks() + bounds.max_parts(), [](int c) { return c == 0; });
  return zero ? nullptr : "counters are not zero again";
}
