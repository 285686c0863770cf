// More shared memory for a kernel than it gets unasked.
#pragma once
#include <atomic>

#include "launch.cuh"

namespace mii {

// Lets a kernel have its shared memory; once for each device. `all`: its multiprocessors keep as little as they can for
// the cache, so that other kernels find room beside it.
template <auto kernel, bool all = false>
int32_t grant_shared(const char* name, int bytes) {
  static std::atomic<uint64_t> granted{0};
  MII_REQUIRE(bytes <= card().shared_per_block, MII_UNSUPPORTED, "%s: needs %d bytes of shared memory", name, bytes);
  int device = 0;
  cudaGetDevice(&device);
  if (granted.load() >> device & 1) return MII_OK;
  if (all) cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  MII_REQUIRE(error == cudaSuccess, MII_UNSUPPORTED, "%s: %d bytes of shared memory: %s", name,
              bytes, cudaGetErrorString(error));
  granted.fetch_or(uint64_t(1) << device);
  return MII_OK;
}

}  // namespace mii
