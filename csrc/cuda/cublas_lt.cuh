// The part of cuBLASLt that products need, as the process has it loaded: nothing is linked with it, and no header of it is
// needed. Names and numbers are those of its public interface (cuBLAS documentation, "Using the cublasLt API").
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

namespace mii {

using LtHandle = void*;
using LtObject = void*;  // a product's description, a matrix's layout, a preference
constexpr int kLtF32 = 0, kLtF16 = 2, kLtBf16 = 14;  // cudaDataType
constexpr int kLtCompute32f = 68;                    // cublasComputeType_t
constexpr int kLtTransposeA = 3;                     // cublasLtMatmulDescAttributes_t
constexpr int kLtMostWorkspace = 1;                  // cublasLtMatmulPreferenceAttributes_t
constexpr int kLtTransposed = 1;                     // cublasOperation_t

struct LtAlgorithm {
  uint64_t data[8];
};
struct LtProposal {  // cublasLtMatmulHeuristicResult_t
  LtAlgorithm algorithm;
  size_t workspace;
  int32_t status;
  float waves;
  int32_t reserved[4];
};
static_assert(sizeof(LtProposal) == 96);

// Its functions; each returns 0 where it succeeds.
struct CublasLt {
  int32_t (*create)(LtHandle*);
  int32_t (*create_product)(LtObject*, int32_t compute, int32_t scale);
  int32_t (*set_product)(LtObject, int32_t attribute, const void*, size_t);
  int32_t (*create_layout)(LtObject*, int32_t type, uint64_t rows, uint64_t columns, int64_t stride);
  int32_t (*create_preference)(LtObject*);
  int32_t (*set_preference)(LtObject, int32_t attribute, const void*, size_t);
  int32_t (*destroy_preference)(LtObject);
  int32_t (*propose)(LtHandle, LtObject product, LtObject a, LtObject b, LtObject c, LtObject d, LtObject preference,
                     int32_t most, LtProposal*, int32_t* count);
  int32_t (*multiply)(LtHandle, LtObject product, const void* alpha, const void* a, LtObject, const void* b, LtObject,
                      const void* beta, const void* c, LtObject, void* d, LtObject, const LtAlgorithm*, void* workspace,
                      size_t, cudaStream_t);
};

// Null: the process has none.
const CublasLt* cublas_lt();

}  // namespace mii
