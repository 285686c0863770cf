// The C interface of mii's kernels: one argument struct and one function per operation.
//
// libmii_cpu.so and libmii_cuda.so export the same names with the same structs, so the Python side (mii/ops/abi.py) binds
// both with one table and the model code never knows which one runs.
//
// Rules that hold for every function:
//   * it returns 0, or a code above 0 whose reason mii_last_error() gives (per thread);
//   * every buffer belongs to the caller; nothing is allocated and nothing is synchronised, so every call can be captured
//     in a CUDA graph;
//   * `stream` is a cudaStream_t (ignored on the CPU);
//   * quantities that change from step to step (how many sequences, how long) are read from memory on the device, never
//     from the struct; `rows`, `tokens` and the like in a struct are upper bounds (the bucket's size);
//   * strides count elements, not bytes; the innermost dimension is contiguous.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MII_API __attribute__((visibility("default")))

enum MiiDtype { MII_F32 = 0, MII_F16 = 1, MII_BF16 = 2 };

enum MiiStatus {
  MII_OK = 0,
  MII_INVALID = 1,      // an argument that no body of this operation takes
  MII_UNSUPPORTED = 2,  // a valid argument that this library has no kernel for: the caller falls back to the reference
  MII_DEVICE = 3,       // the device reported an error
};

// What one step works on, all int32, written by the host into one pinned buffer and copied in one go.
enum MiiCounts { MII_NUM_SEQS = 0, MII_NUM_TOKENS = 1, MII_NUM_SAMPLES = 2, MII_NUM_UPDATES = 3, MII_COUNTS = 8 };

// ---- step inputs --------------------------------------------------------------------------------------------------
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

// ---- embedding ----------------------------------------------------------------------------------------------------
// out[r] = scale * table[ids[r]] + position_table[positions[r] + position_offset]   (second term only when given)
struct MiiEmbedding {
  void* out;                   // [rows, width]
  const void* table;           // [vocab, width]
  const int32_t* ids;          // [rows]
  const void* position_table;  // [max_positions, width] or null
  const int32_t* positions;    // [rows] or null
  int64_t rows, width, vocab, max_positions;
  int32_t position_offset;
  float scale;
  int32_t dtype;
};
MII_API int32_t mii_embedding(const struct MiiEmbedding* args, void* stream);

// ---- norms --------------------------------------------------------------------------------------------------------
// With a residual: residual += x first (rounded to dtype, written back), and the residual is what is normed.
//   MII_RMS        out = round(v * rsqrt(mean(v^2) + eps)) * weight          (Llama: rounds before the weight)
//   MII_RMS_PLUS1  out = round(v * rsqrt(mean(v^2) + eps) * (1 + weight))    (Gemma: weight in float)
//   MII_LAYER      out = (v - mean) * rsqrt(var + eps) * weight + bias
// With an x_weight (which needs a residual and one of the RMS kinds) x is normed by itself, with that weight, before it
// is added; out may then be null: only the residual is wanted.
enum MiiNormKind { MII_RMS = 0, MII_RMS_PLUS1 = 1, MII_LAYER = 2 };
struct MiiNorm {
  void* out;           // [rows, width], row stride out_stride
  const void* x;       // [rows, width], row stride x_stride
  void* residual;      // [rows, width] contiguous, or null
  const void* weight;  // [width] or null (ones)
  const void* bias;    // [width] or null
  const void* x_weight;  // [width] or null
  int64_t rows, width, x_stride, out_stride;
  float eps;
  int32_t kind, dtype;
};
MII_API int32_t mii_norm(const struct MiiNorm* args, void* stream);

// ---- rotary embedding and KV write --------------------------------------------------------------------------------
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

// ---- attention ----------------------------------------------------------------------------------------------------
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

