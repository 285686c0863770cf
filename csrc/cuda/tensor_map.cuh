// Makes the tensor maps that copies of boxes look into.
#pragma once
#include "mii/abi/base.h"
#include "mii/tensor_map.cuh"

namespace mii {

// Whether the driver knows how.
bool makes_tensor_maps();

// A row-major matrix of a 16-bit format (a MiiDtype), its rows `stride` elements apart, in boxes of 64 elements by `box_rows`
// rows, swizzled as Panels (wgmma_layout.h) has it; outside it are zeros. False: the driver makes none of it.
bool encode_matrix(TensorMap* map, int32_t dtype, const void* data, int64_t rows, int64_t columns, int64_t stride,
                   int box_rows);

// The same as panels of 64 elements, `box_panels` of which a box has one after the other; `columns` is whole panels.
bool encode_panels(TensorMap* map, int32_t dtype, const void* data, int64_t rows, int64_t columns, int box_rows, int box_panels);

// A matrix as encode_matrix takes it, for copy_rows: of the box that it copies, the rows behind those asked for are zeros.
bool encode_rows(TensorMap* map, int32_t dtype, const void* data, int64_t rows, int64_t columns, int64_t stride, int box_rows);

}  // namespace mii
