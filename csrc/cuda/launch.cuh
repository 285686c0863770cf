// The host side that every launcher shares: errors, facts about the card, dtype dispatch, launches.
#pragma once
#include <cuda_runtime.h>

#include <utility>

#include "mii/abi/base.h"
#include "mii/common.cuh"

namespace mii {

// Notes a printf-style reason for mii_last_error() (per thread) and returns `code`.
int32_t fail(int32_t code, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Facts about the current device, read once for each device.
struct Card {
  int major, minor;      // compute capability
  int sms;               // streaming multiprocessors
  int shared_per_block;  // bytes of shared memory that one CTA can be granted
};
const Card& card();

// Whether launches may overlap the kernel before them: on compute capability 9.0, not switched off by MII_NO_PDL=1.
// Newer cards run the code of sm_80, which is compiled without the waiting that an overlap needs.
bool overlap_allowed();

#define MII_REQUIRE(condition, code, ...)                    \
  do {                                                       \
    if (!(condition)) return ::mii::fail(code, __VA_ARGS__); \
  } while (0)

// Calls body with a value of the element type: dispatch_dtype(d, [&](auto tag) { using T = decltype(tag); ... }).
template <typename Body>
int32_t dispatch_dtype(int32_t dtype, Body&& body) {
  switch (dtype) {
    case MII_F32:
      return body(float{});
    case MII_F16:
      return body(__half{});
    case MII_BF16:
      return body(__nv_bfloat16{});
    default:
      return fail(MII_UNSUPPORTED, "dtype code %d is none of 0 (f32), 1 (f16), 2 (bf16)", dtype);
  }
}

inline bool aligned(const void* address, size_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

template <typename A, typename B>
constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

struct Shape {
  dim3 grid, block;
  size_t shared = 0;
  bool overlap = true;  // the kernel keeps the rules of programmatic dependent launch (common.cuh)
  int cluster = 1;      // CTAs of a cluster (Hopper)
};

// Launches kernel(args...) on the stream; an empty grid is nothing to do. Returns a MiiStatus.
template <typename... Parameters, typename... Arguments>
int32_t launch(const char* name, void (*kernel)(Parameters...), const Shape& shape, void* stream, Arguments&&... args) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return MII_OK;
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (shape.overlap && overlap_allowed()) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = shape.cluster;
    attributes[config.numAttrs].val.clusterDim.y = attributes[config.numAttrs].val.clusterDim.z = 1;
    ++config.numAttrs;
  }
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(args)...);
  if (error == cudaSuccess) return MII_OK;
  cudaGetLastError();  // an error of this launch alone must not surface in somebody else's next call
  return fail(MII_DEVICE, "%s: CUDA error %d (%s)", name, static_cast<int>(error), cudaGetErrorString(error));
}

}  // namespace mii
