// The work list of attention, made on the device once a step: see attention_work.cuh for what it says.
#pragma once
#include "mii/attention_mma.cuh"
#include "mii/attention_work.cuh"

namespace mii {

constexpr int kPlanThreads = 1024;
constexpr int kPlanBuckets = 256;  // of context lengths, for the order of the prompts
// Prompts go to a kernel of their own, which is faster at them but leaves the memory idle meanwhile, where their key
// tiles are at least this many times the units of the decode axis.
constexpr int64_t kApart = 2;

struct PlanParams {
  MiiAttention a;
  WorkList work;
  Bounds bounds;
  int32_t group;       // query heads of a KV head
  int32_t apart_ctas;  // of the kernel for prompts alone; 0: there is none
};

struct PlanSequence {
  int q_start, q_len, kv_len, first;  // `first`: position of the first query token

  MII_DEVICE static PlanSequence of(const PlanParams& p, int s) {
    PlanSequence seq;
    seq.q_start = p.a.q_start[s];
    seq.q_len = p.a.q_start[s + 1] - seq.q_start;
    seq.kv_len = p.a.kv_len[s];
    seq.first = seq.kv_len - seq.q_len;
    return seq;
  }
  MII_DEVICE bool empty() const { return q_len <= 0 || kv_len <= 0; }
  MII_DEVICE bool is_decode(int group) const { return !empty() && q_len * group <= kDecodeRows; }
  MII_DEVICE bool is_prefill(int group) const { return !empty() && q_len * group > kDecodeRows; }
  // First key that query token `token` sees.
  MII_DEVICE int key_begin(int token, int window) const { return window > 0 ? max(0, first + token - window + 1) : 0; }
};

struct PlanNotes {
  int2 totals[kPlanThreads / kWarp];
  int longest, prefills;
  int buckets[kPlanBuckets];
  int lists[1];  // decode_base, order, tile_base: [max_seqs + 1] each
};

// Sums of what the threads before this one hold; `total` of all. Every thread of the CTA calls it.
MII_DEVICE int2 scan_before(int2 value, int2& total, PlanNotes& notes) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const auto scan = [lane](int2 v) {
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int x = __shfl_up_sync(kFullMask, v.x, offset), y = __shfl_up_sync(kFullMask, v.y, offset);
      if (lane >= offset) v = make_int2(v.x + x, v.y + y);
    }
    return v;
  };
  const int2 in_warp = scan(value);
  __syncthreads();
  if (lane == kWarp - 1) notes.totals[warp] = in_warp;
  __syncthreads();
  const int2 of_warps = scan(notes.totals[lane]);
  total = make_int2(__shfl_sync(kFullMask, of_warps.x, kWarp - 1), __shfl_sync(kFullMask, of_warps.y, kWarp - 1));
  const int before = warp == 0 ? 0 : warp - 1;
  const int x = __shfl_sync(kFullMask, of_warps.x, before), y = __shfl_sync(kFullMask, of_warps.y, before);
  return make_int2(in_warp.x - value.x + (warp ? x : 0), in_warp.y - value.y + (warp ? y : 0));
}

// The last index whose entry is not above `value`; `list` rises and starts at or below it.
MII_DEVICE int find_in(const int* list, int count, int value) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (list[middle] <= value ? low : high) = middle;
  }
  return low;
}

// Fills work.decode and decode_base; returns (sequences, units of the axis).
__device__ int2 list_decodes(const PlanParams& p, int seqs, int* decode_base, PlanNotes& notes) {
  const int share = (seqs + kPlanThreads - 1) / kPlanThreads, begin = threadIdx.x * share, end = min(seqs, begin + share);
  const auto entry = [&p](const PlanSequence& seq) {
    const int key = seq.key_begin(0, p.a.window), tile = key / kDecodeTile;
    const int tiles = (seq.kv_len + kDecodeTile - 1) / kDecodeTile - tile;
    return DecodeSeq{0, tile, tiles, seq.kv_len, seq.q_start, seq.q_len, 0, key};
  };
  int2 mine = make_int2(0, 0), total;
  for (int s = begin; s < end; ++s) {
    const PlanSequence seq = PlanSequence::of(p, s);
    if (seq.is_prefill(p.group)) {
      atomicAdd(&notes.prefills, 1);
      atomicMax(&notes.longest, seq.kv_len);
    }
    if (!seq.is_decode(p.group)) continue;
    mine = make_int2(mine.x + 1, mine.y + p.a.kv_heads * (entry(seq).tiles + kJobOverhead));
  }
  int2 at = scan_before(mine, total, notes);
  for (int s = begin; s < end; ++s) {
    const PlanSequence seq = PlanSequence::of(p, s);
    if (!seq.is_decode(p.group)) continue;
    DecodeSeq decode = entry(seq);
    decode.base = at.y;
    decode.slot = p.a.seq_slot[s];
    p.work.decode[at.x] = decode;
    decode_base[at.x] = at.y;
    at = make_int2(at.x + 1, at.y + p.a.kv_heads * (decode.tiles + kJobOverhead));
  }
  __syncthreads();
  return total;
}

