// Hopper's kernel of prompts on the host, for tests/ops/test_attention_hopper.py.
#include "mii/abi/attention.h"
#include "mii/attention_hopper.cuh"

namespace mii {

using Kernel = void (*)(HopperParams);

template <typename T>
Kernel kernel_of(const MiiAttention& a) {
  const bool extras = needs_extras(a);
  if (a.head_dim == 64) return extras ? hopper_prefill_kernel<T, 64, true> : hopper_prefill_kernel<T, 64, false>;
  return extras ? hopper_prefill_kernel<T, 128, true> : hopper_prefill_kernel<T, 128, false>;
}

TensorMap map_of(const MiiAttention& a, const void* cache, int box_rows) {
  return {static_cast<const unsigned char*>(cache), a.num_blocks * a.kv_heads * a.block_size, a.head_dim, box_rows};
}

}  // namespace mii

using namespace mii;

// Runs the items on `ctas` CTAs, one after the other; null, or why that came to no end. `counters` are 32 of the queue,
// then those of arrivals.
extern "C" const char* hopper_on_host(const MiiAttention* a, PrefillItem* items, int count, int32_t* counters, float* parts,
                               int box_rows, int ctas) {
  PlanHeader header = {0, 0, 0, count, 1};
  HopperParams all = {};
  all.p.a = *a;
  all.p.work.header = &header;
  all.p.work.items = items;
  all.p.space.queue = counters;
  all.p.space.prefill_arrived = counters + 32;
  all.p.space.prefill_parts = parts;
  all.p.group = a->q_heads / a->kv_heads;
  while (1 << all.p.block_bits < a->block_size) ++all.p.block_bits;
  all.p.unit = a->scale * kLog2e;
  all.box_rows = box_rows;
  all.k = map_of(*a, a->k_cache, box_rows);
  all.v = map_of(*a, a->v_cache, box_rows);
  const Kernel kernel = a->dtype == MII_F16 ? kernel_of<__half>(*a) : kernel_of<__nv_bfloat16>(*a);
  for (int i = 0; i < ctas; ++i) {
    std::memset(shared, 0xff, sizeof(shared));  // NaN
    copies.assign(kHopperThreads, {});
    products.assign(kHopperThreads, {});
    if (const char* failure = emulation::run(i, ctas, kHopperThreads, i, [&] { kernel(all); })) return failure;
  }
  return nullptr;
}
