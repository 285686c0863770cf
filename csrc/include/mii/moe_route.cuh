// Routing of a mixture of experts: equations in mii/ops/moe_routing.py, lists in abi/moe.h (MiiMoeRoute).
//
// A CTA has a chunk of the tokens, a warp of it one token after the other: each lane holds N neighbouring experts' scores,
// and a choice is a maximum over the warp of keys that order as the scores do. A token chooses an expert once at most, so
// the chunk's pairs of an expert are a set of bits, one for each token: its size is a count of bits, and a pair's rank
// among them the count of those below its own. Rows ascend by pair within an expert, and runs repeat.
//
// A chunk that is all there is gets its rows at once. Of several, moe_route leaves how many pairs each has of each expert,
// and a second launch, moe_place, adds up those before its own.
#pragma once
#include "mii/abi/moe.h"
#include "mii/attention_mma.cuh"

namespace mii {

constexpr int kRouteThreads = 512;
constexpr int kRouteWarps = kRouteThreads / kWarp;
constexpr int kMostExperts = 512;  // a thread for each
constexpr int kMostChoices = 32;   // a lane for each
constexpr int kMostGroups = 32;    // a lane for each
constexpr int kLeastChunk = MII_MOE_CHUNK, kMostChunk = 64;  // tokens of a CTA

template <typename T>
struct MoeRouteArgs {
  int32_t* chosen;
  float* weights;
  int32_t* offsets;
  int32_t* pairs;
  int32_t* places;
  int4* tiles;
  const T* logits;
  const float* bias;      // or null
  const int32_t* counts;  // or null
  uint32_t* sizes;        // [chunks][(experts + 1) / 2]: two experts' numbers of pairs each
  int64_t logits_stride;
  int tokens, chunk, experts, top_k, scoring, renormalise, tile_rows, groups, top_groups;
  float scale;
};

MII_DEVICE int routed_tokens(const int32_t* counts, int tokens) {
  return counts == nullptr ? tokens : min(tokens, counts[MII_NUM_TOKENS]);
}

// The tokens of a CTA, and in how many chunks there are any; of none the first CTA has to say so.
struct RouteChunk {
  int first, tokens, chunks;

  template <typename T>
  MII_DEVICE explicit RouteChunk(const MoeRouteArgs<T>& a) {
    const int live = routed_tokens(a.counts, a.tokens);
    first = blockIdx.x * a.chunk;
    tokens = max(0, min(a.chunk, live - first));
    chunks = max(1, (live + a.chunk - 1) / a.chunk);
  }
  MII_DEVICE bool idle() const { return static_cast<int>(blockIdx.x) >= chunks; }
};

// ---- the choice -----------------------------------------------------------------------------------------------------
// Keys order as the floats do; above 0, which marks what is no candidate. A NaN comes first or last, by its sign.
MII_DEVICE uint32_t order_key(float value) {
  const uint32_t bits = __float_as_uint(value);
  return max(bits & 0x80000000u ? ~bits : bits | 0x80000000u, 1u);
}

// The lowest of the lanes that hold the largest key.
MII_DEVICE int lane_of_largest(uint32_t key) {
  const uint32_t most = __reduce_max_sync(kFullMask, key);
  return __ffs(__ballot_sync(kFullMask, key == most)) - 1;
}

// The scores of a token; lane l holds those of experts N * l, N * l + 1, ...
template <typename T, int N>
MII_DEVICE void score_experts(float (&score)[N], const MoeRouteArgs<T>& a, int token) {
  const int first = threadIdx.x % kWarp * N;
  const T* logits = a.logits + token * a.logits_stride;
  float most = -INFINITY;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    score[i] = first + i < a.experts ? to_float(logits[first + i]) : -INFINITY;
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

// What a lane knows of a group of experts: its two largest values.
struct TopTwo {
  float first = -INFINITY, second = -INFINITY;

  MII_DEVICE void add(float value) {
    second = fmaxf(second, fminf(first, value));
    first = fmaxf(first, value);
  }
};

// Takes the keys of all groups but the best away: a group counts by its largest value, or with sigmoid scores by the sum
// of its two largest.
template <typename T, int N>
MII_DEVICE void keep_best_groups(uint32_t (&key)[N], const float (&value)[N], const MoeRouteArgs<T>& a) {
  const int lane = threadIdx.x % kWarp, size = a.experts / a.groups;
  uint32_t mine = 0;  // of the group that has this lane's number
  for (int group = 0; group < a.groups; ++group) {
    TopTwo top;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int e = lane * N + i;
      if (e < a.experts && e / size == group) top.add(value[i]);
    }
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const float first = __shfl_xor_sync(kFullMask, top.first, offset);
      const float second = __shfl_xor_sync(kFullMask, top.second, offset);
      top.add(first), top.add(second);
    }
    const bool two = a.scoring == MII_MOE_SIGMOID && size > 1;
    if (lane == group) mine = order_key(two ? top.first + top.second : top.first);
  }
  uint32_t kept = 0;  // bits
  for (int j = 0; j < a.top_groups; ++j) {
    const int best = lane_of_largest(mine);
    kept |= 1u << best;
    if (lane == best) mine = 0;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int group = (lane * N + i) / size;
    if (group >= a.groups || (kept >> group & 1) == 0) key[i] = 0;
  }
}

