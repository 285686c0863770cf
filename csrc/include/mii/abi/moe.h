// Mixture of experts.
#pragma once
#include "mii/abi/activation.h"

// Every token goes to `top_k` of the `experts`. A pair is a token and one of its choices: number token * top_k + choice.
// mii_moe_route scores, chooses and sorts the pairs by expert; mii_moe_up and mii_moe_down, or mii_moe_stream in one launch, are
// products of each expert's rows with its own weights; mii_moe_combine adds up each token's choices. A row is a place in the
// sorted list of pairs.
//   score = softmax or sigmoid of the logits, in float; chosen are the top_k largest score + bias, ties to the lower expert
//   weight = scale * score, divided before by the sum of the token's chosen scores where `renormalise` says so
// Of several groups of neighbouring experts only those of the `top_groups` best ones are chosen from: a group counts by its
// largest score + bias, with sigmoid scores by the sum of its two largest.
#define MII_MOE_CHUNK 16  // tokens whose pairs the CUDA kernel counts together, at least
enum MiiMoeScoring { MII_MOE_SOFTMAX = 0, MII_MOE_SIGMOID = 1 };
struct MiiMoeRoute {
  int32_t* chosen;        // [tokens * top_k] out, by pair: its expert; pairs of padding stay untouched
  float* weights;         // [tokens * top_k] out, by pair
  int32_t* offsets;       // [experts + 1] out: expert e has rows offsets[e] .. offsets[e + 1]
  int32_t* pairs;         // [tokens * top_k] out, by row: its pair; ascending within an expert
  int32_t* places;        // [tokens * top_k] out, by pair: its row; pairs of padding stay untouched
  int32_t* tiles;         // [1 + min(experts, pairs) + pairs / tile_rows][4] out: the first entry is (their number, ..),
                          // each other one (expert, first row, rows, 0): runs of up to tile_rows rows of one expert. The
                          // first one's other numbers are zero; MII_MOE_WGMMA counts in them and leaves zeros
  const void* logits;     // [tokens, experts], row stride logits_stride
  const float* bias;      // [experts] or null: added to a score for the choice, not for the weight
  const int32_t* counts;  // [MII_COUNTS] or null (all tokens)
  void* workspace;        // CUDA: [ceil(tokens / MII_MOE_CHUNK), ceil(experts / 2)] ints
  int64_t tokens, logits_stride;
  int32_t experts, top_k, scoring, renormalise, tile_rows, groups, top_groups;
  float scale;
  int32_t dtype;
};
MII_API int32_t mii_moe_route(const struct MiiMoeRoute* args, void* stream);

// mii_moe_up:   out[row] = act(x[token of row] @ gate^T) * (x[token of row] @ up^T), weight of an expert = [gate; up],
//               [2 * out_features, in_features]; rounded once
// mii_moe_down: out[pair of row] = pair_weights[pair] * (x[row] @ weight^T), weight of an expert [out_features, in_features]
// CPU: weights as packed by mii_moe_pack. CUDA: row-major and contiguous, one expert after the other.
enum MiiMoeKernel {
  MII_MOE_SIMPLE = 0,  // any format and size, on the plain cores
  MII_MOE_STREAM = 1,  // few rows for each expert: mii_moe_stream does both products
  MII_MOE_MMA = 2,     // many rows: tensor cores by mma.sync, tiles of 128 rows
  MII_MOE_WGMMA = 3,   // many rows: tensor cores of compute capability 9.0, by mma.sync with a gate that they do not apply;
                       // tiles of 192 rows
};
struct MiiMoeLinear {
  void* out;                  // row stride out_stride
  const void* x;              // row stride x_stride
  const void* weight;
  const float* pair_weights;  // [tokens * top_k] (mii_moe_down)
  const int32_t* offsets;     // these four as mii_moe_route wrote them
  const int32_t* pairs;
  const int32_t* places;
  const int32_t* tiles;
  int64_t tokens, in_features, out_features, x_stride, out_stride;
  int32_t experts, top_k, tile_rows, activation, kernel, dtype;
  void* gathered;           // mii_moe_up by MII_MOE_WGMMA: room for the rows of x by row, [tokens * top_k, in_features],
  int64_t gathered_stride;  // or null: by mma.sync
};
MII_API int32_t mii_moe_up(const struct MiiMoeLinear* args, void* stream);
MII_API int32_t mii_moe_down(const struct MiiMoeLinear* args, void* stream);

// CUDA: both products of few rows for each expert, a stream of the weights of the experts that are hit.
struct MiiMoeStream {
  void* out;                  // [tokens * top_k, in_features] by pair, row stride out_stride
  void* hidden;               // [tokens * top_k, width] by row, row stride hidden_stride
  const void* x;              // [tokens, in_features], row stride x_stride
  const void* up;             // [experts][gate; up], as of mii_moe_up
  const void* down;           // [experts][in_features, width]
  const float* pair_weights;  // these three as mii_moe_route wrote them
  const int32_t* pairs;
  const int32_t* tiles;       // of 8, 16 or 64 rows
  void* workspace;            // of mii_moe_workspace_bytes(), zero before its first use; one for calls of one stream
  int64_t tokens, in_features, width, x_stride, hidden_stride, out_stride;
  int32_t experts, top_k, tile_rows, activation, dtype;
};
MII_API int32_t mii_moe_stream(const struct MiiMoeStream* args, void* stream);
MII_API int64_t mii_moe_workspace_bytes(const struct MiiMoeStream* args);

// out[t] = sum over choices of parts[t * top_k + choice] + sigmoid(shared_gate[t]) * shared[t]; padding becomes zeros.
// Added in float in the order of the choices, so runs repeat bit for bit.
struct MiiMoeCombine {
  void* out;                // [tokens, width], row stride out_stride
  const void* parts;        // [tokens * top_k, width], contiguous
  const void* shared;       // [tokens, width], row stride shared_stride, or null
  const void* shared_gate;  // [tokens] or null (1)
  const int32_t* counts;    // [MII_COUNTS] or null (all tokens)
  int64_t tokens, width, out_stride, shared_stride;
  int32_t top_k, dtype;
};
MII_API int32_t mii_moe_combine(const struct MiiMoeCombine* args, void* stream);

// CPU: packs one expert's weight into the layout that the products read (panels as of mii_linear_pack; gated: those of
// gate and up take turns, so that both halves of an output meet).
struct MiiMoePack {
  void* packed;        // out: of mii_moe_packed_bytes(), 64-byte aligned
  const void* weight;  // [(gated ? 2 : 1) * out_features, in_features], row stride weight_stride
  int64_t in_features, out_features, weight_stride;
  int32_t gated, dtype;
};
MII_API int32_t mii_moe_pack(const struct MiiMoePack* args, void* stream);
MII_API int64_t mii_moe_packed_bytes(const struct MiiMoePack* args);
