// Where rows of a head lie in shared memory for products by warps. Part of attention_mma.cuh and of what stands in for it.
#pragma once
#include <stdint.h>

namespace mii {

// Rows of one head (D elements of 2 bytes) in shared memory, laid out so that the eight rows of a matrix, at any
// 16-byte chunk, lie in different banks: chunks are swizzled where a row is whole lines of 128 bytes, else an odd
// number of chunks apart. Tiles start at multiples of 128 bytes and of 8 rows.
template <int D>
struct HeadRows {
  static_assert(D % 16 == 0, "a head is whole steps of k = 16");
  static constexpr bool kSwizzled = D % 64 == 0;
  static constexpr int kChunks = D / 8;
  static constexpr int kStride = 16 * (kSwizzled || kChunks % 2 == 1 ? kChunks : kChunks + 1);  // bytes

  MII_DEVICE static uint32_t offset(int row, int chunk) {
    return row * kStride + 16 * (kSwizzled ? chunk ^ (row & 7) : chunk);
  }
  // Where a lane points that supplies row `row` (below 16) and the left (0) or right (1) chunk of a 16-column step.
  MII_DEVICE static uint32_t lane_offset(int row, int right) { return offset(row, right); }
  // `address` (tile + lane_offset) moved to step `step` of 16 columns and on by `rows` (a multiple of 8) rows. The
  // swizzle is an exclusive or, so the step's low bits can join after it.
  MII_DEVICE static uint32_t at(uint32_t address, int step, int rows) {
    if constexpr (!kSwizzled) return address + 32 * step + rows * kStride;
    return (address ^ (32 * (step % 4))) + 128 * (step / 4) + rows * kStride;
  }
};

}  // namespace mii
