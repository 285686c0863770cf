// Quantised blocks of GGUF files (CPU library).
#pragma once
#include "mii/abi/base.h"

// Block b of a format becomes numbers b * n .. (b + 1) * n - 1 of out, rounded to nearest even from float32.
struct MiiUnpack {
  void* out;           // [count * numbers in a block]
  const void* blocks;  // [count] blocks, one after the other
  int64_t count;
  int32_t type;        // the format's number in GGUF files; MII_UNSUPPORTED for those without code here
  int32_t dtype;
};
MII_API int32_t mii_unpack(const struct MiiUnpack* args, void* stream);
