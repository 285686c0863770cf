// What the kernels of norms read, from the struct of abi/norm.h.
#pragma once
#include "mii/norm.cuh"

namespace mii {

template <typename T>
NormArgs<T> norm_args(const MiiNorm& a) {
  return {static_cast<T*>(a.out),
          static_cast<const T*>(a.x),
          static_cast<T*>(a.residual),
          static_cast<const T*>(a.weight),
          static_cast<const T*>(a.bias),
          static_cast<const T*>(a.x_weight),
          a.parts,
          a.part_stride,
          a.part_row_stride,
          a.rows,
          a.x_stride,
          a.out_stride,
          static_cast<int>(a.width),
          a.kind,
          static_cast<int>(a.num_parts),
          a.parts_dtype,
          1.0f / static_cast<float>(a.width),
          a.eps};
}

}  // namespace mii
