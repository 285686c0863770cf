// Activations.
#pragma once
#include "mii/abi/base.h"

// gated: x row = [gate | up], each `width` wide, out = act(gate) * up.  Not gated: out = act(x).  bias is added to x first.
// A soft cap is limit * tanh(x / limit); the others leave `limit` unread.
enum MiiActivationKind {
  MII_SILU = 0,
  MII_GELU = 1,
  MII_GELU_TANH = 2,
  MII_RELU = 3,
  MII_GELU_QUICK = 4,
  MII_RELU2 = 5,
  MII_SOFTCAP = 6
};
struct MiiActivation {
  void* out;         // [rows, width], row stride out_stride
  const void* x;     // [rows, width or 2 width], row stride x_stride
  const void* bias;  // [width or 2 width] or null
  int64_t rows, width, x_stride, out_stride;
  float limit;
  int32_t kind, gated, dtype;
};
MII_API int32_t mii_activation(const struct MiiActivation* args, void* stream);
