// Joining partial results of one tile whose keys several CTAs shared: the last to arrive adds them up, in part order,
// so the sum does not depend on who that was.
//   m = max m_i,  l = sum 2^(m_i - m) l_i,  out = sum 2^(m_i - m) o_i / l     (m in units of log2)
#pragma once
#include "mii/attention_mma.cuh"
#include "mii/attention_work.cuh"

namespace mii {

// By one thread between two barriers with those that it comes for: whether they are the last of `parts`; then everything
// the others stored before is visible, and the counter is zero again.
MII_DEVICE bool arrive_last(int32_t* counter, int parts) {
  __threadfence();  // releases what all of them stored: the barrier handed it to this thread
  const bool last = atomicAdd(counter, 1) == parts - 1;
  if (last) *counter = 0;
  __threadfence();
  return last;
}
// For a CTA; `flag` is a shared word.
MII_DEVICE bool last_to_arrive(int32_t* counter, int parts, int* flag) {
  __syncthreads();
  if (threadIdx.x == 0) *flag = arrive_last(counter, parts);
  __syncthreads();
  return *flag != 0;
}
// For a warp.
MII_DEVICE bool last_warp_to_arrive(int32_t* counter, int parts) {
  __syncwarp();
  const int last = threadIdx.x % kWarp == 0 ? arrive_last(counter, parts) : 0;
  return __shfl_sync(kFullMask, last, 0) != 0;
}

// The maximum and sum of row `row` in a partial tile of kRows rows.
template <int D, int kRows>
MII_DEVICE float2* part_scale(float* part, int row) {
  return reinterpret_cast<float2*>(part + kRows * D) + row;
}

template <typename T>
MII_DEVICE void store_four(T* address, const float4& v, float factor) {
  store_pack<4>(address, make_pack<T, 4>({v.x * factor, v.y * factor, v.z * factor, v.w * factor}));
}

// One warp joins one row. part(i) is the i-th partial tile. Reads go past the L1 cache: other CTAs wrote.
template <typename T, int D, int kRows, typename PartOf>
MII_DEVICE void join_row(T* out, int row, int parts, const PartOf& part) {
  const int lane = threadIdx.x % kWarp;
  float top = -INFINITY;
  for (int i = lane; i < parts; i += kWarp) top = fmaxf(top, __ldcg(part_scale<D, kRows>(part(i), row)).x);
  top = warp_max(top);
  constexpr int kSteps = (D + 4 * kWarp - 1) / (4 * kWarp);
  float4 sum[kSteps] = {};
  float weights = 0.0f;
#pragma unroll 4
  for (int i = 0; i < parts; ++i) {
    float* tile = part(i);
    const float2 scale = __ldcg(part_scale<D, kRows>(tile, row));
    const float factor = exp2_fast(scale.x - top);
    weights += factor * scale.y;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int column = 4 * (lane + step * kWarp);
      if (column >= D) continue;
      const float4 v = __ldcg(reinterpret_cast<const float4*>(tile + row * D + column));
      sum[step].x += factor * v.x;
      sum[step].y += factor * v.y;
      sum[step].z += factor * v.z;
      sum[step].w += factor * v.w;
    }
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int column = 4 * (lane + step * kWarp);
    if (column < D) store_four<T>(out + column, sum[step], 1.0f / weights);
  }
}

// Where packed row `row` of KV head `head` of a sequence goes; rows count from the sequence's first query token.
template <typename T, int D>
MII_DEVICE T* out_row(const AttentionParams& p, int q_start, int head, int row) {
  const int token = row / p.group;
  return static_cast<T*>(p.a.out) + (q_start + token) * p.a.out_stride + (head * p.group + row - token * p.group) * D;
}
template <typename T, int D>
MII_DEVICE const T* query_row(const AttentionParams& p, int q_start, int head, int row) {
  const int token = row / p.group;
  return static_cast<const T*>(p.a.q) + (q_start + token) * p.a.q_stride + (head * p.group + row - token * p.group) * D;
}

}  // namespace mii
