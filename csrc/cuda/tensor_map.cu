// Tensor maps by the driver's own encoder.
#include "tensor_map.cuh"

#include <cuda.h>

#include "driver.cuh"

namespace mii {
namespace {

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));

// Null: not there.
decltype(&cuTensorMapEncodeTiled) encoder() {
  static const auto found =
      reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(driver_function("cuTensorMapEncodeTiled", 12000));
  return found;
}

// By `count` sizes, strides (bytes) of all but the first, and sizes of a box.
bool encode(TensorMap* map, int32_t dtype, const void* data, int count, const cuuint64_t* sizes, const cuuint64_t* strides,
            const cuuint32_t* box) {
  if (encoder() == nullptr) return false;
  for (int i = 0; i < count; ++i) {
    if (sizes[i] == 0 || sizes[i] >= cuuint64_t(1) << 31) return false;
  }
  const cuuint32_t steps[3] = {1, 1, 1};
  const auto type = dtype == MII_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encoder()(reinterpret_cast<CUtensorMap*>(map), type, count, const_cast<void*>(data), sizes, strides, box, steps,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace

bool makes_tensor_maps() { return encoder() != nullptr; }

bool encode_matrix(TensorMap* map, int32_t dtype, const void* data, int64_t rows, int64_t columns, int64_t stride,
                   int box_rows) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)};
  return encode(map, dtype, data, 2, sizes, strides, box);
}

bool encode_panels(TensorMap* map, int32_t dtype, const void* data, int64_t rows, int64_t columns, int box_rows, int box_panels) {
  const cuuint64_t sizes[3] = {64, static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(columns / 64)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(columns) * 2, 64 * 2};
  const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(box_panels)};
  return encode(map, dtype, data, 3, sizes, strides, box);
}

bool encode_rows(TensorMap* map, int32_t dtype, const void* data, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
  // By two coordinates that both count rows: a box that begins `n` rows before the end of the first one, which has box_rows,
  // has n rows, and the second one says where they lie.
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(box_rows),
                               static_cast<cuuint64_t>(rows) + 1};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(stride) * 2, static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(box_rows), 1};
  return encode(map, dtype, static_cast<const char*>(data) - box_rows * stride * 2, 3, sizes, strides, box);
}

}  // namespace mii
