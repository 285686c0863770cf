// mii_sample of libmii_cuda.so.
#include "launch.cuh"
#include "mii/sampler.cuh"

namespace mii::sampler {
namespace {

// CTAs for a row: few rows are spread wide, many rows keep about 16 thousand tokens for each CTA. Cards newer than
// Hopper run the code of sm_80, which knows no clusters.
int cluster_size_for(const MiiSample& a) {
  if (card().major != 9) return 1;
  const int64_t share = a.rows <= 16 ? 4096 : 16384;
  int size = 1;
  while (size < kMaxCluster && size * share < a.vocab) size *= 2;
  return size;
}

template <typename T>
int32_t launch_rows(const MiiSample& a, void* stream) {
  const int size = cluster_size_for(a);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(a.rows * size));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = size;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  config.attrs = size > 1 ? attributes : attributes + 1;
  config.numAttrs = (size > 1 ? 1 : 0) + (overlap_allowed() ? 1 : 0);
  const cudaError_t error = cudaLaunchKernelEx(&config, sample_kernel<T>, a);
  if (error == cudaSuccess) return MII_OK;
  cudaGetLastError();
  return fail(MII_DEVICE, "sample: CUDA error %d (%s)", static_cast<int>(error), cudaGetErrorString(error));
}

}  // namespace
}  // namespace mii::sampler

extern "C" {

int32_t mii_sample(const MiiSample* args, void* stream) {
  const MiiSample& a = *args;
  MII_REQUIRE(a.vocab >= 1 && a.vocab <= mii::kMaxVocab, MII_INVALID,
              "sample takes a vocabulary of 1 to %lld, not %lld", static_cast<long long>(mii::kMaxVocab),
              static_cast<long long>(a.vocab));
  if (a.rows == 0) return MII_OK;
  return mii::dispatch_dtype(a.dtype, [&](auto tag) { return mii::sampler::launch_rows<decltype(tag)>(a, stream); });
}

int64_t mii_sample_workspace_bytes(const MiiSample*) { return 0; }

}  // extern "C"
