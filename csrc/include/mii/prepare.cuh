// Expansion of a step's inputs on the device: equations in mii/ops/prepare.py, layout in abi/prepare.h (MiiPrepare).
//
// One CTA: the block table's updates have to be in place before any token reads the table, and at 8192 tokens of 512
// sequences the whole work is some 130 KB. Each token finds its sequence by binary search in q_start.
#pragma once
#include "mii/abi/prepare.h"
#include "mii/common.cuh"

namespace mii {

constexpr int kPrepareTokens = 4;  // tokens of one thread whose searches and loads overlap

// For each token the last s of `seqs` with start[s] <= token: empty sequences are passed over. Every thread takes the
// same number of steps, and the searches of its tokens go on side by side.
__device__ __forceinline__ void find_sequences(int (&at)[kPrepareTokens], const int32_t* start, int seqs, int first,
                                               int apart) {
#pragma unroll
  for (int k = 0; k < kPrepareTokens; ++k) at[k] = 0;
  for (int left = seqs; left > 1;) {
    const int half = left / 2;
    int middle[kPrepareTokens];
#pragma unroll
    for (int k = 0; k < kPrepareTokens; ++k) middle[k] = start[at[k] + half];
#pragma unroll
    for (int k = 0; k < kPrepareTokens; ++k) at[k] += middle[k] <= first + k * apart ? half : 0;
    left -= half;
  }
}

// InShared: q_start, kv_len and seq_slot are copied to dynamic shared memory of (3 max_seqs + 1) * 4 bytes first.
template <bool InShared>
__global__ void __launch_bounds__(1024) prepare_step(const MiiPrepare args) {
  extern __shared__ int32_t shared[];
  wait_for_previous();
  start_next();
  const int thread = threadIdx.x, threads = blockDim.x;
  const int max_seqs = int(args.max_seqs), max_tokens = int(args.max_tokens);
  const int seqs = min(args.counts[MII_NUM_SEQS], max_seqs);
  const int tokens = min(args.counts[MII_NUM_TOKENS], max_tokens);
  const int samples = min(args.counts[MII_NUM_SAMPLES], max_seqs);
  const int updates = min(args.counts[MII_NUM_UPDATES], int(args.max_updates));

  const int32_t* start = args.q_start;
  const int32_t* kv_len = args.kv_len;
  const int32_t* seq_slot = args.seq_slot;
  if constexpr (InShared) {
    for (int s = thread; s < seqs; s += threads) {
      shared[s] = args.q_start[s];
      shared[max_seqs + 1 + s] = args.kv_len[s];
      shared[2 * max_seqs + 1 + s] = args.seq_slot[s];
    }
    if (thread == 0) shared[seqs] = args.q_start[seqs];
    start = shared;
    kv_len = shared + max_seqs + 1;
    seq_slot = shared + 2 * max_seqs + 1;
  }
  for (int u = thread; u < updates; u += threads) {
    const int32_t* update = args.table_updates + 3 * u;
    args.block_table[update[0] * args.max_blocks + update[1]] = update[2];
  }
  __syncthreads();

  for (int first = thread; first < max_tokens; first += kPrepareTokens * threads) {
    int s[kPrepareTokens], slot[kPrepareTokens], position[kPrepareTokens], block[kPrepareTokens], id[kPrepareTokens];
    find_sequences(s, start, seqs, first, threads);
#pragma unroll
    for (int k = 0; k < kPrepareTokens; ++k) {
      const int token = first + k * threads;
      if (token >= tokens) continue;
      id[k] = args.host_ids[token];
      slot[k] = seq_slot[s[k]];
      position[k] = kv_len[s[k]] - start[s[k] + 1] + token;
      block[k] = args.block_table[slot[k] * args.max_blocks + position[k] / args.block_size];
    }
#pragma unroll
    for (int k = 0; k < kPrepareTokens; ++k) {
      const int token = first + k * threads;
      if (token < tokens && id[k] < 0) id[k] = args.last_token[slot[k]];
    }
#pragma unroll
    for (int k = 0; k < kPrepareTokens; ++k) {
      const int token = first + k * threads;
      if (token >= max_tokens) continue;
      const bool real = token < tokens;
      args.ids[token] = real ? id[k] : 0;
      args.positions[token] = real ? position[k] : 0;
      if (args.rope_shift != nullptr) args.rope_rows[token] = real ? position[k] + args.rope_shift[s[k]] : 0;
      args.kv_slots[token] = real ? block[k] * args.block_size + position[k] % args.block_size : -1;
    }
  }
  for (int i = thread; i < max_seqs; i += threads) {
    int row = 0, slot = -1, position = 0;
    if (i < samples) {
      const int s = args.sample_seq[i];
      row = start[s + 1] - 1;
      slot = seq_slot[s];
      position = kv_len[s];
    }
    args.sample_rows[i] = row;
    args.sample_slots[i] = slot;
    args.sample_positions[i] = position;
  }
}

}  // namespace mii
