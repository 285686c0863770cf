// Matrix products.
#pragma once
#include "mii/abi/activation.h"

// out = x @ weight^T + bias, on the CPU with a weight that mii_linear_pack packed.
struct MiiLinear {
  void* out;           // [rows, out_features], row stride out_stride
  const void* x;       // [rows, in_features], row stride x_stride
  const void* weight;
  const void* bias;    // [out_features] or null
  int64_t rows, in_features, out_features, x_stride, out_stride;
  int32_t dtype;
  void* workspace;     // CUDA: of mii_linear_workspace_bytes(), zeroed before its first use; one for calls of one stream
};
MII_API int32_t mii_linear(const struct MiiLinear* args, void* stream);

// CUDA: the product of up to 16 rows as a stream of the weight, which is row-major and contiguous. cuBLASLt serves more.
// gated: the weight's rows are [gate | up], out = act(gate product) * (up product), both rounded before.
struct MiiLinearStreamed {
  struct MiiLinear product;  // gated: out is [rows, out_features / 2]
  const void* next;          // memory that the product after this one reads, next_bytes of it, or null. About next_fetch
  int64_t next_bytes, next_fetch;  // bytes of it, evenly spread, come into the L2 cache while this product ends
  int32_t gated, activation;       // a MiiActivationKind
  int32_t parts;                   // mii_linear_wide of up to 64 rows: 0, or out is [parts, rows, out_features] floats, whose sum
                                   // over the parts, pieces of in_features, is the product; MiiNorm adds them up
};
MII_API int32_t mii_linear_streamed(const struct MiiLinearStreamed* args, void* stream);
// CUDA: the same for up to 128 rows by the tensor cores of compute capability 9.0; gates are silu or gelu (tanh, quick).
MII_API int32_t mii_linear_wide(const struct MiiLinearStreamed* args, void* stream);
MII_API int64_t mii_linear_workspace_bytes(const struct MiiLinear* args);

// CUDA: the product by cuBLASLt, of a row-major and contiguous weight and no bias, with an algorithm that mii_product_choose
// found for its shape. MII_UNSUPPORTED where the process has no cuBLASLt, pointers do not begin at whole 256 bytes, or
// cuBLASLt refuses.
enum { MII_ALGORITHM_BYTES = 64 };
struct MiiProduct {
  struct MiiLinear product;
  void* algorithm;          // [MII_ALGORITHM_BYTES]
  int64_t workspace_bytes;  // of product.workspace
};
MII_API int32_t mii_product(const struct MiiProduct* args, void* stream);

// Times the algorithms that cuBLASLt proposes for a product, over weights of one shape in turn, and writes the fastest into
// product.algorithm. Allocates and waits; no step may be captured meanwhile.
struct MiiProductChoice {
  struct MiiProduct product;
  const void* const* weights;  // [num_weights]; together more than a cache holds
  int64_t num_weights;
  int64_t patience;            // nanoseconds for which each of the best is repeated at a time
  float* times;                // [2] microseconds of a product: by the algorithm that is proposed first, and by the fastest
};
MII_API int32_t mii_product_choose(const struct MiiProductChoice* args, void* stream);

// Packs a row-major weight into the layout that mii_linear reads, once at load. Padding is zeros. The layout depends on
// dtype and instruction set only, so a packed weight is never stored.
struct MiiLinearPack {
  void* packed;        // out: of mii_linear_packed_bytes(), 64-byte aligned
  const void* weight;  // [out_features, in_features], row stride weight_stride
  int64_t in_features, out_features, weight_stride;
  int32_t dtype;
};
MII_API int32_t mii_linear_pack(const struct MiiLinearPack* args, void* stream);
MII_API int64_t mii_linear_packed_bytes(const struct MiiLinearPack* args);
