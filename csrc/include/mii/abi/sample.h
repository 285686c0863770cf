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
