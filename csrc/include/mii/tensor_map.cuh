// Copies of boxes of a matrix by the copy engine (TMA; PTX ISA, "cp.async.bulk.tensor").
#pragma once
#include "mii/wgmma.cuh"

namespace mii {

// A tensor map (CUtensorMap), which only the driver and the copies of boxes look into.
struct alignas(128) TensorMap {
  uint64_t words[16];
};

#if defined(MII_HOPPER)

// As copy_box of wgmma.cuh; `once`: read once, so that the L2 cache may drop it first.
MII_DEVICE void copy_box(uint32_t target, const TensorMap* map, int column, int row, uint32_t barrier, bool once) {
  if (!once) return copy_box(target, map, column, row, barrier);
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(target),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
      : "memory");
}

// Brings `bytes`, a multiple of 16, into the L2 cache.
MII_DEVICE void fetch_bytes(const void* source, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes) : "memory");
}

#endif  // MII_HOPPER

}  // namespace mii
