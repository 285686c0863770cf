// What every kernel here shares: element types, 16-byte packs, reductions, programmatic dependent launch.
//
// Device code only; the host side (errors, dtype dispatch, launches) is csrc/cuda/launch.cuh.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <type_traits>

namespace mii {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// ---- element types ------------------------------------------------------------------------------------------------
// Everything is computed in float; these are the only two roundings.
__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// A float rounded to T and back: for formulas that round in the middle.
template <typename T>
__device__ __forceinline__ float rounded(float value) {
  return to_float(from_float<T>(value));
}

// ---- packs: N elements moved by one instruction -------------------------------------------------------------------
template <typename T>
constexpr int kPack = 16 / sizeof(T);  // elements of a 16-byte access

template <int Bytes>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<2> {
  using type = uint16_t;
};

template <typename T, int N = kPack<T>>
struct alignas(sizeof(T) * N) Pack {
  using Bits = typename Word<sizeof(T) * N>::type;
  T data[N];

  __device__ __forceinline__ T& operator[](int i) { return data[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return data[i]; }
};

// `address` must be aligned to the pack. A plain (coherent) load: right for what the kernel before this one wrote.
template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* address) {
  using Bits = typename Pack<T, N>::Bits;
  Pack<T, N> pack;
  *reinterpret_cast<Bits*>(&pack) = *reinterpret_cast<const Bits*>(address);
  return pack;
}

// Through the read-only path: for weights and tables that nothing writes while the kernel may run.
template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load_pack_const(const T* address) {
  using Bits = typename Pack<T, N>::Bits;
  Pack<T, N> pack;
  *reinterpret_cast<Bits*>(&pack) = __ldg(reinterpret_cast<const Bits*>(address));
  return pack;
}

// To global memory; `address` must be aligned to the pack.
template <int N, typename T>
__device__ __forceinline__ void store_pack(T* address, const Pack<T, N>& pack) {
  using Bits = typename Pack<T, N>::Bits;
  const Bits bits = *reinterpret_cast<const Bits*>(&pack);
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Bits) == 16) {
    // As a plain assignment this may come out as one store for each converted pair.
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(bits.x), "r"(bits.y), "r"(bits.z),
                 "r"(bits.w)
                 : "memory");
    return;
  }
#endif
  *reinterpret_cast<Bits*>(address) = bits;
}

template <int N>
__device__ __forceinline__ void unpack(float (&out)[N], const Pack<float, N>& pack) {
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = pack[i];
}
template <int N>
__device__ __forceinline__ void unpack(float (&out)[N], const Pack<__half, N>& pack) {
  if constexpr (N == 1) {
    out[0] = __half2float(pack[0]);
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&pack.data[i]));
      out[i] = pair.x;
      out[i + 1] = pair.y;
    }
  }
}
template <int N>
__device__ __forceinline__ void unpack(float (&out)[N], const Pack<__nv_bfloat16, N>& pack) {
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = __bfloat162float(pack[i]);
}

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> make_pack(const float (&values)[N]) {
  Pack<T, N> pack;
  if constexpr (sizeof(T) == 2 && N > 1) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {  // one conversion instruction makes two elements
      if constexpr (std::is_same_v<T, __half>) {
        *reinterpret_cast<__half2*>(&pack.data[i]) = __floats2half2_rn(values[i], values[i + 1]);
      } else {
        *reinterpret_cast<__nv_bfloat162*>(&pack.data[i]) = __floats2bfloat162_rn(values[i], values[i + 1]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) pack[i] = from_float<T>(values[i]);
  }
  return pack;
}

// ---- reductions ---------------------------------------------------------------------------------------------------
// Every lane gets the result. `Width` lanes (a power of two, aligned groups) reduce together; the whole warp must
// be there.
template <int Width = kWarp>
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = Width / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullMask, value, offset);
  return value;
}
template <int Width = kWarp>
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = Width / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kFullMask, value, offset));
  }
  return value;
}

// The sum over the CTA, in every thread. All threads of the CTA call it; blockDim.x is a multiple of 32. `scratch`
// holds 32 floats of shared memory. The first barrier lets the same scratch serve call after call.
__device__ __forceinline__ float block_sum(float value, float* scratch) {
  value = warp_sum(value);
  const int warps = blockDim.x / kWarp;
  if (warps == 1) return value;
  const int lane = threadIdx.x % kWarp;
  __syncthreads();
  if (lane == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}
__device__ __forceinline__ float block_max(float value, float* scratch) {
  value = warp_max(value);
  const int warps = blockDim.x / kWarp;
  if (warps == 1) return value;
  const int lane = threadIdx.x % kWarp;
  __syncthreads();
  if (lane == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  return warp_max(lane < warps ? scratch[lane] : scratch[0]);
}

// ---- programmatic dependent launch (Hopper) -----------------------------------------------------------------------
// A kernel launched with `overlap` may start while the kernel before it still runs. Rules, for every such kernel:
//   * every thread calls wait_for_previous() before it reads or writes global memory, and before it exits;
//   * before that call a kernel may compute indices and prefetch_l2() constants, nothing else;
//   * start_next() comes after wait_for_previous(), or, as in begin(), before it: then the next kernel too does nothing
//     but prefetch before its own wait. What came two kernels ago is finished once that wait is over, since the kernel in
//     between ended only after its own.
// Without the launch attribute, and below sm_90, both are no-ops.
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void start_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Both at the start of a kernel: the kernels after this one take their places, and a product its first weights, while the
// kernels before this one still run.
__device__ __forceinline__ void begin() {
  start_next();
  wait_for_previous();
}

// Brings the line of `address` into the L2 cache; reads nothing, so it is safe before wait_for_previous().
__device__ __forceinline__ void prefetch_l2(const void* address) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

}  // namespace mii
