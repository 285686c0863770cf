// Bulk asynchronous copies into shared memory, whose bytes barriers count (Hopper; PTX ISA, "cp.async.bulk"). Kernels that
// use them have an empty body below sm_90.
#pragma once
#include "mii/barrier.cuh"

namespace mii {

// True in one lane of a warp that is here as a whole. The compiler knows that it is one alone.
MII_DEVICE bool elect_lane() {
  uint32_t elected;
  asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\nselp.u32 %0, 1, 0, one;\n}" : "=r"(elected));
  return elected != 0;
}

// How the L2 cache treats what is read once: it goes first.
MII_DEVICE uint64_t read_once_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Copies `bytes`, a multiple of 16, between addresses that are aligned to 16; the barrier counts them.
MII_DEVICE void bulk_copy(uint32_t target, const void* source, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
               "l"(source), "r"(bytes), "r"(barrier)
               : "memory");
}
MII_DEVICE void bulk_copy(uint32_t target, const void* source, int bytes, uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          target),
      "l"(source), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// Brings `bytes`, a multiple of 16, into the L2 cache.
MII_DEVICE void bulk_prefetch(const void* source, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes) : "memory");
}

}  // namespace mii
