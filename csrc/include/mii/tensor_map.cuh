// Copies of boxes of a matrix by the copy engine (TMA; PTX ISA, "cp.async.bulk.tensor").
#pragma once
#include "mii/bulk_copy.cuh"

namespace mii {

// A tensor map (CUtensorMap), which only the driver and the copies of boxes look into.
struct alignas(128) TensorMap {
  uint64_t words[16];
};

// Starts copying the box of a tensor map that begins at (column, row); tells `barrier` of its bytes.
MII_DEVICE void copy_box(uint32_t target, const TensorMap* map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          target),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
MII_DEVICE void copy_box(uint32_t target, const TensorMap* map, int column, int row, uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(target),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
      : "memory");
}

// The same of panels: a matrix by its row and its columns in 64s, of which the box begins at (panel, row).
MII_DEVICE void copy_panels(uint32_t target, const TensorMap* map, int panel, int row, uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(target),
      "l"(map), "r"(0), "r"(row), "r"(panel), "r"(barrier), "l"(policy)
      : "memory");
}

// Copies `rows` rows of a matrix from (column, row) on, and zeros up to box_rows, by a map of encode_rows.
MII_DEVICE void copy_rows(uint32_t target, const TensorMap* map, int column, int row, int rows, int box_rows, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
          target),
      "l"(map), "r"(column), "r"(box_rows - rows), "r"(row + rows), "r"(barrier)
      : "memory");
}

// Has a tensor map at hand by the time that its first box is copied.
MII_DEVICE void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

}  // namespace mii
