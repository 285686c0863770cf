// Norms.
#pragma once
#include "mii/abi/base.h"

// With a residual: residual += x first (rounded to dtype, written back), and the residual is what is normed.
//   MII_RMS        out = round(v * rsqrt(mean(v^2) + eps)) * weight          (Llama: rounds before the weight)
//   MII_RMS_PLUS1  out = round(v * rsqrt(mean(v^2) + eps) * (1 + weight))    (Gemma: weight in float)
//   MII_LAYER      out = (v - mean) * rsqrt(var + eps) * weight + bias
// With an x_weight (which needs a residual and one of the RMS kinds) x is normed by itself, with that weight, before it
// is added; out may then be null: only the residual is wanted. With parts (CUDA) x is their sum, rounded: floats that
// mii_linear_wide left, or what the experts of a token gave, in dtype.
enum MiiNormKind { MII_RMS = 0, MII_RMS_PLUS1 = 1, MII_LAYER = 2 };
struct MiiNorm {
  void* out;           // [rows, width], row stride out_stride
  const void* x;       // [rows, width], row stride x_stride
  void* residual;      // [rows, width] contiguous, or null
  const void* weight;  // [width] or null (ones)
  const void* bias;    // [width] or null
  const void* x_weight;  // [width] or null
  int64_t rows, width, x_stride, out_stride;
  float eps;
  int32_t kind, dtype;
  const void* parts;  // [num_parts, rows, width] in place of x, strides as below, or null
  int64_t num_parts, part_stride, part_row_stride;
  int32_t parts_dtype;  // MII_F32 or dtype
};
MII_API int32_t mii_norm(const struct MiiNorm* args, void* stream);