// Cuts the decode axis: as many chunks as teams, or twice as many as CTAs where prompts compete for them.
__device__ void cut_axis(const PlanParams& p, int2 decodes, const int* decode_base, PlanHeader& header, bool alone) {
  const int jobs = decodes.x * p.a.kv_heads;
  const bool short_jobs = jobs >= kAloneJobs * p.bounds.ctas && decodes.y <= kAloneUnits * jobs;
  header.teams = header.items == 0 && short_jobs && p.a.head_dim <= kAloneHead ? kAttentionWarps : 1;
  const int wanted = alone ? header.teams * p.bounds.ctas : 2 * p.bounds.ctas;
  header.units = decodes.y;
  header.chunk_units = max(kMinChunk, (decodes.y + wanted - 1) / wanted);
  header.chunks = (decodes.y + header.chunk_units - 1) / header.chunk_units;
  for (int chunk = threadIdx.x; chunk < header.chunks; chunk += kPlanThreads) {
    const int first = find_in(decode_base, decodes.x, chunk * header.chunk_units);
    p.work.chunk_first[chunk] = first;
    p.work.chunk_seq[chunk] = p.work.decode[first];
  }
}

// Orders the prompts by context, longest first, and numbers their row tiles in that order; returns the tiles.
__device__ int order_prefills(const PlanParams& p, int seqs, int* order, int* tile_base, PlanNotes& notes) {
  for (int i = threadIdx.x; i < kPlanBuckets; i += kPlanThreads) notes.buckets[i] = 0;
  __syncthreads();
  const float scale = kPlanBuckets / (notes.longest + 1.0f);
  const auto bucket = [scale](const PlanSequence& seq) {
    return max(0, kPlanBuckets - 1 - static_cast<int>(seq.kv_len * scale));
  };
  for (int s = threadIdx.x; s < seqs; s += kPlanThreads) {
    const PlanSequence seq = PlanSequence::of(p, s);
    if (seq.is_prefill(p.group)) atomicAdd(&notes.buckets[bucket(seq)], 1);
  }
  __syncthreads();
  int2 total;
  const int count = threadIdx.x < kPlanBuckets ? notes.buckets[threadIdx.x] : 0;
  const int before = scan_before(make_int2(count, 0), total, notes).x;
  if (threadIdx.x < kPlanBuckets) notes.buckets[threadIdx.x] = before;
  __syncthreads();
  for (int s = threadIdx.x; s < seqs; s += kPlanThreads) {
    const PlanSequence seq = PlanSequence::of(p, s);
    if (seq.is_prefill(p.group)) order[atomicAdd(&notes.buckets[bucket(seq)], 1)] = s;
  }
  __syncthreads();
  const int prefills = notes.prefills, rows = prefill_rows(p.a.head_dim);
  const int share = (prefills + kPlanThreads - 1) / kPlanThreads, begin = threadIdx.x * share,
            end = min(prefills, begin + share);
  const auto tiles = [&](int rank) { return (PlanSequence::of(p, order[rank]).q_len * p.group + rows - 1) / rows; };
  int mine = 0;
  for (int rank = begin; rank < end; ++rank) mine += tiles(rank);
  int at = scan_before(make_int2(mine, 0), total, notes).x;
  for (int rank = begin; rank < end; ++rank) {
    tile_base[rank] = at;
    at += tiles(rank);
  }
  if (threadIdx.x == 0) tile_base[prefills] = total.x;
  __syncthreads();
  return total.x;
}

// Row tile `number` of the order, unsplit; a sequence's last rows, which see most keys, come first.
__device__ PrefillItem row_tile(const PlanParams& p, int prefills, const int* order, const int* tile_base, int number) {
  const int rows = prefill_rows(p.a.head_dim), keys = prefill_keys(p.a.head_dim);
  const int rank = find_in(tile_base, prefills, number), s = order[rank];
  const PlanSequence seq = PlanSequence::of(p, s);
  PrefillItem item = {};
  item.seq = s;
  item.row = (tile_base[rank + 1] - 1 - number) * rows;
  item.parts = 1;
  const int last = min(item.row + rows, seq.q_len * p.group) - 1;
  item.tile_begin = seq.key_begin(item.row / p.group, p.a.window) / keys;
  item.tile_end = (seq.first + last / p.group) / keys + 1;
  return item;
}

