// In place of csrc/include/mii/tensor_map.cuh: boxes land in pieces, in any order.
#pragma once
#include "mii/bulk_copy.cuh"

namespace mii {

struct TensorMap {
  const Half* data;
  int64_t rows, columns, stride;
  int box_rows;
  int box_panels;
  bool constant;  // there before the kernel before this one has ended
};

constexpr int kBoxColumns = 64, kPieceRows = 8;

// As encode_matrix of csrc/cuda/tensor_map.cuh, under the driver's conditions.
inline TensorMap map_matrix(const Half* data, int64_t rows, int64_t columns, int64_t stride, int box_rows, bool constant) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0;
  if (!aligned || rows <= 0 || columns <= 0 || box_rows > 256) card::refuse("no tensor map of such a matrix");
  return {data, rows, columns, stride, box_rows, 1, constant};
}

// Rows `row` .. `row` + 7 of a matrix, from a column on; outside of it are zeros. The swizzle goes by shared addresses.
inline void land_piece(const TensorMap& map, uint32_t target, int column, int row) {
  for (int i = 0; i < kPieceRows * kBoxColumns; ++i) {
    const int64_t r = row + i / kBoxColumns, c = column + i % kBoxColumns;
    const bool inside = r >= 0 && r < map.rows && c >= 0 && c < map.columns;
    const Half value = inside ? map.data[r * map.stride + c] : Half{0};
    const uint32_t plain = target + 2 * i, address = plain ^ (plain >> 7 & 7) << 4;
    std::memcpy(card::shared + address, &value, sizeof value);
    card::written[address / 16] = 0;
  }
}

inline void copy_box(uint32_t target, const TensorMap* map, int column, int row, uint32_t barrier, uint64_t = 0) {
  constexpr int kBytes = kPieceRows * kBoxColumns * sizeof(Half);
  if (!map->constant) card::must_have_waited();
  if (target % 1024) card::refuse("a box does not begin where its swizzle does");
  if (target + map->box_rows / kPieceRows * kBytes > card::kSharedBytes) card::refuse("a box leaves shared memory");
  for (int i = 0; i < map->box_rows / kPieceRows; ++i) {
    const auto land = [=, map = *map] { land_piece(map, target + i * kBytes, column, row + i * kPieceRows); };
    card::begin({land, kBytes, barrier});
  }
}

// As encode_rows of csrc/cuda/tensor_map.cuh.
inline void copy_rows(uint32_t target, const TensorMap* map, int column, int row, int rows, int box_rows, uint32_t barrier) {
  if (box_rows != map->box_rows || rows < 1 || rows > box_rows || row + rows > map->rows) card::refuse("no such rows");
  TensorMap cut = *map;
  cut.rows = row + rows;
  copy_box(target, &cut, column, row, barrier);
}

// As encode_panels of csrc/cuda/tensor_map.cuh.
inline TensorMap map_panels(const Half* data, int64_t rows, int64_t columns, int box_rows, int box_panels, bool constant) {
  if (columns % kBoxColumns) card::refuse("columns are not whole panels");
  TensorMap map = map_matrix(data, rows, columns, columns, box_rows, constant);
  map.box_panels = box_panels;
  return map;
}
inline void copy_panels(uint32_t target, const TensorMap* map, int panel, int row, uint32_t barrier, uint64_t) {
  for (int i = 0; i < map->box_panels; ++i) {
    copy_box(target + i * map->box_rows * kBoxColumns * sizeof(Half), map, (panel + i) * kBoxColumns, row, barrier);
  }
}

inline void prefetch_map(const TensorMap*) {}

}  // namespace mii
