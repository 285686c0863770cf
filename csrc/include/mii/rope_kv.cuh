// Rotary embedding, per-head norm and KV write in one pass: see mii/ops/rope_kv.py and abi/rope_kv.h (MiiRopeKv).
//
// One CTA for each token. A head is cut into packs of N elements and handled by a group of lanes; lane `item` of the
// group holds two packs, a and b. With half-split pairs, b is the partner of a: dimension i of a rotates with dimension
// i of b. With interleaved pairs both hold whole pairs. Dimensions past rotary_dim are dealt out two packs a lane after
// the rotated ones. What a thread reads is what it writes, so q and k change in place without a barrier.
#pragma once
#include "mii/abi/rope_kv.h"
#include "mii/common.cuh"
#include "mii/rotate.cuh"

namespace mii {

constexpr int kRopeThreads = 512;

template <typename T>
struct RopeKvArgs {
  T* qkv;
  T* k_cache;  // or null, with v_cache: rotate only
  T* v_cache;
  const float* cos_sin;  // or null: no rotation, and rotary_dim is 0
  const int32_t* positions;
  const int32_t* kv_slots;
  const T* q_norm;
  const T* k_norm;
  int64_t qkv_stride;
  int max_positions, q_heads, kv_heads, head_dim, rotary_dim, block_size;
  int heads;       // those to visit: q and k, and v when there is a cache
  int group_bits;  // 2^group_bits lanes to a head, up to 32
  bool interleaved;
  float inverse_head_dim, norm_eps;
  float norm_plus;  // 1 for MII_RMS_PLUS1, else 0
};

// Where a slot's first head lies in either cache; the next head follows block_size * head_dim further on.
template <typename T>
__device__ __forceinline__ int64_t cache_offset(const RopeKvArgs<T>& args, int slot) {
  const unsigned block = unsigned(slot) / unsigned(args.block_size);
  const unsigned offset = unsigned(slot) % unsigned(args.block_size);
  return (int64_t(block) * args.kv_heads * args.block_size + offset) * args.head_dim;
}

template <typename T>
__device__ __forceinline__ const float* table_row(const RopeKvArgs<T>& args, int position) {
  return args.cos_sin + int64_t(max(0, min(position, args.max_positions - 1))) * args.rotary_dim;
}

template <typename T>
__device__ __forceinline__ const T* head_norm(const RopeKvArgs<T>& args, int head) {
  if (head < args.q_heads) return args.q_norm;
  return head < args.q_heads + args.kv_heads ? args.k_norm : nullptr;
}

__device__ __forceinline__ float group_sum(float value, int group) {
  for (int offset = group / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullMask, value, offset);
  return value;
}

template <int N>
__device__ __forceinline__ void load_floats(float (&out)[N], const float* address) {
  constexpr int Step = N < 4 ? N : 4;
#pragma unroll
  for (int i = 0; i < N; i += Step) {
    const Pack<float, Step> pack = load_pack_const<Step>(address + i);
#pragma unroll
    for (int e = 0; e < Step; ++e) out[i + e] = pack[e];
  }
}

// The angles of packs a and b: N of the pair of partners, or N/2 for each of two interleaved packs.
template <int N, bool Interleaved>
__device__ __forceinline__ void load_angles(float (&cos)[N], float (&sin)[N], const float* table, int a, bool rotate_a,
                                            bool rotate_b, int half) {
  if constexpr (Interleaved) {
    constexpr int Part = N / 2;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      if (!(side == 0 ? rotate_a : rotate_b)) continue;
      float part[Part];
      load_floats(part, table + (a + side) * Part);
#pragma unroll
      for (int e = 0; e < Part; ++e) cos[side * Part + e] = part[e];
      load_floats(part, table + half + (a + side) * Part);
#pragma unroll
      for (int e = 0; e < Part; ++e) sin[side * Part + e] = part[e];
    }
  } else if (rotate_a) {
    load_floats(cos, table + a * N);
    load_floats(sin, table + half + a * N);
  }
}

template <typename T, int N>
__device__ __forceinline__ void scale_pack(float (&x)[N], float scale, const T* weight, float plus) {
  float w[N];
  unpack(w, load_pack_const<N>(weight));
#pragma unroll
  for (int e = 0; e < N; ++e) x[e] *= scale * (w[e] + plus);
}