// ---- activations --------------------------------------------------------------------------------------------------
// gated: x row = [gate | up], each `width` wide, out = act(gate) * up.  Not gated: out = act(x).  bias is added to x first.
// A soft cap is limit * tanh(x / limit); the others leave `limit` unread.
enum MiiActivationKind {
  MII_SILU = 0,
  MII_GELU = 1,
  MII_GELU_TANH = 2,
  MII_RELU = 3,
  MII_GELU_QUICK = 4,
  MII_RELU2 = 5,
  MII_SOFTCAP = 6
};
struct MiiActivation {
  void* out;         // [rows, width], row stride out_stride
  const void* x;     // [rows, width or 2 width], row stride x_stride
  const void* bias;  // [width or 2 width] or null
  int64_t rows, width, x_stride, out_stride;
  float limit;
  int32_t kind, gated, dtype;
};
MII_API int32_t mii_activation(const struct MiiActivation* args, void* stream);

// ---- row gather ---------------------------------------------------------------------------------------------------
struct MiiGather {
  void* out;             // [rows, width] contiguous
  const void* x;         // [*, width], row stride x_stride
  const int32_t* index;  // [rows]
  int64_t rows, width, x_stride;
  int32_t dtype;
};
MII_API int32_t mii_gather(const struct MiiGather* args, void* stream);

// ---- sampler ------------------------------------------------------------------------------------------------------
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

// ---- matrix product -------------------------------------------------------------------------------------------------
// out = x @ weight^T + bias, on the CPU with a weight that mii_linear_pack packed.
struct MiiLinear {
  void* out;           // [rows, out_features], row stride out_stride
  const void* x;       // [rows, in_features], row stride x_stride
  const void* weight;
  const void* bias;    // [out_features] or null
  int64_t rows, in_features, out_features, x_stride, out_stride;
  int32_t dtype;
  void* workspace;     // CUDA: of mii_linear_workspace_bytes(), zeroed before its first use; one for calls of one stream
};
MII_API int32_t mii_linear(const struct MiiLinear* args, void* stream);

// CUDA: the product of up to 64 rows as a stream of the weight, which is row-major and contiguous. cuBLASLt serves more.
// gated: the weight's rows are [gate | up], out = act(gate product) * (up product), both rounded before.
struct MiiLinearStreamed {
  struct MiiLinear product;  // gated: out is [rows, out_features / 2]
  const void* next;          // memory that the product after this one reads, next_bytes of it, or null. About next_fetch
  int64_t next_bytes, next_fetch;  // bytes of it, evenly spread, come into the L2 cache while this product ends
  int32_t next_lag;                // units of 16 to 32 KB that a CTA still waits for when it begins with that
  int32_t gated, activation;       // a MiiActivationKind
  int32_t variant;                 // how the work is cut; 0 unless kernels are compared
};
MII_API int32_t mii_linear_streamed(const struct MiiLinearStreamed* args, void* stream);
MII_API int64_t mii_linear_workspace_bytes(const struct MiiLinear* args);

// Packs a row-major weight into the layout that mii_linear reads, once at load. Padding is zeros. The layout depends on
// dtype and instruction set only, so a packed weight is never stored.
struct MiiLinearPack {
  void* packed;        // out: of mii_linear_packed_bytes(), 64-byte aligned
  const void* weight;  // [out_features, in_features], row stride weight_stride
  int64_t in_features, out_features, weight_stride;
  int32_t dtype;
};
MII_API int32_t mii_linear_pack(const struct MiiLinearPack* args, void* stream);
MII_API int64_t mii_linear_packed_bytes(const struct MiiLinearPack* args);

