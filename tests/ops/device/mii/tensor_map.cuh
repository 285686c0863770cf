// Stands in for csrc/include/mii/tensor_map.cuh where device code runs on the host: boxes of 64 elements of two bytes,
// swizzled, that are there at once.
#pragma once
#include "mii/wgmma.cuh"

namespace mii {

struct TensorMap {
  const unsigned char* data;
  int64_t rows;
  int32_t columns, box_rows;
};

inline void copy_box(uint32_t target, const TensorMap* map, int column, int row, uint32_t barrier) {
  if (row < 0 || row + map->box_rows > map->rows) emulation::fail("a box reaches past the cache");
  for (int i = 0; i < map->box_rows * 8; ++i) {
    const uint32_t address = target + 16 * i;
    const unsigned char* source = map->data + (int64_t(row + i / 8) * map->columns + column + i % 8 * 8) * 2;
    std::memcpy(shared_at(address ^ (address >> 7 & 7) << 4), source, 16);
  }
  barrier_at(barrier).bytes -= map->box_rows * 128;
  barrier_at(barrier).settle();
}

}  // namespace mii
