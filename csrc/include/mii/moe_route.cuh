// Routing of a mixture of experts: equations in mii/ops/moe_routing.py, lists in abi/moe.h (MiiMoeRoute).
//
// One launch. A warp chooses for one token after the other: each lane holds every 32nd expert's score, and a choice is a
// maximum over the warp of keys that order as the scores do. The CTA that arrives last then sorts the pairs by expert: its
// warps count equal stretches of the list, the counts become places, and the warps put the pairs there, so rows ascend by
// pair within an expert and runs repeat.
#pragma once
#include "mii/abi/moe.h"
#include "mii/attention_mma.cuh"

namespace mii {

constexpr int kRouteThreads = 512;
constexpr int kRouteWarps = kRouteThreads / kWarp;
constexpr int kMostExperts = 512;  // a thread of the sorting CTA for each
constexpr int kMostChoices = 32;   // a lane for each

template <typename T>
struct MoeRouteArgs {
  int32_t* chosen;
  float* weights;
  int32_t* offsets;
  int32_t* pairs;
  int4* tiles;
  const T* logits;
  const float* bias;      // or null
  const int32_t* counts;  // or null
  int* arrived;           // 0 between launches
  int64_t logits_stride;
  int tokens, experts, top_k, scoring, renormalise, tile_rows;
  float scale;
};

MII_DEVICE int routed_tokens(const int32_t* counts, int tokens) {
  return counts == nullptr ? tokens : min(tokens, counts[MII_NUM_TOKENS]);
}

// Keys order as the floats do; above 0, which marks what is no candidate. A NaN comes first or last, by its sign.
MII_DEVICE uint32_t order_key(float value) {
  const uint32_t bits = __float_as_uint(value);
  return max(bits & 0x80000000u ? ~bits : bits | 0x80000000u, 1u);
}

// The scores of a token; lane l holds those of experts l, l + 32, ...
template <typename T, int N>
MII_DEVICE void score_experts(float (&score)[N], const MoeRouteArgs<T>& a, int token) {
  const int lane = threadIdx.x % kWarp;
  const T* logits = a.logits + token * a.logits_stride;
  float most = -INFINITY;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int e = i * kWarp + lane;
    score[i] = e < a.experts ? to_float(logits[e]) : -INFINITY;
    most = fmaxf(most, score[i]);
  }
  if (a.scoring == MII_MOE_SIGMOID) {
#pragma unroll
    for (int i = 0; i < N; ++i) score[i] = 1.0f / (1.0f + expf(-score[i]));
    return;
  }
  most = warp_max(most);
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) total += score[i] = expf(score[i] - most);
  total = warp_sum(total);
#pragma unroll
  for (int i = 0; i < N; ++i) score[i] /= total;
}

template <typename T, int N>
MII_DEVICE void choose_experts(const MoeRouteArgs<T>& a, int token) {
  const int lane = threadIdx.x % kWarp;
  float score[N];
  score_experts(score, a, token);
  uint32_t key[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int e = i * kWarp + lane;
    key[i] = e < a.experts ? order_key(score[i] + (a.bias != nullptr ? a.bias[e] : 0.0f)) : 0u;
  }
  int chosen = 0;
  float weight = 0.0f, total = 0.0f;  // of this lane's choice; of all
  for (int j = 0; j < a.top_k; ++j) {
    uint32_t best = 0;
    int at = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (key[i] > best) best = key[i], at = i;
    }
    const uint32_t most = __reduce_max_sync(kFullMask, best);
    const int e = __reduce_min_sync(kFullMask, best == most ? at * kWarp + lane : INT32_MAX);
    float value = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (e == i * kWarp + lane) value = score[i], key[i] = 0;
    }
    value = __shfl_sync(kFullMask, value, e % kWarp);
    total += value;
    if (lane == j) chosen = e, weight = value;
  }
  if (lane >= a.top_k) return;
  a.chosen[token * a.top_k + lane] = chosen;
  a.weights[token * a.top_k + lane] = weight * (a.renormalise ? a.scale / (total + 1e-20f) : a.scale);
}

