// The sum of a token's choices in a mixture of experts: equation in mii/ops/moe.py, struct in abi/moe.h (MiiMoeCombine).
#pragma once
#include "mii/abi/moe.h"
#include "mii/common.cuh"

namespace mii {

template <typename T>
struct MoeCombineArgs {
  T* out;
  const T* parts;
  const T* shared;       // or null
  const T* shared_gate;  // or null
  const int32_t* counts;  // or null
  int64_t out_stride, shared_stride;
  int tokens, packs, top_k;  // packs of a row
};

template <typename T, int N>
__global__ void __launch_bounds__(256) moe_combine(const MoeCombineArgs<T> a) {
  wait_for_previous();
  start_next();
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int token = static_cast<int>(index / a.packs), column = static_cast<int>(index % a.packs) * N;
  if (token >= a.tokens) return;
  const int64_t width = int64_t(a.packs) * N;
  float total[N] = {}, part[N];
  const int live = a.counts == nullptr ? a.tokens : a.counts[MII_NUM_TOKENS];
  if (token < live) {
    for (int j = 0; j < a.top_k; ++j) {
      unpack(part, load_pack<N>(a.parts + (int64_t(token) * a.top_k + j) * width + column));
#pragma unroll
      for (int i = 0; i < N; ++i) total[i] += part[i];
    }
    if (a.shared != nullptr) {
      const float gate = a.shared_gate == nullptr ? 1.0f : 1.0f / (1.0f + expf(-to_float(a.shared_gate[token])));
      unpack(part, load_pack<N>(a.shared + token * a.shared_stride + column));
#pragma unroll
      for (int i = 0; i < N; ++i) total[i] += gate * part[i];
    }
  }
  store_pack(a.out + token * a.out_stride + column, make_pack<T>(total));
}

}  // namespace mii
