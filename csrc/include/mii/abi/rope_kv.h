// Rotary embedding and KV write.
#pragma once
#include "mii/abi/norm.h"

// qkv row = [q heads | k heads | v heads], each head_dim wide. Optionally RMS-norms each q and k head, rotates q in place
// and k (also in place), and writes k and v into the cache. Computed in float, rounded once.
//   half:        pairs (i, i + rotary_dim/2)        interleaved: pairs (2i, 2i+1)
//   x' = x cos - y sin,  y' = y cos + x sin;  dimensions past rotary_dim pass unchanged
// Cache layout: [num_blocks, kv_heads, block_size, head_dim] for K and for V, one pair of tensors per layer.
struct MiiRopeKv {
  void* qkv;                 // [tokens, (q_heads + 2 kv_heads) * head_dim], row stride qkv_stride; q and k rotated in place
  void* k_cache;             // null: rotate only
  void* v_cache;
  const float* cos_sin;      // [max_positions, rotary_dim]: cos in the first half, sin in the second; null: no rotation
  const int32_t* positions;  // [tokens] row of cos_sin
  const int32_t* kv_slots;   // [tokens] block * block_size + offset, or -1: write nothing
  const void* q_norm;        // [head_dim] or null
  const void* k_norm;        // [head_dim] or null
  int64_t tokens, qkv_stride, max_positions;
  int32_t q_heads, kv_heads, head_dim, rotary_dim, interleaved, block_size;
  float norm_eps;
  int32_t norm_kind;         // MII_RMS or MII_RMS_PLUS1
  int32_t dtype;
};
MII_API int32_t mii_rope_kv(const struct MiiRopeKv* args, void* stream);