// Exclusive sums over the CTA's threads in their order, and the sum of all.
MII_DEVICE int block_scan(int value, int* scratch, int& total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int sum = value;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int before = __shfl_up_sync(kFullMask, sum, offset);
    if (lane >= offset) sum += before;
  }
  __syncthreads();  // the scratch of the call before has been read
  if (lane == kWarp - 1) scratch[warp] = sum;
  __syncthreads();
  int first = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kRouteWarps; ++w) {
    if (w == warp) first = total;
    total += scratch[w];
  }
  return first + sum - value;
}

// Calls body(pair, place) for each pair of this warp's stretch of the list: the pairs of expert e get places mine[e],
// mine[e] + 1, ... in their order, and mine[e] moves on.
template <typename T, typename Body>
MII_DEVICE void each_pair(const MoeRouteArgs<T>& a, int pairs, int* mine, const Body& body) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int stretch = (pairs + kRouteThreads - 1) / kRouteThreads * kWarp;
  const int end = min(pairs, (warp + 1) * stretch);
  for (int base = warp * stretch; base < end; base += kWarp) {
    const int pair = base + lane;
    const int expert = pair < end ? __ldcg(a.chosen + pair) : -1;
    const unsigned same = __match_any_sync(kFullMask, expert);
    const int rank = __popc(same & ((1u << lane) - 1));
    int place = 0;
    if (rank == 0 && expert >= 0) {
      place = mine[expert];
      mine[expert] = place + __popc(same);
    }
    __syncwarp();
    place = __shfl_sync(kFullMask, place, __ffs(same) - 1) + rank;
    if (expert >= 0) body(pair, place);
  }
}

template <typename T>
MII_DEVICE void sort_pairs(const MoeRouteArgs<T>& a, int pairs) {
  __shared__ int places[kRouteWarps][kMostExperts];
  __shared__ int scratch[kRouteWarps];
  int* const mine = places[threadIdx.x / kWarp];
  for (int e = threadIdx.x % kWarp; e < a.experts; e += kWarp) mine[e] = 0;
  __syncwarp();
  each_pair(a, pairs, mine, [](int, int) {});
  __syncthreads();
  const int e = threadIdx.x;
  int size = 0;
  if (e < a.experts) {
    for (int w = 0; w < kRouteWarps; ++w) size += places[w][e];
  }
  int rows, tiles;
  int row = block_scan(size, scratch, rows);
  int tile = block_scan((size + a.tile_rows - 1) / a.tile_rows, scratch, tiles);
  if (e < a.experts) {
    a.offsets[e] = row;
    for (int first = 0; first < size; first += a.tile_rows) {
      a.tiles[++tile] = make_int4(e, row + first, min(a.tile_rows, size - first), 0);
    }
    for (int w = 0; w < kRouteWarps; ++w) {
      const int count = places[w][e];
      places[w][e] = row;
      row += count;
    }
  }
  if (e == 0) {
    a.offsets[a.experts] = rows;
    a.tiles[0] = make_int4(tiles, 0, 0, 0);
  }
  __syncthreads();
  each_pair(a, pairs, mine, [&](int pair, int place) { a.pairs[place] = pair; });
}

// Grid: any number of CTAs; each takes every gridDim-th run of kRouteWarps tokens.
template <typename T, int N>
__global__ void __launch_bounds__(kRouteThreads, 1) moe_route(const MoeRouteArgs<T> a) {
  __shared__ int last;
  wait_for_previous();
  start_next();
  const int tokens = routed_tokens(a.counts, a.tokens);
  for (int t = blockIdx.x * kRouteWarps + threadIdx.x / kWarp; t < tokens; t += gridDim.x * kRouteWarps) {
    choose_experts<T, N>(a, t);
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = gridDim.x == 1 || atomicAdd(a.arrived, 1) == static_cast<int>(gridDim.x) - 1;
    if (last) *a.arrived = 0;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  sort_pairs(a, tokens * a.top_k);
}

}  // namespace mii
