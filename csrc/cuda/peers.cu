// Memory that the cards of one host share, and the wait for a step that can end without its result.
#include <sched.h>

#include <cstring>

#include "launch.cuh"
#include "mii/abi/ranks.h"

namespace mii {
namespace {

static_assert(sizeof(cudaIpcMemHandle_t) == 64, "abi/ranks.h says so");

int32_t succeeded(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return MII_OK;
  cudaGetLastError();
  return fail(MII_DEVICE, "%s: CUDA error %d (%s)", what, static_cast<int>(error), cudaGetErrorString(error));
}

int32_t allocate(const MiiPeerMemory& a) {
  if (const int32_t code = succeeded("cudaMalloc", cudaMalloc(a.memory, a.bytes)); code != MII_OK) return code;
  cudaIpcMemHandle_t handle;
  int32_t code = succeeded("cudaMemset", cudaMemset(*a.memory, 0, a.bytes));
  if (code == MII_OK) code = succeeded("cudaDeviceSynchronize", cudaDeviceSynchronize());  // memset may still be under way
  if (code == MII_OK) code = succeeded("cudaIpcGetMemHandle", cudaIpcGetMemHandle(&handle, *a.memory));
  if (code == MII_OK) {
    std::memcpy(a.handle, &handle, sizeof handle);
  } else {
    cudaFree(*a.memory);
    *a.memory = nullptr;
  }
  return code;
}

int32_t open(const MiiPeerMemory& a) {
  cudaIpcMemHandle_t handle;
  std::memcpy(&handle, a.handle, sizeof handle);
  return succeeded("cudaIpcOpenMemHandle", cudaIpcOpenMemHandle(a.memory, handle, cudaIpcMemLazyEnablePeerAccess));
}

}  // namespace
}  // namespace mii

extern "C" int32_t mii_peer_memory(const MiiPeerMemory* a, void*) {
  using namespace mii;
  if (const int32_t code = succeeded("cudaSetDevice", cudaSetDevice(a->device)); code != MII_OK) return code;
  switch (a->action) {
    case MII_PEER_ALLOCATE:
      return allocate(*a);
    case MII_PEER_OPEN:
      return open(*a);
    case MII_PEER_CLOSE:
      return succeeded("cudaIpcCloseMemHandle", cudaIpcCloseMemHandle(*a->memory));
    case MII_PEER_FREE:
      return succeeded("cudaFree", cudaFree(*a->memory));
    default:
      return fail(MII_INVALID, "peer_memory: action %d", a->action);
  }
}

extern "C" int32_t mii_event_wait(const MiiEventWait* a, void*) {
  using namespace mii;
  const auto event = static_cast<cudaEvent_t>(a->event);
  for (int spin = 0;; ++spin) {
    const cudaError_t error = cudaEventQuery(event);
    // After the event too: a step that went on without a rank comes to its end.
    if (const int32_t lost = *static_cast<const volatile int32_t*>(a->lost); lost != 0) {
      return fail(MII_DEVICE, "rank %d has not come", lost - 1);
    }
    if (error != cudaErrorNotReady) return succeeded("cudaEventQuery", error);
    cudaGetLastError();
    if (spin > 100) sched_yield();
  }
}
