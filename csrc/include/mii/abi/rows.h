// Rows by index: the embedding and the gather.
#pragma once
#include "mii/abi/base.h"

// out[r] = scale * table[ids[r]] + position_table[positions[r] + position_offset]   (second term only when given)
struct MiiEmbedding {
  void* out;                   // [rows, width]
  const void* table;           // [vocab, width]
  const int32_t* ids;          // [rows]
  const void* position_table;  // [max_positions, width] or null
  const int32_t* positions;    // [rows] or null
  int64_t rows, width, vocab, max_positions;
  int32_t position_offset;
  float scale;
  int32_t dtype;
};
MII_API int32_t mii_embedding(const struct MiiEmbedding* args, void* stream);

// out[r] = x[index[r]]
struct MiiGather {
  void* out;             // [rows, width] contiguous
  const void* x;         // [*, width], row stride x_stride
  const int32_t* index;  // [rows]
  int64_t rows, width, x_stride;
  int32_t dtype;
};
MII_API int32_t mii_gather(const struct MiiGather* args, void* stream);
