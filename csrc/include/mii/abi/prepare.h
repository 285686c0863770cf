// The inputs of a step.
#pragma once
#include "mii/abi/base.h"

// Expands the host's description of a step: token ids, positions, KV slots and the rows to sample from.
// Sequence s of the step feeds query tokens q_start[s] .. q_start[s+1]; after the step its context is kv_len[s] tokens.
struct MiiPrepare {
  const int32_t* counts;         // [MII_COUNTS]
  const int32_t* seq_slot;       // [max_seqs]    row of the sequence in block_table and last_token
  const int32_t* q_start;        // [max_seqs+1]
  const int32_t* kv_len;         // [max_seqs]
  const int32_t* host_ids;       // [max_tokens]  token id, or -1: take last_token[slot]
  const int32_t* sample_seq;     // [max_seqs]    step index s of each sequence to sample for
  const int32_t* table_updates;  // [3*max_updates] (slot, index, block) triples
  int32_t* block_table;          // [slots, max_blocks] in/out: updates are applied first
  const int32_t* last_token;     // [slots]
  int32_t* ids;                  // [max_tokens]  out; 0 for padding
  int32_t* positions;            // [max_tokens]  out; 0 for padding
  int32_t* kv_slots;             // [max_tokens]  out: block * block_size + offset; -1 for padding
  int32_t* sample_rows;          // [max_seqs]    out: row of the last query token of each sampled sequence; 0 for padding
  int32_t* sample_slots;         // [max_seqs]    out: its slot; -1 for padding
  int32_t* sample_positions;     // [max_seqs]    out: index of the token about to be sampled (= kv_len); 0 for padding
  const int32_t* rope_shift;     // [max_seqs]    or null: added to the positions for rope_rows
  int32_t* rope_rows;            // [max_tokens]  out, with rope_shift only: rows of the rotary tables; 0 for padding
  int64_t max_seqs, max_tokens, max_updates, max_blocks;
  int32_t block_size;
};
MII_API int32_t mii_prepare(const struct MiiPrepare* args, void* stream);