// Key tiles of all row tiles, for one KV head.
__device__ int64_t count_key_tiles(const PlanParams& p, int tiles, const int* order, const int* tile_base,
                                   PlanNotes& notes) {
  const int prefills = notes.prefills;
  int2 total;
  int64_t all = 0;
  for (int i = 0; i < tiles; i += kPlanThreads) {
    const int number = i + threadIdx.x;
    int mine = 0;
    if (number < tiles) {
      const PrefillItem item = row_tile(p, prefills, order, tile_base, number);
      mine = item.tile_end - item.tile_begin;
    }
    scan_before(make_int2(mine, 0), total, notes);
    all += total.x;
  }
  return all;
}

// Writes the prefill items. A row tile with more keys than the average CTA has to work on (of `all`) is split along its
// keys; in the kernel for prompts alone, of which a multiprocessor has one CTA, only if it has a quarter more, as the parts
// have to be joined.
__device__ int list_prefills(const PlanParams& p, int tiles, int64_t all, bool apart, const int* order,
                             const int* tile_base, PlanNotes& notes) {
  const int prefills = notes.prefills;
  int2 total;
  const int ctas = apart ? p.apart_ctas : p.bounds.ctas;
  const int average = max(kMinPrefillPart, static_cast<int>((all * p.a.kv_heads + ctas - 1) / ctas));
  const int limit = apart ? average + average / 4 : average;
  int items = 0, slots = 0;
  for (int i = 0; i < tiles; i += kPlanThreads) {
    const int number = i + threadIdx.x;
    PrefillItem item = {};
    if (number < tiles) item = row_tile(p, prefills, order, tile_base, number);
    const int keys = item.tile_end - item.tile_begin;
    if (keys > limit) item.parts = (keys + (average + 1) / 2 - 1) / ((average + 1) / 2);
    const int split = item.parts > 1 ? item.parts : 0;
    const int2 before = scan_before(make_int2(item.parts, split), total, notes);
    item.slot = (slots + before.y) * p.a.kv_heads;
    const int begin = item.tile_begin;
    for (int part = 0; part < item.parts; ++part) {
      item.part = part;
      item.tile_begin = begin + static_cast<int>(static_cast<int64_t>(keys) * part / item.parts);
      item.tile_end = begin + static_cast<int>(static_cast<int64_t>(keys) * (part + 1) / item.parts);
      p.work.items[items + before.x + part] = item;
    }
    items += total.x;
    slots += total.y;
  }
  return items;
}

__global__ void __launch_bounds__(kPlanThreads) plan_kernel(const __grid_constant__ PlanParams p) {
  extern __shared__ __align__(16) unsigned char shared[];
  PlanNotes& notes = *reinterpret_cast<PlanNotes*>(shared);
  int* decode_base = notes.lists;
  int* order = decode_base + p.a.max_seqs + 1;
  int* tile_base = order + p.a.max_seqs + 1;
  if (threadIdx.x == 0) notes.longest = notes.prefills = 0;
  __syncthreads();
  wait_for_previous();  // and no start_next(): attention reads the list before its own wait (attention_decode.cuh)
  const int seqs = min(p.a.counts[MII_NUM_SEQS], static_cast<int>(p.a.max_seqs));
  PlanHeader header = {};
  const int2 decodes = list_decodes(p, seqs, decode_base, notes);
  if (notes.prefills > 0) {
    const int tiles = order_prefills(p, seqs, order, tile_base, notes);
    const int64_t all = count_key_tiles(p, tiles, order, tile_base, notes);
    header.prompts_apart = p.apart_ctas > 0 && kApart * decodes.y <= all * p.a.kv_heads;
    header.items = list_prefills(p, tiles, all, header.prompts_apart, order, tile_base, notes);
  }
  cut_axis(p, decodes, decode_base, header, header.prompts_apart || notes.prefills == 0);
  if (threadIdx.x == 0) *p.work.header = header;
  __threadfence();  // for those who read it without having waited
}

inline size_t plan_shared(int64_t max_seqs) { return sizeof(PlanNotes) + 3 * (max_seqs + 1) * sizeof(int); }

}  // namespace mii
