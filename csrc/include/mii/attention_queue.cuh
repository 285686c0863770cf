// How the CTAs of the attention kernel share a step's work, and what their threads tell each other about it.
//
// With decode work alone every CTA takes the chunk of its own number, or of as many as it has teams. With prompts in the
// step both kinds of work are queues: half of the CTAs (a half that shares its multiprocessors with the other) start on
// prompts, half on decode, so that tensor cores and memory are busy together, and each turns to the other queue when its
// own is empty.
#pragma once
#include "mii/attention_merge.cuh"

namespace mii {

// Which key steps or tiles (by their first key) the rows of a warp ask for: those from `begin` to `end`; and those
// among them from `clear` to `clear_end` whole, with no look at each key.
struct alignas(16) WarpKeys {
  int begin, end, clear, clear_end;

  // Rows at positions first .. last, keys taken `width` at a time.
  MII_DEVICE static WarpKeys of(int first, int last, int width, int window) {
    const int back = window > 0 ? window - 1 : 1 << 30;
    return {first - back - width + 1, last + 1, last - back, first - width + 2};
  }
  MII_DEVICE bool has(int key) const { return key >= begin && key < end; }
  MII_DEVICE bool cuts(int key) const { return key < clear || key >= clear_end; }
};

// The warps that share a job, as one of them sees it.
struct Team {
  int stride, offset;  // keys from a step of a warp to its next one, and before its first
  int whole;           // tiles up to which a job belongs to the chunk that it starts in, as a whole
  int chunk, chunk_units;

  // `number`: of the work that the CTA drew.
  MII_DEVICE static Team of(const PlanHeader& header, int number, int warp) {
    const int units = header.chunk_units;
    if (header.teams == 1) return {kDecodeTile, warp * kDecodeStep, kWholeJob, number, units};
    return {kDecodeStep, 0, units / kAloneWhole, number * kAttentionWarps + warp, units};
  }
  MII_DEVICE bool alone() const { return stride == kDecodeStep; }
};

// The sequence at the start of a chunk.
struct ChunkStart {
  int index;
  DecodeSeq seq;

  MII_DEVICE static ChunkStart of(const AttentionParams& p, int chunk) {
    return {__ldcg(p.work.chunk_first + chunk), load_planned(p.work.chunk_seq + chunk)};
  }
};

// A position on the decode axis: a job, and which of its keys this warp has.
struct JobCursor {
  DecodeSeq seq;
  int index, head;   // `seq` is number `index` of the list
  int base, end;     // first unit of the job, end of the chunk
  int key, key_end;  // the warp's next step, if it is before the end of the chunk's keys; key_end 0: the chunk is done

  MII_DEVICE void start(const AttentionParams& p, const PlanHeader& header, const Team& team) {
    key = key_end = 0;
    if (team.chunk >= header.chunks) return;
    start_at(p, header, team, ChunkStart::of(p, team.chunk));
  }

  // `first`: of this chunk.
  MII_DEVICE void start_at(const AttentionParams& p, const PlanHeader& header, const Team& team,
                           const ChunkStart& first) {
    key = key_end = 0;
    if (team.chunk >= header.chunks) return;
    const int begin = team.chunk * header.chunk_units;
    end = min(begin + header.chunk_units, header.units);
    index = first.index;
    seq = first.seq;
    const int units = seq.tiles + kJobOverhead;
    head = (begin - seq.base) / units;
    base = seq.base + head * units;
    if (seq.tiles <= team.whole && begin > base) return next_job(p, team);  // the chunk before has this one
    find_keys(max(begin - base - kJobOverhead, 0), team);
  }

  MII_DEVICE void next_job(const AttentionParams& p, const Team& team) {
    key_end = 0;
    base += seq.tiles + kJobOverhead;
    if (base >= end) return;
    if (++head == p.a.kv_heads) {
      head = 0;
      seq = load_planned(p.work.decode + ++index);
    }
    find_keys(0, team);
  }

  // From a tile on, counted from seq.first_tile.
  MII_DEVICE void find_keys(int tile, const Team& team) {
    const int tile_end = seq.tiles <= team.whole ? seq.tiles : min(end - base - kJobOverhead, seq.tiles);
    if (tile >= tile_end) return;
    key = (seq.first_tile + tile) * kDecodeTile + team.offset;
    key_end = min((seq.first_tile + tile_end) * kDecodeTile, seq.kv_len);
    while (key + kDecodeStep <= seq.key_begin) key += team.stride;  // before the window; at most three
  }

