// Attention.
#pragma once
#include "mii/abi/base.h"

// Causal attention of ragged query rows over the paged cache. Query token t of sequence s (local index j) sits at absolute
// position p = kv_len[s] - q_len[s] + j and sees keys max(0, p - window + 1) .. p  (window <= 0: no window).
//   score = scale * q.k;  softcap > 0: score = softcap * tanh(score / softcap);  alibi: score += slope[head] * (key - p)
// mii_attention_plan runs once a step (for each distinct window), fills `work`; mii_attention then runs for every layer.
struct MiiAttention {
  void* out;                    // [tokens, q_heads * head_dim], row stride out_stride; rows of padding stay untouched
  const void* q;                // [tokens, q_heads, head_dim], row stride q_stride
  const void* k_cache;          // [num_blocks, kv_heads, block_size, head_dim]
  const void* v_cache;
  const int32_t* counts;        // [MII_COUNTS]
  const int32_t* seq_slot;      // [max_seqs]
  const int32_t* q_start;       // [max_seqs+1]
  const int32_t* kv_len;        // [max_seqs]
  const int32_t* block_table;   // [slots, max_blocks]
  const float* alibi_slopes;    // [q_heads] or null
  void* work;                   // work list, of mii_attention_work_bytes()
  void* workspace;              // partial results, of mii_attention_workspace_bytes(); its first use expects zeroed memory
  int64_t max_seqs, max_tokens, max_blocks, num_blocks, q_stride, out_stride;
  int32_t q_heads, kv_heads, head_dim, block_size, window;
  float scale, softcap;
  int32_t dtype;
};
MII_API int32_t mii_attention_plan(const struct MiiAttention* args, void* stream);
MII_API int32_t mii_attention(const struct MiiAttention* args, void* stream);
MII_API int64_t mii_attention_work_bytes(const struct MiiAttention* args);
MII_API int64_t mii_attention_workspace_bytes(const struct MiiAttention* args);

// CUDA: rotation, KV write and attention of a step in which every sequence has one query token or none: as mii_rope_kv
// without norms, with half-split pairs, and mii_attention after it. `attention.q` begins rows of [q heads | k heads |
// v heads] that stay as they are; the caches, which miss the step's own tokens, get their keys and values. All that
// follows was written before the work list.
struct MiiDecodeAttention {
  struct MiiAttention attention;
  const float* cos_sin;      // [max_positions, head_dim]: cos in the first half, sin in the second; null: no rotation
  const int32_t* positions;  // [tokens] row of cos_sin
  const int32_t* kv_slots;   // [tokens] block * block_size + offset of the token's place in the cache, or -1: not written
  int64_t max_positions;
};
MII_API int32_t mii_decode_attention(const struct MiiDecodeAttention* args, void* stream);
