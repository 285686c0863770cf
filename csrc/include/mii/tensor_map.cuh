// Copies of boxes of a matrix by the copy engine (TMA; PTX ISA, "cp.async.bulk.tensor").
#pragma once
#include "mii/bulk_copy.cuh"
#include "mii/wgmma.cuh"

namespace mii {

// A tensor map (CUtensorMap), which only the driver and the copies of boxes look into.
struct alignas(128) TensorMap {
  uint64_t words[16];
};

#if defined(MII_HOPPER)

// Starts copying the box of a tensor map that begins at (column, row); tells `barrier` of its bytes.
MII_DEVICE void copy_box(uint32_t target, const TensorMap* map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          target),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
// `once`: it is read once, so that the L2 cache may drop it first.
MII_DEVICE void copy_box(uint32_t target, const TensorMap* map, int column, int row, uint32_t barrier, bool once) {
  if (!once) return copy_box(target, map, column, row, barrier);
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(target),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(read_once_policy())
      : "memory");
}

#endif  // MII_HOPPER

}  // namespace mii