  MII_DEVICE bool more() const { return key_end > 0; }
  // Whether no key of the step can be of this engine step: of its own new tokens, or of those of a sequence whose
  // block it shares since the same step, who are no more than a job has rows.
  MII_DEVICE bool old() const { return key + kDecodeStep <= seq.kv_len - seq.q_len - kDecodeRows; }
  // Whether the sequence has all keys of the step.
  MII_DEVICE bool full() const { return key >= seq.key_begin && key + kDecodeStep <= seq.kv_len; }
};
static_assert(kMinChunk > kJobOverhead, "a chunk that begins in a job's empty units holds a tile of it");

struct DecodeNotes {
  JobCursor job[kAttentionWarps];              // where each warp computes
  float2 scale[kAttentionWarps][kDecodeRows];  // maximum and sum of each warp's rows, at the end of a job
};

// A prefill item for one KV head, with what follows from it.
struct PrefillTile {
  int q_start, first, slot, head;  // `first`: position of the sequence's first query token
  int row, rows;                   // packed rows of the tile
  int key_begin, key_end;          // the keys that its rows see together
  int key_limit;                   // past the last key that the sequence has
  int load_begin, load_end;        // the whole key tiles of this part
  int part, parts, parts_at;

  template <int D>
  MII_DEVICE static PrefillTile of(const AttentionParams& p, int number) {
    const PrefillItem item = p.work.items[number / p.a.kv_heads];
    PrefillTile tile;
    tile.q_start = p.a.q_start[item.seq];
    tile.slot = p.a.seq_slot[item.seq];
    tile.head = number % p.a.kv_heads;
    const int q_len = p.a.q_start[item.seq + 1] - tile.q_start;
    tile.key_limit = p.a.kv_len[item.seq];
    tile.first = tile.key_limit - q_len;
    tile.row = item.row;
    tile.rows = min(prefill_rows(D), q_len * p.group - item.row);
    tile.key_begin = p.a.window > 0 ? max(0, tile.position(p, 0) - p.a.window + 1) : 0;
    tile.key_end = tile.position(p, tile.rows - 1) + 1;
    tile.load_begin = item.tile_begin * prefill_keys(D);
    tile.load_end = item.tile_end * prefill_keys(D);
    tile.part = item.part;
    tile.parts = item.parts;
    tile.parts_at = item.slot + tile.head * item.parts;
    return tile;
  }
  MII_DEVICE int position(const AttentionParams& p, int at) const { return first + (row + at) / p.group; }
};

struct PrefillNotes {
  PrefillTile tile;
  WarpKeys keys[kAttentionWarps];
  uint8_t token[kAttentionThreads];  // of each row, from the tile's first on
  float slope[kAttentionThreads];    // ALiBi
};

// What the threads of a CTA tell each other besides tiles of numbers.
struct SharedNotes {
  int kind, number;  // the work at hand (see Queue); kind below 0: none is left
  int ahead;         // the number that was drawn for later
  int switched;      // whether this CTA has turned from its first queue to the other
  int flag;
  union {
    DecodeNotes decode;
    PrefillNotes prefill;
  };
};

// Thread 0 alone calls these; the others read notes->kind and notes->number after a barrier. All of it lives in shared
// memory, as the work between wants every register.
struct Queue {
  static constexpr int kPrefill = 0, kDecode = 1, kDone = -1;

  MII_DEVICE static int limit(const AttentionParams& p, int kind) {
    const PlanHeader header = load_planned(p.work.header);
    if (kind == kDecode) return (header.chunks + header.teams - 1) / header.teams;
    return header.prompts_apart ? 0 : header.items * p.a.kv_heads;
  }

  __device__ static void enter(const AttentionParams& p, SharedNotes* notes) {
    const bool alone = limit(p, kPrefill) == 0;
    notes->switched = 0;
    if (alone) {
      notes->kind = static_cast<int>(blockIdx.x) < limit(p, kDecode) ? kDecode : kDone;
      notes->number = blockIdx.x;
    } else {
      const bool decode_first = blockIdx.x >= gridDim.x / 2 && limit(p, kDecode) > 0;
      notes->kind = decode_first ? kDecode : kPrefill;
      notes->ahead = atomicAdd(p.space.queue + notes->kind, 1);
      next(p, notes);
    }
  }

  // Asks for the work after the present one: called while that one waits for memory anyway.
  MII_DEVICE static void draw(const AttentionParams& p, SharedNotes* notes) {
    if (limit(p, kPrefill) > 0) notes->ahead = atomicAdd(p.space.queue + notes->kind, 1);
  }

  __device__ static void next(const AttentionParams& p, SharedNotes* notes) {
    if (limit(p, kPrefill) == 0) {
      notes->kind = kDone;
      return;
    }
    notes->number = notes->ahead;
    if (notes->number < limit(p, notes->kind)) return;
    if (!notes->switched) {
      notes->switched = 1;
      notes->kind ^= 1;
      notes->number = atomicAdd(p.space.queue + notes->kind, 1);
      if (notes->number < limit(p, notes->kind)) return;
    }
    notes->kind = kDone;
    leave(p);
  }

  // The last CTA to leave sets the counters back for the next launch.
  __device__ static void leave(const AttentionParams& p) {
    __threadfence();
    if (atomicAdd(p.space.queue + 2, 1) != static_cast<int>(gridDim.x) - 1) return;
    p.space.queue[0] = p.space.queue[1] = p.space.queue[2] = 0;
  }
};

}  // namespace mii
