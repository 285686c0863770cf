// Where a tile of rows of a head lies in shared memory for Hopper's warpgroup products, and how a descriptor says so.
//
// A tile of kRows rows of D elements (2 bytes) is D / 64 panels of [kRows, 128 bytes] one after the other; within a
// panel the 16-byte chunks of a row are swizzled by the row's low three bits ("128-byte swizzle", PTX ISA, "Matrix
// descriptor format"; tiles start at multiples of 1,024 bytes). One layout serves both operands:
//   * rows as M or N, elements as k (Q and K): groups of 8 rows lie kStrideBytes apart, 16 elements on are 32 bytes on;
//   * elements as N, rows as k (V, "transposed"): groups of 8 rows lie kStrideBytes apart, panels kPanelBytes.
#pragma once
#include <stdint.h>

namespace mii {

template <int kRows, int D>
struct Panels {
  static_assert(D % 64 == 0 && kRows % 8 == 0, "a panel is 64 elements wide and whole groups of 8 rows high");
  static constexpr int kChunks = D / 8;  // of 16 bytes in a row
  static constexpr int kPanelBytes = kRows * 128;
  static constexpr int kStrideBytes = 8 * 128;
  static constexpr int kBytes = D / 64 * kPanelBytes;

  static constexpr uint32_t offset(int row, int chunk) {
    return chunk / 8 * kPanelBytes + row * 128 + 16 * ((chunk % 8) ^ (row % 8));
  }
  // Start of the operand with the elements 16 step .. 16 step + 15 of the rows from `row` on (a multiple of 8).
  static constexpr uint32_t elements_at(int row, int step) {
    return step / 4 * kPanelBytes + row * 128 + step % 4 * 32;
  }
  // Start of the operand with the rows 16 step .. 16 step + 15, all elements.
  static constexpr uint32_t rows_at(int step) { return step * 16 * 128; }
};

// `leading` (bytes between panels, used where elements are N) and `stride` (bytes between groups of 8 rows).
constexpr uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  return kSwizzle128 | uint64_t(stride >> 4) << 32 | uint64_t(leading >> 4) << 16 | (address & 0x3ffff) >> 4;
}
// The same operand `bytes` further on; the sum stays below the 18 bits of a shared address.
constexpr uint64_t advanced(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

}  // namespace mii