// ---- mixture of experts -----------------------------------------------------------------------------------------------
// Every token goes to `top_k` of the `experts`. A pair is a token and one of its choices: number token * top_k + choice.
// mii_moe_route scores, chooses and sorts the pairs by expert; mii_moe_up and mii_moe_down are products of each expert's
// rows with its own weights; mii_moe_combine adds up each token's choices. A row is a place in the sorted list of pairs.
//   score = softmax or sigmoid of the logits, in float; chosen are the top_k largest score + bias, ties to the lower expert
//   weight = scale * score, divided before by the sum of the token's chosen scores where `renormalise` says so
enum MiiMoeScoring { MII_MOE_SOFTMAX = 0, MII_MOE_SIGMOID = 1 };
struct MiiMoeRoute {
  int32_t* chosen;        // [tokens * top_k] out, by pair: its expert; pairs of padding stay untouched
  float* weights;         // [tokens * top_k] out, by pair
  int32_t* offsets;       // [experts + 1] out: expert e has rows offsets[e] .. offsets[e + 1]
  int32_t* pairs;         // [tokens * top_k] out, by row: its pair; ascending within an expert
  int32_t* tiles;         // [1 + min(experts, pairs) + pairs / tile_rows][4] out: the first entry is (their number, ..),
                          // each other one (expert, first row, rows, 0): runs of up to tile_rows rows of one expert
  const void* logits;     // [tokens, experts], row stride logits_stride
  const float* bias;      // [experts] or null: added to a score for the choice, not for the weight
  const int32_t* counts;  // [MII_COUNTS] or null (all tokens)
  void* workspace;        // CUDA: an int, zero before the first use; one for calls of one stream
  int64_t tokens, logits_stride;
  int32_t experts, top_k, scoring, renormalise, tile_rows;
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
  MII_MOE_STREAM = 1,  // few rows for each expert: a stream of the weights of the experts that are hit
  MII_MOE_MMA = 2,     // many rows: tensor cores by mma.sync
  MII_MOE_WGMMA = 3,   // many rows: tensor cores of compute capability 9.0
};
struct MiiMoeLinear {
  void* out;                  // row stride out_stride
  const void* x;              // row stride x_stride
  const void* weight;
  const float* pair_weights;  // [tokens * top_k] (mii_moe_down)
  const int32_t* offsets;     // these three as mii_moe_route wrote them
  const int32_t* pairs;
  const int32_t* tiles;
  void* workspace;            // CUDA: of mii_moe_workspace_bytes(), zero before its first use; one for calls of one stream
  int64_t tokens, in_features, out_features, x_stride, out_stride;
  int32_t experts, top_k, tile_rows, activation, kernel, dtype;
};
MII_API int32_t mii_moe_up(const struct MiiMoeLinear* args, void* stream);
MII_API int32_t mii_moe_down(const struct MiiMoeLinear* args, void* stream);
MII_API int64_t mii_moe_workspace_bytes(const struct MiiMoeLinear* args);

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

// ---- recorded steps (CPU library; on the GPU a CUDA graph serves) -----------------------------------------------------
// Runs calls one after another, as they were recorded with their structs, and stops at the first that fails. One call
// from Python in place of hundreds.
struct MiiCall {
  int32_t (*function)(const void* args, void* stream);
  const void* args;
};
struct MiiRun {
  const struct MiiCall* calls;  // [count]
  int64_t count;
};
MII_API int32_t mii_run(const struct MiiRun* args, void* stream);

// ---- quantised blocks of GGUF files (CPU library) --------------------------------------------------------------------
// Block b of a format becomes numbers b * n .. (b + 1) * n - 1 of out, rounded to nearest even from float32.
struct MiiUnpack {
  void* out;           // [count * numbers in a block]
  const void* blocks;  // [count] blocks, one after the other
  int64_t count;
  int32_t type;        // the format's number in GGUF files; MII_UNSUPPORTED for those without code here
  int32_t dtype;
};
MII_API int32_t mii_unpack(const struct MiiUnpack* args, void* stream);

// ---- the library itself -------------------------------------------------------------------------------------------
MII_API const char* mii_last_error(void);
MII_API const char* mii_build_info(void);         // compiler, targets, and on the CPU the instruction set in use
MII_API int64_t mii_struct_size(const char* name);  // sizeof by struct name, 0 if unknown: the binding checks itself with it

#ifdef __cplusplus
}
#endif
