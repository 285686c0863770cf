// Norms.
#pragma once
#include "mii/abi/base.h"

// With a residual: residual += x first (rounded to dtype, written back), and the residual is what is normed.
//   MII_RMS        out = round(v * rsqrt(mean(v^2) + eps)) * weight          (Llama: rounds before the weight)
//   MII_RMS_PLUS1  out = round(v * rsqrt(mean(v^2) + eps) * (1 + weight))    (Gemma: weight in float)
//   MII_LAYER      out = (v - mean) * rsqrt(var + eps) * weight + bias
// With an x_weight (which needs a residual and one of the RMS kinds) x is normed by itself, with that weight, before it
// is added; out may then be null: only the residual is wanted. With parts (CUDA, 16-bit formats) x is the sum of these floats,
// rounded, what mii_linear_wide left.
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
  const float* parts;  // [num_parts, rows, width] in place of x, or null
  int64_t num_parts;
};
MII_API int32_t mii_norm(const struct MiiNorm* args, void* stream);