// At most 64 packs a head. cos and sin hold the angles of pack a and b: of both at once for half-split pairs, N/2 each
// for interleaved ones. They serve every head of the token. All loads of a first head are issued before anything waits.
template <typename T, int N, bool Interleaved>
__global__ void __launch_bounds__(kRopeThreads) rope_kv_packs(const RopeKvArgs<T> args) {
  const int item = threadIdx.x & ((1 << args.group_bits) - 1);
  const int group = threadIdx.x >> args.group_bits;
  const int groups = blockDim.x >> args.group_bits;
  const int packs = args.head_dim / N;
  const int rotated = args.rotary_dim / N;          // packs that rotate
  const int pairs = Interleaved ? 0 : rotated / 2;  // lanes whose two packs are partners: they hold packs 0 .. 2 pairs
  const bool partners = item < pairs;
  const int a = partners ? item : 2 * item;
  const int b = partners ? item + pairs : a + 1;
  const bool rotate_a = Interleaved ? a < rotated : partners;
  const bool rotate_b = Interleaved ? b < rotated : partners;
  begin();
  const int64_t token = blockIdx.x;
  T* row = args.qkv + token * args.qkv_stride;
  const bool norms = args.q_norm != nullptr || args.k_norm != nullptr;

  int head = group;
  Pack<T, N> pack_a, pack_b;
  if (head < args.heads && a < packs) pack_a = load_pack<N>(row + head * args.head_dim + a * N);
  if (head < args.heads && b < packs) pack_b = load_pack<N>(row + head * args.head_dim + b * N);
  __syncwarp();  // or the compiler lets the loads above wait for the table's address, which needs the position
  const int slot = args.k_cache == nullptr ? -1 : args.kv_slots[token];
  const int position = args.cos_sin == nullptr ? 0 : args.positions[token];
  float cos[N], sin[N];
  load_angles<N, Interleaved>(cos, sin, table_row(args, position), a, rotate_a, rotate_b, args.rotary_dim / 2);
  const int64_t cache_base = cache_offset(args, slot);

  for (int trips = (args.heads + groups - 1) / groups; trips > 0; --trips) {  // as many for every lane: see group_sum
    const bool has_a = head < args.heads && a < packs;
    const bool has_b = head < args.heads && b < packs;
    const bool is_v = head >= args.q_heads + args.kv_heads;
    const T* weight = head_norm(args, head);
    T* x = row + head * args.head_dim;
    float va[N] = {}, vb[N] = {};
    if (has_a) unpack(va, pack_a);
    if (has_b) unpack(vb, pack_b);
    if (norms) {
      float squares = 0.0f;
#pragma unroll
      for (int e = 0; e < N; ++e) squares += va[e] * va[e] + vb[e] * vb[e];
      squares = group_sum(squares, 1 << args.group_bits);
      const float scale = rsqrtf(squares * args.inverse_head_dim + args.norm_eps);
      if (weight != nullptr && has_a) scale_pack(va, scale, weight + a * N, args.norm_plus);
      if (weight != nullptr && has_b) scale_pack(vb, scale, weight + b * N, args.norm_plus);
    }
    if (!is_v) {
      if constexpr (Interleaved) {
#pragma unroll
        for (int e = 0; e < N / 2; ++e) {
          if (rotate_a) rotate(va[2 * e], va[2 * e + 1], cos[e], sin[e]);
          if (rotate_b) rotate(vb[2 * e], vb[2 * e + 1], cos[N / 2 + e], sin[N / 2 + e]);
        }
      } else if (partners) {
#pragma unroll
        for (int e = 0; e < N; ++e) rotate(va[e], vb[e], cos[e], sin[e]);
      }
      // A pack that neither rotates nor is normed stays as it lies.
      if (has_a && (weight != nullptr || rotate_a)) store_pack(x + a * N, pack_a = make_pack<T>(va));
      if (has_b && (weight != nullptr || rotate_b)) store_pack(x + b * N, pack_b = make_pack<T>(vb));
    }
    if (head >= args.q_heads && slot >= 0) {
      const int kv_head = head - args.q_heads - (is_v ? args.kv_heads : 0);
      T* to = (is_v ? args.v_cache : args.k_cache) + cache_base + kv_head * args.block_size * args.head_dim;
      if (has_a) store_pack(to + a * N, pack_a);
      if (has_b) store_pack(to + b * N, pack_b);
    }
    head += groups;
    if (head < args.heads && a < packs) pack_a = load_pack<N>(row + head * args.head_dim + a * N);
    if (head < args.heads && b < packs) pack_b = load_pack<N>(row + head * args.head_dim + b * N);
  }
}

// Any head size, rotary size and alignment: a warp for each head, element by element.
template <typename T>
__global__ void __launch_bounds__(256) rope_kv_any(const RopeKvArgs<T> args) {
  wait_for_previous();
  start_next();
  const int lane = threadIdx.x % kWarp;
  const int64_t token = blockIdx.x;
  const int slot = args.k_cache == nullptr ? -1 : args.kv_slots[token];
  const int64_t cache_base = cache_offset(args, slot);
  const float* table = args.cos_sin == nullptr ? nullptr : table_row(args, args.positions[token]);
  const int half = args.rotary_dim / 2;
  for (int head = threadIdx.x / kWarp; head < args.heads; head += blockDim.x / kWarp) {
    T* x = args.qkv + token * args.qkv_stride + int64_t(head) * args.head_dim;
    const bool is_v = head >= args.q_heads + args.kv_heads;
    const T* weight = head_norm(args, head);
    float scale = 1.0f;
    if (weight != nullptr) {
      float squares = 0.0f;
      for (int i = lane; i < args.head_dim; i += kWarp) squares += to_float(x[i]) * to_float(x[i]);
      scale = rsqrtf(warp_sum(squares) * args.inverse_head_dim + args.norm_eps);
    }
    const auto normed = [&](int i) {
      return weight == nullptr ? to_float(x[i]) : to_float(x[i]) * (scale * (to_float(weight[i]) + args.norm_plus));
    };
    T* to = nullptr;
    if (head >= args.q_heads && slot >= 0) {
      const int kv_head = head - args.q_heads - (is_v ? args.kv_heads : 0);
      to = (is_v ? args.v_cache : args.k_cache) + cache_base + kv_head * args.block_size * args.head_dim;
    }
    const auto write = [&](int i, float value) {
      const T result = from_float<T>(value);
      if (!is_v) x[i] = result;
      if (to != nullptr) to[i] = result;
    };
    const int rotated = is_v ? 0 : half;
    for (int i = lane; i < rotated; i += kWarp) {
      const int a = args.interleaved ? 2 * i : i;
      const int b = args.interleaved ? a + 1 : i + half;
      float first = normed(a), second = normed(b);
      rotate(first, second, table[i], table[half + i]);
      write(a, first);
      write(b, second);
    }
    for (int i = 2 * rotated + lane; i < args.head_dim; i += kWarp) write(i, normed(i));
  }
}

}  // namespace mii