// Writes a token's choices and their weights; lane j returns choice j.
template <typename T, int N>
MII_DEVICE int choose_experts(const MoeRouteArgs<T>& a, int token) {
  const int lane = threadIdx.x % kWarp;
  float score[N], value[N];
  uint32_t key[N];
  score_experts(score, a, token);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int e = lane * N + i;
    value[i] = score[i] + (a.bias != nullptr && e < a.experts ? a.bias[e] : 0.0f);
    key[i] = e < a.experts ? order_key(value[i]) : 0u;
  }
  if (a.groups > 1) keep_best_groups(key, value, a);
  int chosen = 0;
  for (int j = 0; j < a.top_k; ++j) {
    uint32_t best = 0;
    int at = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (key[i] > best) best = key[i], at = i;
    }
    const int winner = lane_of_largest(best), e = __shfl_sync(kFullMask, lane * N + at, winner);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (lane == winner && i == at) key[i] = 0;
    }
    if (lane == j) chosen = e;
  }
  float weight = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float candidate = __shfl_sync(kFullMask, score[i], chosen / N);
    if (chosen % N == i) weight = candidate;
  }
  const float total = warp_sum(lane < a.top_k ? weight : 0.0f);
  if (lane < a.top_k) {
    a.chosen[token * a.top_k + lane] = chosen;
    a.weights[token * a.top_k + lane] = weight * (a.renormalise ? a.scale / (total + 1e-20f) : a.scale);
  }
  return chosen;
}

// ---- the rows -------------------------------------------------------------------------------------------------------
// What a CTA knows of each expert: which tokens of its chunk chose it, its pairs in all chunks and in those before.
struct RouteMembers {
  uint32_t tokens[kMostExperts][kMostChunk / 32];
  int all[kMostExperts], before[kMostExperts];

  MII_DEVICE void clear(int experts) {
    for (int e = threadIdx.x; e < experts; e += kRouteThreads) {
#pragma unroll
      for (int word = 0; word < kMostChunk / 32; ++word) tokens[e][word] = 0;
      all[e] = before[e] = 0;
    }
    __syncthreads();
  }
  MII_DEVICE void add(int expert, int token) { atomicOr(&tokens[expert][token / 32], 1u << token % 32); }
  MII_DEVICE int size(int expert) const {
    int size = 0;
#pragma unroll
    for (int word = 0; word < kMostChunk / 32; ++word) size += __popc(tokens[expert][word]);
    return size;
  }
  MII_DEVICE int rank(int expert, int token) const {
    int rank = __popc(tokens[expert][token / 32] & ((1u << token % 32) - 1));
    for (int word = 0; word < token / 32; ++word) rank += __popc(tokens[expert][word]);
    return rank;
  }
};

// Exclusive sums of rows and tiles over the CTA's threads in their order, and the sums of all.
MII_DEVICE int2 block_scan(int2 value, int2& total) {
  __shared__ int2 sums[kRouteWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int2 sum = value;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int rows = __shfl_up_sync(kFullMask, sum.x, offset), tiles = __shfl_up_sync(kFullMask, sum.y, offset);
    if (lane >= offset) sum.x += rows, sum.y += tiles;
  }
  if (lane == kWarp - 1) sums[warp] = sum;
  __syncthreads();
  int2 first = make_int2(0, 0);
  total = make_int2(0, 0);
#pragma unroll
  for (int w = 0; w < kRouteWarps; ++w) {
    if (w == warp) first = total;
    total.x += sums[w].x, total.y += sums[w].y;
  }
  return make_int2(first.x + sum.x - value.x, first.y + sum.y - value.y);
}

