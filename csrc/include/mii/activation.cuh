// Gated and plain activations: equations in mii/ops/activation.py, layout in abi/activation.h (MiiActivation).
#pragma once
#include "mii/abi/activation.h"
#include "mii/common.cuh"

namespace mii {

constexpr int kActivationPacks = 2;  // packs of gate (and of up) that a thread has in flight

// x * sigmoid(z). For 16-bit types the fast exponential and division are far below the final rounding.
template <typename T>
__device__ __forceinline__ float times_sigmoid(float x, float z) {
  if constexpr (sizeof(T) == 2) {
    return __fdividef(x, 1.0f + __expf(-z));
  } else {
    return x / (1.0f + expf(-z));
  }
}

template <typename T, int Kind>
__device__ __forceinline__ float activate(float x) {
  if constexpr (Kind == MII_SILU) {
    return times_sigmoid<T>(x, x);
  } else if constexpr (Kind == MII_GELU) {
    return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
  } else if constexpr (Kind == MII_GELU_TANH) {
    // (1 + tanh u) / 2 = sigmoid(2u): no cancellation for very negative x
    return times_sigmoid<T>(x, 2.0f * 0.79788456080286536f * (x + 0.044715f * x * x * x));
  } else if constexpr (Kind == MII_GELU_QUICK) {
    return times_sigmoid<T>(x, 1.702f * x);
  } else {
    // written so that NaN stays NaN
    const float positive = x < 0.0f ? 0.0f : x;
    return Kind == MII_RELU2 ? positive * positive : positive;
  }
}

template <typename T, int Kind, int N>
__device__ __forceinline__ void activate_all(float (&x)[N]) {
#pragma unroll
  for (int e = 0; e < N; ++e) x[e] = activate<T, Kind>(x[e]);
}

template <int N>
__device__ __forceinline__ void softcap_all(float (&x)[N], float limit) {
#pragma unroll
  for (int e = 0; e < N; ++e) x[e] = limit * tanhf(x[e] / limit);
}

// `kind` is the same for every thread, so the switch costs a jump a pack.
template <typename T, int N>
__device__ __forceinline__ void activate_pack(float (&x)[N], int kind, float limit) {
  switch (kind) {
    case MII_SOFTCAP:
      return softcap_all(x, limit);
    case MII_SILU:
      return activate_all<T, MII_SILU>(x);
    case MII_GELU:
      return activate_all<T, MII_GELU>(x);
    case MII_GELU_TANH:
      return activate_all<T, MII_GELU_TANH>(x);
    case MII_GELU_QUICK:
      return activate_all<T, MII_GELU_QUICK>(x);
    case MII_RELU:
      return activate_all<T, MII_RELU>(x);
    default:
      return activate_all<T, MII_RELU2>(x);
  }
}

// act(x) for the kind that the arguments name; the same for every thread.
template <typename T>
__device__ __forceinline__ float activate_one(float x, int kind) {
  float value[1] = {x};
  activate_pack<T>(value, kind, 0.0f);
  return value[0];
}

// The same as a function that is called where it is not SiLU, so that an epilogue, which has up to 32 of these, does not have
// seven kinds at each place.
template <typename T>
__device__ __noinline__ float activate_called(float x, int kind) {
  return activate_one<T>(x, kind);
}
template <typename T>
__device__ __forceinline__ float activate_any(float x, int kind) {
  return kind == MII_SILU ? activate<T, MII_SILU>(x) : activate_called<T>(x, kind);
}

template <typename T>
struct ActivationArgs {
  T* out;
  const T* x;
  const T* bias;  // or null
  int64_t x_stride, out_stride;
  float limit;
  int count, chunks, kind;  // count: packs of an out row; chunks: CTAs of a row
};

template <typename T, int N>
__device__ __forceinline__ void add_bias(float (&x)[N], const T* bias) {
  float b[N];
  unpack(b, load_pack_const<N>(bias));
#pragma unroll
  for (int e = 0; e < N; ++e) x[e] += b[e];
}

template <typename T, int N, bool Gated>
__global__ void __launch_bounds__(256) activation_rows(const ActivationArgs<T> args) {
  wait_for_previous();
  start_next();
  const int64_t row = blockIdx.x / args.chunks;
  const int first = (blockIdx.x % args.chunks) * blockDim.x * kActivationPacks + threadIdx.x;
  const int64_t width = int64_t(args.count) * N;
  const T* x = args.x + row * args.x_stride;
  Pack<T, N> gates[kActivationPacks], ups[kActivationPacks];
#pragma unroll
  for (int p = 0; p < kActivationPacks; ++p) {
    const int i = first + p * blockDim.x;
    if (i >= args.count) continue;
    gates[p] = load_pack<N>(x + int64_t(i) * N);
    if constexpr (Gated) ups[p] = load_pack<N>(x + width + int64_t(i) * N);
  }
#pragma unroll
  for (int p = 0; p < kActivationPacks; ++p) {
    const int i = first + p * blockDim.x;
    if (i >= args.count) continue;
    float value[N];
    unpack(value, gates[p]);
    if (args.bias != nullptr) add_bias(value, args.bias + int64_t(i) * N);
    activate_pack<T>(value, args.kind, args.limit);
    if constexpr (Gated) {
      float up[N];
      unpack(up, ups[p]);
      if (args.bias != nullptr) add_bias(up, args.bias + width + int64_t(i) * N);
#pragma unroll
      for (int e = 0; e < N; ++e) value[e] *= up[e];
    }
    store_pack(args.out + row * args.out_stride + int64_t(i) * N, make_pack<T>(value));
  }
}

}  // namespace mii
