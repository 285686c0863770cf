// The sampler.
#pragma once
#include "mii/abi/base.h"

// token[r] for each of the counts[MII_NUM_SAMPLES] rows; per-slot parameters are read at slots[r]; rows with slot -1 are
// skipped. temperature 0 is greedy (lowest id among equals). Otherwise, on float logits / temperature: keep the top_k
// largest (0: all; ties with the k-th kept), then min_p (p >= min_p * max p), then the smallest set whose probability
// reaches top_p (largest first, ties at the border kept), then draw from Philox4x32-10(key = seed, counter = position).
// Rows flagged in `suppress` never yield a token of suppress_ids (end-of-text below min_new_tokens).
// mii_sample also stores last_token[slot] = token.
struct MiiSample {
  int32_t* tokens;              // [rows] out
  float* logprobs;              // [rows] out or null: log softmax of the raw (suppressed) logits at the drawn token
  int32_t* last_token;          // [slots] out or null
  const void* logits;           // [rows, vocab], row stride logits_stride
  const int32_t* counts;        // [MII_COUNTS] or null (all rows)
  const int32_t* slots;         // [rows]
  const int32_t* positions;     // [rows]
  const float* temperature;     // [slots]
  const float* top_p;           // [slots]  1: off
  const float* min_p;           // [slots]  0: off
  const int32_t* top_k;         // [slots]  0: off
  const int64_t* seed;          // [slots]
  const int32_t* suppress;      // [rows] flags or null
  const int32_t* suppress_ids;  // [num_suppress]
  void* workspace;              // of mii_sample_workspace_bytes()
  int64_t rows, vocab, logits_stride;
  int32_t num_suppress;
  int32_t dtype;
};
MII_API int32_t mii_sample(const struct MiiSample* args, void* stream);
MII_API int64_t mii_sample_workspace_bytes(const struct MiiSample* args);

// mii_sample where each rank has the logits of a part of the vocabulary. CUDA. A call is one stage: it takes what all ranks
// gave in the stage before, and gives what they exchange next. mii/ops/shard_stages.py says which stages there are for what.
// A histogram counts tokens, or adds up weights, by one digit of their distances: 1280 bins, then 1024 and 1024.
enum MiiShardStage {
  MII_SHARD_NOTHING = 0,
  MII_SHARD_BEST = 1,     // int32 [2, rows]: the bits of the best float logit, and its lowest id
  MII_SHARD_COUNTS = 2,   // 2, 3, 4: uint64 [rows, bins], for top_k
  MII_SHARD_WEIGHTS = 5,  // 5, 6, 7: the same for top_p
  MII_SHARD_KEPT = 8,     // uint64 [rows]: the weight of the kept tokens
  MII_SHARD_DRAWN = 9,    // int32 [rows]: the token, where it is this rank's, or -1
  MII_SHARD_TOKEN = 10,   // nothing: the tokens are written
};
struct MiiSampleShard {
  struct MiiSample sample;  // logits and vocab are this rank's; no logprobs
  const void* gathered;     // [size, ...] what all ranks gave in the stage before
  void* out;                // what this one gives
  void* state;              // [rows] of 24 bytes, kept from stage to stage
  int64_t start, rows;      // the rows of this call: start, start + 1, ...; arrays above begin at the first of them
  int64_t first, whole;     // the id of this rank's first logit; the vocabulary of all ranks
  int32_t rank, size, takes, gives;
};
MII_API int32_t mii_sample_shard(const struct MiiSampleShard* args, void* stream);