// Gives the chunk's pairs their rows, once `members` is complete; the CTAs share the lists of tiles.
template <typename T>
MII_DEVICE void place_pairs(const MoeRouteArgs<T>& a, RouteMembers& members, const RouteChunk& chunk) {
  const int e = threadIdx.x, size = e < a.experts ? members.all[e] : 0;
  int2 total;
  const int2 first = block_scan(make_int2(size, (size + a.tile_rows - 1) / a.tile_rows), total);
  if (e < a.experts) {
    members.before[e] += first.x;
    if (blockIdx.x == 0) a.offsets[e] = first.x;
    if (e % chunk.chunks == static_cast<int>(blockIdx.x)) {
      for (int row = 0, tile = first.y; row < size; row += a.tile_rows) {
        a.tiles[++tile] = make_int4(e, first.x + row, min(a.tile_rows, size - row), 0);
      }
    }
  }
  if (blockIdx.x == 0 && e == 0) {
    a.offsets[a.experts] = total.x;
    a.tiles[0] = make_int4(total.y, 0, 0, 0);
  }
  __syncthreads();
  const int pairs = chunk.tokens * a.top_k, before = chunk.first * a.top_k;
  for (int pair = threadIdx.x; pair < pairs; pair += kRouteThreads) {
    const int expert = a.chosen[before + pair];
    const int row = members.before[expert] + members.rank(expert, pair / a.top_k);
    a.pairs[row] = before + pair;
    a.places[before + pair] = row;
  }
}

// Grid: a CTA for each chunk.
template <typename T, int N>
__global__ void __launch_bounds__(kRouteThreads, 1) moe_route(const MoeRouteArgs<T> a) {
  __shared__ RouteMembers members;
  wait_for_previous();
  start_next();
  const RouteChunk chunk(a);
  if (chunk.idle()) return;
  members.clear(a.experts);
  for (int token = threadIdx.x / kWarp; token < chunk.tokens; token += kRouteWarps) {
    const int expert = choose_experts<T, N>(a, chunk.first + token);
    if (static_cast<int>(threadIdx.x % kWarp) < a.top_k) members.add(expert, token);
  }
  __syncthreads();
  if (gridDim.x == 1) {
    for (int e = threadIdx.x; e < a.experts; e += kRouteThreads) members.all[e] = members.size(e);
    place_pairs(a, members, chunk);
    return;
  }
  const int words = (a.experts + 1) / 2;
  for (int word = threadIdx.x; word < words; word += kRouteThreads) {
    const uint32_t low = members.size(2 * word), high = 2 * word + 1 < a.experts ? members.size(2 * word + 1) : 0;
    a.sizes[int64_t(blockIdx.x) * words + word] = low | high << 16;
  }
}

// What all chunks have of each expert, and what those before this one have.
template <typename T>
MII_DEVICE void add_up_sizes(const MoeRouteArgs<T>& a, RouteMembers& members, int chunks) {
  const int words = (a.experts + 1) / 2, at_once = kRouteThreads / words, word = threadIdx.x % words;
  int all[2] = {}, before[2] = {};
#pragma unroll 4
  for (int chunk = threadIdx.x / words; chunk < chunks; chunk += at_once) {
    const uint32_t sizes = static_cast<int>(threadIdx.x) < at_once * words ? a.sizes[int64_t(chunk) * words + word] : 0u;
    const int low = sizes & 0xffff, high = sizes >> 16;
    all[0] += low, all[1] += high;
    if (chunk < static_cast<int>(blockIdx.x)) before[0] += low, before[1] += high;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (all[i] == 0) continue;  // so that nothing is added for an expert that does not exist
    atomicAdd(&members.all[2 * word + i], all[i]);
    atomicAdd(&members.before[2 * word + i], before[i]);
  }
}

// The second launch, with the grid of the first.
template <typename T>
__global__ void __launch_bounds__(kRouteThreads, 1) moe_place(const MoeRouteArgs<T> a) {
  __shared__ RouteMembers members;
  wait_for_previous();
  start_next();
  const RouteChunk chunk(a);
  if (chunk.idle()) return;
  members.clear(a.experts);
  for (int pair = threadIdx.x; pair < chunk.tokens * a.top_k; pair += kRouteThreads) {
    members.add(a.chosen[chunk.first * a.top_k + pair], pair / a.top_k);
  }
  add_up_sizes(a, members, chunk.chunks);
  __syncthreads();
  place_pairs(a, members, chunk);
}

}  // namespace mii
