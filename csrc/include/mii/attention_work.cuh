// The work list that mii_attention_plan writes and every layer's attention reads, and the scratch memory beside it.
//
// A sequence whose packed rows (query tokens x query heads of a KV group) fit one mma tile is "decode": all its keys,
// for all KV heads, are laid end to end on one axis with those of the other decode sequences, and the axis is cut
// into equal chunks, one for each team: of few jobs the four warps of a CTA share each, of many every warp has its own,
// which spares it waiting for the others and joining what they found. Any other sequence is cut into tiles of packed
// rows, each an item of the prefill list.
#pragma once
#include "mii/abi/attention.h"
#include "mii/common.cuh"

namespace mii {

constexpr int kAttentionThreads = 128;
constexpr int kAttentionWarps = kAttentionThreads / kWarp;
constexpr int kDecodeRows = 16;     // packed rows of a decode job: one mma tile
constexpr int kDecodeTile = 64;     // keys of one unit on the axis
constexpr int kDecodeStep = 16;     // of them, one warp's: k of one mma
constexpr int kJobOverhead = 1;     // what starting a job costs, in units
constexpr int kMinChunk = 4;        // units; shorter chunks cost more to join than they save
constexpr int kWholeJob = 8;        // tiles up to which a job of a CTA is never cut: joining its parts would cost more
constexpr int kAloneHead = 128;     // largest head whose jobs single warps do, with the queries in their registers
constexpr int kAloneJobs = 7;       // jobs for each CTA from which on they do,
constexpr int kAloneUnits = 7;      // if the mean job has at most so many units: longer ones come out less even
constexpr int kAloneWhole = 4;      // a warp's job is never cut that is at most one in so many of its chunk
constexpr int kMinPrefillPart = 8;  // key tiles below which an item is never split

// Rows and keys of a prefill tile.
constexpr int prefill_rows(int head_dim) { return head_dim <= 128 ? 128 : 64; }
constexpr int prefill_keys(int head_dim) { return head_dim <= 128 ? 64 : 32; }

struct alignas(16) PlanHeader {
  int32_t chunks, chunk_units, units;  // the decode axis
  int32_t items;                       // prefill items, each to be done for every KV head
  int32_t prompts_apart;               // whether a kernel of their own does them, or the one that does the rest
  int32_t teams;                       // of a CTA: 1, or as many as it has warps
};

// Jobs of a sequence lie at base + head * (tiles + kJobOverhead); the first kJobOverhead units of each are empty.
struct alignas(16) DecodeSeq {
  int32_t base, first_tile, tiles;  // tiles of kDecodeTile keys, first_tile the one that holds key_begin
  int32_t kv_len, q_start, q_len, slot, key_begin;
};

// Of the work list, which may be read before the kernel before this one has ended: past the L1 cache.
template <typename T>
__device__ __forceinline__ T load_planned(const T* address) {
  static_assert(sizeof(T) % 16 == 0 && alignof(T) == 16);
  T value;
#pragma unroll
  for (size_t i = 0; i < sizeof(T) / 16; ++i) {
    reinterpret_cast<int4*>(&value)[i] = __ldcg(reinterpret_cast<const int4*>(address) + i);
  }
  return value;
}

// Packed rows row .. of sequence `seq` against key tiles tile_begin .. tile_end.
struct alignas(16) PrefillItem {
  int32_t seq, row, tile_begin, tile_end;
  int32_t part, parts;  // parts > 1: partial results go to slots slot + head * parts + part
  int32_t slot, padding;
};

struct WorkList {
  PlanHeader* header;
  DecodeSeq* decode;     // [max_seqs]
  int32_t* chunk_first;  // [max_chunks] index in `decode` of the sequence at the start of each chunk
  DecodeSeq* chunk_seq;  // [max_chunks] these sequences
  PrefillItem* items;
};

// What the grid is and what follows from it. A chunk of the decode axis touches at most two jobs that others share,
// so it has two slots of partial results; prefill items are split such that all parts are at most three for each CTA.
struct Bounds {
  int32_t ctas;  // of the attention kernel: all that fit on the card at once
  __host__ __device__ int max_chunks() const { return kAttentionWarps * ctas; }
  __host__ __device__ int max_parts() const { return 3 * ctas; }
  // Chunks that have slots of their own. More, a chunk for each warp, there are only in steps without prompts, whose slots
  // follow and serve them.
  __host__ __device__ int own_chunks() const { return 2 * ctas; }
};
static_assert(2 * (kAttentionWarps - 2) * kDecodeRows <= 3 * prefill_rows(kAloneHead));

__host__ __device__ inline int64_t max_items(const MiiAttention& a, Bounds bounds) {
  const int64_t rows = a.max_tokens * (a.q_heads / a.kv_heads);
  return rows / prefill_rows(a.head_dim) + a.max_seqs + bounds.max_parts();
}

__host__ __device__ inline int64_t align_up(int64_t bytes) { return (bytes + 127) / 128 * 128; }

__host__ __device__ inline int64_t work_bytes(const MiiAttention& a, Bounds bounds) {
  return align_up(sizeof(PlanHeader)) + align_up(a.max_seqs * sizeof(DecodeSeq)) +
         align_up(bounds.max_chunks() * sizeof(int32_t)) + align_up(bounds.max_chunks() * sizeof(DecodeSeq)) +
         align_up(max_items(a, bounds) * sizeof(PrefillItem));
}

inline WorkList work_list(const MiiAttention& a, Bounds bounds) {
  char* at = static_cast<char*>(a.work);
  const auto take = [&at](int64_t bytes) {
    char* here = at;
    at += align_up(bytes);
    return here;
  };
  WorkList list;
  list.header = reinterpret_cast<PlanHeader*>(take(sizeof(PlanHeader)));
  list.decode = reinterpret_cast<DecodeSeq*>(take(a.max_seqs * sizeof(DecodeSeq)));
  list.chunk_first = reinterpret_cast<int32_t*>(take(bounds.max_chunks() * sizeof(int32_t)));
  list.chunk_seq = reinterpret_cast<DecodeSeq*>(take(bounds.max_chunks() * sizeof(DecodeSeq)));
  list.items = reinterpret_cast<PrefillItem*>(at);
  return list;
}

// Counters first, at places that do not depend on the batch: they are zero between launches, whatever the bucket.
struct Workspace {
  int32_t* queue;            // [3] next prefill item, next decode chunk, CTAs that are done
  int32_t* decode_arrived;   // [max_chunks]
  int32_t* prefill_arrived;  // [max_parts]
  float* decode_parts;       // [2 own_chunks] partial tiles of kDecodeRows rows
  float* prefill_parts;      // [max_parts] partial tiles of prefill_rows(head_dim) rows
};

// Floats of a partial tile: [rows, head_dim] sums of weight * value, then [rows, 2] (maximum, sum of weights).
__host__ __device__ constexpr int64_t part_floats(int rows, int head_dim) { return rows * int64_t(head_dim + 2); }

__host__ __device__ inline int64_t counter_bytes(Bounds bounds) {
  return align_up((32 + bounds.max_chunks() + bounds.max_parts()) * int64_t(sizeof(int32_t)));
}

__host__ __device__ inline int64_t workspace_bytes(const MiiAttention& a, Bounds bounds) {
  return counter_bytes(bounds) +
         sizeof(float) * (2 * bounds.own_chunks() * part_floats(kDecodeRows, a.head_dim) +
                          bounds.max_parts() * part_floats(prefill_rows(a.head_dim), a.head_dim));
}

inline Workspace workspace(const MiiAttention& a, Bounds bounds) {
  int32_t* counters = static_cast<int32_t*>(a.workspace);
  float* parts = reinterpret_cast<float*>(static_cast<char*>(a.workspace) + counter_bytes(bounds));
  return {counters, counters + 32, counters + 32 + bounds.max_chunks(), parts,
          parts + 2 * bounds.own_chunks() * part_floats(kDecodeRows, a.head_dim)};
}

// The arguments of the attention kernel.
struct AttentionParams {
  MiiAttention a;
  WorkList work;
  Workspace space;
  int32_t group;       // query heads of a KV head
  int32_t block_bits;  // log2(block_size)
  float unit;          // scale in units of log2
};

// The same, with what rotates and stores the step's own tokens.
struct DecodeAttentionParams {
  AttentionParams p;
  const float* cos_sin;
  const int32_t* positions;
  const int32_t* kv_slots;
  int32_t max_positions;
};

}  // namespace mii
