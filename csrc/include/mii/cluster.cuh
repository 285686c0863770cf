// Thread block clusters (Hopper): CTAs that run together and read one another's shared memory.
//
// Below sm_90, and in a launch without clusters, a cluster is one CTA.
#pragma once
#include <stdint.h>

namespace mii {

__device__ __forceinline__ int cluster_size() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return static_cast<int>(__clusterSizeInBlocks());
#else
  return 1;
#endif
}

__device__ __forceinline__ int cluster_rank() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return static_cast<int>(__clusterRelativeBlockRank());
#else
  return 0;
#endif
}

// Every thread of the cluster waits for all others and sees what they wrote before.
__device__ __forceinline__ void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The address in the shared memory of the CTA of that rank which is laid out like `own` here.
template <typename T>
__device__ __forceinline__ const T* remote(const T* own, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return static_cast<const T*>(__cluster_map_shared_rank(own, rank));
#else
  (void)rank;
  return own;
#endif
}

}  // namespace mii
