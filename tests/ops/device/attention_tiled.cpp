// The kernels of all attention by products of warps and the one that makes their work list, on the host, for
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

using DecodeBody = void (*)(const DecodeAttentionParams&, unsigned char*);

template <typename T>
DecodeBody decode_body_of(const MiiAttention& a, bool large) {
  if (a.head_dim == 80) return large ? attend_new<T, 80, kLargeBudget> : attend_new<T, 80, kSmallBudget>;
  return large ? attend_new<T, 128, kLargeBudget> : attend_new<T, 128, kSmallBudget>;
}

// With a line behind, that nobody may touch.
std::vector<Line> lines(int64_t bytes) { return std::vector<Line>((bytes + 127) / 128 + 1); }
bool untouched(const std::vector<Line>& memory) {
  return std::all_of(std::begin(memory.back().bytes), std::end(memory.back().bytes), [](char byte) { return byte == 0; });
}

const char* run(int block, int grid, int threads, const std::function<void()>& kernel) {
  std::memset(shared, 0xff, sizeof(shared));  // NaN
  copies.assign(threads, {});
  return emulation::run(block, grid, threads, block, kernel);
}

}  // namespace mii

using namespace mii;

namespace {

// The memory and the parameters of a step on `ctas` CTAs.
struct Step {
  Bounds bounds;
  MiiAttention a;
  std::vector<Line> work, space;
  AttentionParams p;

  Step(const MiiAttention& args, int ctas)
      : bounds{ctas}, a(args), work(lines(work_bytes(a, bounds))), space(lines(workspace_bytes(a, bounds))) {
    a.work = work.data(), a.workspace = space.data();
    p = {a, work_list(a, bounds), workspace(a, bounds), a.q_heads / a.kv_heads, 0, a.scale * kLog2e};
    while (1 << p.block_bits < a.block_size) ++p.block_bits;
  }
  const char* make_plan() const {
    const PlanParams plan = {a, p.work, bounds, p.group, 0};
    return run(0, 1, kPlanThreads, [&] { plan_kernel(plan); });
  }
};

}  // namespace

// The teams of a CTA in such a step.
extern "C" int teams_on_host(const MiiAttention* args, int ctas) {
  const Step step(*args, ctas);
  return step.make_plan() == nullptr ? step.p.work.header->teams : -1;
}

// A step on `ctas` CTAs, one after the other, whose threads run `body`; null, or why that came to no end.
static const char* run_step(const Step& step, int ctas, const std::function<void()>& body) {
  if (const char* failure = step.make_plan()) return failure;
  for (int i = 0; i < ctas; ++i) {
    if (const char* failure = run(i, ctas, kAttentionThreads, body)) return failure;
  }
  if (!untouched(step.work) || !untouched(step.space)) return "wrote past its memory";
  const int32_t* counters = step.p.space.queue;
  const int count = 32 + step.bounds.max_chunks() + step.bounds.max_parts();
  const bool zero = std::all_of(counters, counters + count, [](int c) { return c == 0; });
  return zero ? nullptr : "counters are not zero again";
}

// With the shared memory of sm_90 (`large`) or sm_80.
extern "C" const char* attention_on_host(const MiiAttention* args, int ctas, bool large) {
  const Step step(*args, ctas);
  const Body body = args->dtype == MII_F16 ? body_of<__half>(*args, large) : body_of<__nv_bfloat16>(*args, large);
  return run_step(step, ctas, [&] { body(step.p, shared); });
}
extern "C" const char* decode_attention_on_host(const MiiDecodeAttention* args, int ctas, bool large) {
  const MiiAttention& a = args->attention;
  const Step step(a, ctas);
  const DecodeAttentionParams n = {step.p, args->cos_sin, args->positions, args->kv_slots, int(args->max_positions)};
  const DecodeBody body = a.dtype == MII_F16 ? decode_body_of<__half>(a, large) : decode_body_of<__nv_bfloat16>(a, large);
  return run_step(step, ctas, [&] { body(n, shared); });
}
