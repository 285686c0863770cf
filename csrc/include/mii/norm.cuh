// RMSNorm and LayerNorm with the residual addition in front: equations in abi/norm.h (MiiNorm).
//
// A row stays in registers, as packs of T: with a residual what is normed is the sum rounded to T, without one it is x,
// so nothing is lost by keeping T and half the registers are saved. Global memory is read once and written once.
#pragma once
#include "mii/abi/norm.h"
#include "mii/common.cuh"

namespace mii {

template <typename T>
struct NormArgs {
  T* out;  // null with x_weight: the residual is all that is wanted
  const T* x;
  T* residual;  // or null
  const T* weight;
  const T* bias;
  const T* x_weight;   // or null
  const void* parts;   // [num_parts, rows, width] in place of x, or null
  int64_t part_stride, part_row_stride;
  int64_t rows, x_stride, out_stride;
  int width, kind, num_parts, parts_dtype;
  float inverse_width, eps;
};

// Weight and bias applied to one normed value; see abi/norm.h for where each kind rounds.
template <typename T>
__device__ __forceinline__ float norm_affine(float value, int kind, bool has_weight, float weight, float bias) {
  if (kind == MII_RMS) value = rounded<T>(value);
  if (has_weight) value *= kind == MII_RMS_PLUS1 ? 1.0f + weight : weight;
  return value + bias;
}

// A row in registers: a thread holds packs `thread`, `thread + threads`, ... of the row's `count`.
template <typename T, int Packs>
__device__ __forceinline__ float held_squares(const Pack<T> (&v)[Packs], float mean, int thread, int threads, int count) {
  float squares = 0.0f;
#pragma unroll
  for (int p = 0; p < Packs; ++p) {
    if (thread + p * threads >= count) continue;
    float a[kPack<T>];
    unpack(a, v[p]);
#pragma unroll
    for (int e = 0; e < kPack<T>; ++e) squares += (a[e] - mean) * (a[e] - mean);
  }
  return squares;
}

template <typename T, int Packs>
__device__ __forceinline__ void load_held(Pack<T> (&v)[Packs], const T* row, int thread, int threads, int count) {
#pragma unroll
  for (int p = 0; p < Packs; ++p) {
    const int i = thread + p * threads;
    if (i < count) v[p] = load_pack<kPack<T>>(row + i * kPack<T>);
  }
}

// v = the sum of the parts of row `row`, in the order of the parts and rounded to T. The parts are of type Part, float or T.
template <typename Part, typename T, int Packs>
__device__ __forceinline__ void load_sums(Pack<T> (&v)[Packs], const NormArgs<T>& args, int64_t row, int thread, int threads,
                                          int count) {
  constexpr int N = kPack<T>, kAtOnce = 16 / sizeof(Part);
  const Part* parts = static_cast<const Part*>(args.parts) + row * args.part_row_stride;
#pragma unroll
  for (int p = 0; p < Packs; ++p) {
    const int i = thread + p * threads;
    if (i >= count) continue;
    float sums[N] = {};
#pragma unroll 4
    for (int part = 0; part < args.num_parts; ++part) {
      const Part* from = parts + part * args.part_stride + i * N;
#pragma unroll
      for (int first = 0; first < N; first += kAtOnce) {
        float values[kAtOnce];
        unpack(values, load_pack<kAtOnce>(from + first));
#pragma unroll
        for (int e = 0; e < kAtOnce; ++e) sums[first + e] += values[e];
      }
    }
    v[p] = make_pack<T>(sums);
  }
}

// v += r, rounded to T, which becomes the residual.
template <typename T, int Packs>
__device__ __forceinline__ void add_held(T* residual, Pack<T> (&v)[Packs], const Pack<T> (&r)[Packs], int thread, int threads,
                                         int count) {
  constexpr int N = kPack<T>;
#pragma unroll
  for (int p = 0; p < Packs; ++p) {
    const int i = thread + p * threads;
    if (i >= count) continue;
    float a[N], b[N];
    unpack(a, v[p]);
    unpack(b, r[p]);
#pragma unroll
    for (int e = 0; e < N; ++e) a[e] += b[e];
    v[p] = make_pack<T>(a);
    store_pack(residual + i * N, v[p]);
  }
}

// The norm of v, into row `row` of args.out. sum_over_row(value) adds up the values of all threads that hold the row.
template <typename T, int Packs, typename Sum>
__device__ __forceinline__ void norm_held(const NormArgs<T>& args, int64_t row, const Pack<T> (&v)[Packs], int thread,
                                          int threads, int count, Sum sum_over_row) {
  constexpr int N = kPack<T>;
  Pack<T> w[Packs];
  if (args.weight != nullptr) {
#pragma unroll
    for (int p = 0; p < Packs; ++p) {
      const int i = thread + p * threads;
      if (i < count) w[p] = load_pack_const<N>(args.weight + i * N);
    }
  }

  float mean = 0.0f;
  if (args.kind == MII_LAYER) {
    float sum = 0.0f;
#pragma unroll
    for (int p = 0; p < Packs; ++p) {
      if (thread + p * threads >= count) continue;
      float a[N];
      unpack(a, v[p]);
#pragma unroll
      for (int e = 0; e < N; ++e) sum += a[e];
    }
    mean = sum_over_row(sum) * args.inverse_width;
  }
  const float squares = sum_over_row(held_squares<T>(v, mean, thread, threads, count));
  const float scale = rsqrtf(squares * args.inverse_width + args.eps);

#pragma unroll
  for (int p = 0; p < Packs; ++p) {
    const int i = thread + p * threads;
    if (i >= count) continue;
    float a[N], weight[N] = {}, bias[N] = {};
    unpack(a, v[p]);
    if (args.weight != nullptr) unpack(weight, w[p]);
    if (args.bias != nullptr) unpack(bias, load_pack_const<N>(args.bias + i * N));
#pragma unroll
    for (int e = 0; e < N; ++e) {
      a[e] = norm_affine<T>((a[e] - mean) * scale, args.kind, args.weight != nullptr, weight[e], bias[e]);
    }
    store_pack(args.out + row * args.out_stride + i * N, make_pack<T>(a));
  }
}

constexpr int kWarpRowThreads = 128;  // four rows a CTA

constexpr int norm_threads(int packs, bool warp_rows) { return warp_rows ? kWarpRowThreads : packs == 1 ? 1024 : 512; }

// What is added: x, x normed with an x_weight, a sum of floats, a sum of values of T.
enum NormSource { kNormX, kNormNormedX, kNormFloats, kNormParts };

// One row for each CTA, or with WarpRows one row for each warp. A thread holds Packs packs of 16 bytes, `threads` apart.
template <typename T, int Packs, bool WarpRows, NormSource Source>
__global__ void __launch_bounds__(norm_threads(Packs, WarpRows)) norm_rows(const NormArgs<T> args) {
  constexpr int N = kPack<T>;
  __shared__ float scratch[kWarp];
  const int threads = WarpRows ? kWarp : blockDim.x;
  const int thread = WarpRows ? threadIdx.x % kWarp : threadIdx.x;
  const int64_t row = WarpRows ? int64_t(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp : blockIdx.x;
  const int count = args.width / N;
  if (blockIdx.x == 0 && args.weight != nullptr) {
    // The weight was last used a whole step ago: fetch it while the kernel before this one ends.
    for (int i = threadIdx.x; i * 128 < args.width * int(sizeof(T)); i += blockDim.x) {
      prefetch_l2(reinterpret_cast<const char*>(args.weight) + i * 128);
    }
  }
  begin();
  if (WarpRows && row >= args.rows) return;  // whole warps; no CTA barrier follows

  const auto sum_over_row = [&](float value) { return WarpRows ? warp_sum(value) : block_sum(value, scratch); };
  Pack<T, N> v[Packs];
  if constexpr (Source == kNormFloats) {
    load_sums<float>(v, args, row, thread, threads, count);
  } else if constexpr (Source == kNormParts) {
    load_sums<T>(v, args, row, thread, threads, count);
  } else {
    load_held<T>(v, args.x + row * args.x_stride, thread, threads, count);
  }
  if constexpr (Source == kNormNormedX) {
    const float squares = sum_over_row(held_squares<T>(v, 0.0f, thread, threads, count));
    const float scale = rsqrtf(squares * args.inverse_width + args.eps);
#pragma unroll
    for (int p = 0; p < Packs; ++p) {
      const int i = thread + p * threads;
      if (i >= count) continue;
      float a[N], weight[N];
      unpack(a, v[p]);
      unpack(weight, load_pack_const<N>(args.x_weight + i * N));
#pragma unroll
      for (int e = 0; e < N; ++e) a[e] = norm_affine<T>(a[e] * scale, args.kind, true, weight[e], 0.0f);
      v[p] = make_pack<T>(a);
    }
  }
  if (args.residual != nullptr) {
    T* residual = args.residual + row * args.width;
    Pack<T, N> r[Packs];
    load_held<T>(r, residual, thread, threads, count);
    add_held<T>(residual, v, r, thread, threads, count);
  }
  if (Source == kNormNormedX && args.out == nullptr) return;
  norm_held<T>(args, row, v, thread, threads, count, sum_over_row);
}

// Any width and alignment, element by element, one row for each CTA. A thread reads back only what it wrote itself, so
// out may be x here too.
template <typename T>
__global__ void __launch_bounds__(256) norm_rows_any(const NormArgs<T> args) {
  __shared__ float scratch[kWarp];
  wait_for_previous();
  start_next();
  const int64_t row = blockIdx.x;
  const T* v = args.x + row * args.x_stride;
  const auto sum_of_squares = [&](float mean) {
    float squares = 0.0f;
    for (int i = threadIdx.x; i < args.width; i += blockDim.x) {
      const float value = to_float(v[i]) - mean;
      squares += value * value;
    }
    return block_sum(squares, scratch);
  };
  float x_scale = 1.0f;
  if (args.x_weight != nullptr) x_scale = rsqrtf(sum_of_squares(0.0f) * args.inverse_width + args.eps);
  if (args.residual != nullptr) {
    T* residual = args.residual + row * args.width;
    for (int i = threadIdx.x; i < args.width; i += blockDim.x) {
      float x = to_float(v[i]);
      if (args.x_weight != nullptr) {
        x = rounded<T>(norm_affine<T>(x * x_scale, args.kind, true, to_float(args.x_weight[i]), 0.0f));
      }
      residual[i] = from_float<T>(to_float(residual[i]) + x);
    }
    v = residual;
  }
  if (args.out == nullptr) return;
  float mean = 0.0f;
  if (args.kind == MII_LAYER) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < args.width; i += blockDim.x) sum += to_float(v[i]);
    mean = block_sum(sum, scratch) * args.inverse_width;
  }
  const float scale = rsqrtf(sum_of_squares(mean) * args.inverse_width + args.eps);
  T* out = args.out + row * args.out_stride;
  const bool has_weight = args.weight != nullptr;
  for (int i = threadIdx.x; i < args.width; i += blockDim.x) {
    const float weight = has_weight ? to_float(args.weight[i]) : 0.0f;
    const float bias = args.bias != nullptr ? to_float(args.bias[i]) : 0.0f;
    out[i] = from_float<T>(norm_affine<T>((to_float(v[i]) - mean) * scale, args.kind, has_weight, weight, bias));
  }
}

}  // namespace mii
