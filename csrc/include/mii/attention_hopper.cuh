// Attention of whole prompts and chunks of them on Hopper: FlashAttention-3's division of labour over the block table.
//
// A CTA fills a multiprocessor and takes tile after tile of packed rows (token-major, the query heads of one KV head
// side by side) from the same list as the kernel for older cards. Of one warpgroup a warp has the copy engine bring K and
// V tiles into a ring, in the order in which they are asked for (K0, K1, V0, K2, V1, ...), and the others draw tiles and
// copy their queries, a tile ahead. Two warpgroups compute, 64 rows each: while one turns scores into weights the other
// has the tensor cores, and within a warpgroup the weights of one tile of keys are made while the values of the tile
// before are added up. That goes on from one tile of rows to the next: its first scores come with the last values of the
// one before, so that neither beginning nor end of a tile leaves the tensor cores idle.
#pragma once
#include <stddef.h>

#include "mii/attention_queue.cuh"
#include "mii/attention_score.cuh"
#include "mii/tensor_map.cuh"
#include "mii/same_for_warp.cuh"
#include "mii/wgmma.cuh"

namespace mii {

constexpr int kHopperThreads = 3 * kWarpgroup;
constexpr int kHopperConsumers = 2;     // warpgroups that compute
constexpr int kHopperScouts = 96;       // threads that draw tiles and copy queries
constexpr int kHopperKeys = 128;        // of a K or V tile
constexpr int kHopperNotes = 2048;      // bytes of HopperNotes
constexpr int kHopperAlignment = 1024;  // of tiles in shared memory
constexpr int kHopperBudget = 227 * 1024 - kHopperNotes - kHopperAlignment;

template <int D>
struct HopperShape {
  static constexpr int kRows = prefill_rows(D), kKeys = kHopperKeys;
  static_assert(kRows == 64 * kHopperConsumers, "64 rows for each warpgroup");
  using Queries = Panels<kRows, D>;
  using Keys = Panels<kKeys, D>;
  static constexpr int kQueries = 2;  // buffers
  static constexpr int kFit = (kHopperBudget - kQueries * Queries::kBytes) / Keys::kBytes;
  static constexpr int kSlots = kFit < 8 ? kFit : 8;
  static constexpr int kShared = kQueries * Queries::kBytes + kSlots * Keys::kBytes + kHopperNotes + kHopperAlignment;
  static_assert(kSlots >= 4, "two tiles are read at once, one is on its way, one is waited for");
};

struct HopperParams {
  AttentionParams p;
  TensorMap k, v;  // of the caches as [rows, D], in boxes of 64 elements by `box_rows` rows, swizzled
  int box_rows;    // at most a block
};

struct HopperNotes {
  static constexpr int kMaxSlots = 8, kTiles = 4;
  uint64_t query_full[2], query_free[2], tile_full[2];  // barriers
  uint64_t slot_full[kMaxSlots], slot_free[kMaxSlots];
  // Drawn one after the other; rows 0: there is no more work. A tile is drawn when its queries have a buffer: those of
  // the tile two before are then read to their end, so that its results are the oldest that are still to be stored.
  PrefillTile tile[kTiles];
  float2 totals[64 * kHopperConsumers];  // maximum and sum of weights of each row of the tile that is to be stored
  int last[kHopperConsumers];            // whether a warpgroup was the last of those that share its rows
};
static_assert(sizeof(HopperNotes) <= kHopperNotes);

// Numbers of the barriers of threads.
struct HopperBarrier {
  static constexpr int kTurn = 2, kGroup = 4;  // plus the number of the warpgroup
};

#if defined(MII_HOPPER)

// The shared memory of a CTA.
template <int D>
struct HopperMemory {
  using Shape = HopperShape<D>;
  HopperNotes* notes;
  uint32_t base, barriers;  // shared addresses of the tiles and of the notes

  MII_DEVICE explicit HopperMemory(unsigned char* shared) {
    const uint32_t start = shared_address(shared);
    base = (start + kHopperAlignment - 1) / kHopperAlignment * kHopperAlignment;
    barriers = base + Shape::kShared - kHopperNotes - kHopperAlignment;
    notes = reinterpret_cast<HopperNotes*>(shared + (barriers - start));
  }
  MII_DEVICE uint32_t queries(int buffer) const { return base + buffer * Shape::Queries::kBytes; }
  MII_DEVICE uint32_t slot(int at) const {
    return base + Shape::kQueries * Shape::Queries::kBytes + at * Shape::Keys::kBytes;
  }
  MII_DEVICE uint32_t query_full(int buffer) const { return barriers + offsetof(HopperNotes, query_full) + 8 * buffer; }
  MII_DEVICE uint32_t query_free(int buffer) const { return barriers + offsetof(HopperNotes, query_free) + 8 * buffer; }
  MII_DEVICE uint32_t tile_full(int buffer) const { return barriers + offsetof(HopperNotes, tile_full) + 8 * buffer; }
  MII_DEVICE uint32_t slot_full(int at) const { return barriers + offsetof(HopperNotes, slot_full) + 8 * at; }
  MII_DEVICE uint32_t slot_free(int at) const { return barriers + offsetof(HopperNotes, slot_free) + 8 * at; }

  // By one thread, before all others go on.
  MII_DEVICE void init() const {
    constexpr int kWarps = kHopperConsumers * kWarpgroup / kWarp;
    for (int i = 0; i < Shape::kQueries; ++i) {
      barrier_init(query_full(i), kHopperScouts);
      barrier_init(query_free(i), kWarps);
      barrier_init(tile_full(i), 1);
    }
    for (int i = 0; i < Shape::kSlots; ++i) {
      barrier_init(slot_full(i), 1);
      barrier_init(slot_free(i), kWarps);
    }
    publish_writes();
  }
};

// ---- the warps that copy ------------------------------------------------------------------------------------------

// The warp that has K and V tiles copied.
template <int D>
struct HopperCarrier {
  using Shape = HopperShape<D>;
  const HopperParams& all;
  const AttentionParams& p;
  const HopperMemory<D> memory;
  const int lane;
  RingPlace<Shape::kSlots> place;

  // Lane l: row in the cache, seen as [rows, D], of the box of keys key + box_rows l ...; the first row of all for keys
  // that nobody sees.
  MII_DEVICE uint32_t look_up(const PrefillTile& tile, int key) const {
    const int at = key + all.box_rows * lane;
    if (at >= min(tile.key_limit, key + Shape::kKeys) || at + all.box_rows <= tile.key_begin) return 0;
    const int block = p.a.block_table[tile.slot * p.a.max_blocks + (at >> p.block_bits)];
    return ((static_cast<uint32_t>(block) * p.a.kv_heads + tile.head) << p.block_bits) + (at & (p.a.block_size - 1));
  }

  MII_DEVICE void copy(const TensorMap* map, uint32_t rows) {
    barrier_wait(memory.slot_free(place.at), place.parity ^ 1);
    const uint32_t barrier = memory.slot_full(place.at), slot = memory.slot(place.at);
    if (lane == 0) barrier_expect(barrier, Shape::Keys::kBytes);
#pragma unroll 1
    for (int row = 0, box = 0; row < Shape::kKeys; row += all.box_rows, ++box) {
      const uint32_t cache_row = __shfl_sync(kFullMask, rows, box);
      if (lane != 0) continue;
#pragma unroll
      for (int panel = 0; panel < D / 64; ++panel) {
        copy_box(slot + Shape::Keys::offset(row, 8 * panel), map, 64 * panel, static_cast<int>(cache_row), barrier);
      }
    }
    place.next();
  }

  // K0, K1, V0, K2, V1, ..., over all tiles.
  MII_DEVICE void run() {
    RingPlace<Shape::kQueries> buffer;
    uint32_t before = 0;  // rows of the keys whose values are still to be copied
    bool first = true;
#pragma unroll 1
    for (int number = 0;; ++number) {
      barrier_wait(memory.tile_full(buffer.at), buffer.parity);
      const PrefillTile tile = memory.notes->tile[number % HopperNotes::kTiles];
      if (tile.rows == 0) break;
      uint32_t rows = look_up(tile, tile.load_begin);
#pragma unroll 1
      for (int key = tile.load_begin; key < tile.load_end; key += Shape::kKeys) {
        const uint32_t after = look_up(tile, key + Shape::kKeys);
        copy(&all.k, rows);
        if (!first) copy(&all.v, before);
        first = false;
        before = rows;
        rows = after;
      }
      buffer.next();
    }
    if (!first) copy(&all.v, before);
  }
};

// The warps that draw tiles and copy their queries.
template <typename T, int D>
struct HopperScout {
  using Shape = HopperShape<D>;
  static constexpr int kChunks = Shape::Queries::kChunks;
  static_assert(kHopperScouts % kChunks == 0);
  const AttentionParams& p;
  const HopperMemory<D> memory;
  const int thread;

  MII_DEVICE void copy_queries(const PrefillTile& tile, int buffer) {
    const uint32_t queries = memory.queries(buffer);
    const int column = thread % kChunks;
#pragma unroll 2
    for (int row = thread / kChunks; row < Shape::kRows; row += kHopperScouts / kChunks) {
      const T* source = query_row<T, D>(p, tile.q_start, tile.head, tile.row + min(row, tile.rows - 1)) + column * 8;
      copy_async(queries + Shape::Queries::offset(row, column), source, row < tile.rows);
    }
    copy_async_commit();
    copy_async_wait<0>();
    publish_writes();
  }

  MII_DEVICE void run() {
    const int limit = p.work.header->prompts_apart ? p.work.header->items * p.a.kv_heads : 0;
    int drawn = blockIdx.x;  // known to thread 0 alone
    RingPlace<Shape::kQueries> buffer;
#pragma unroll 1
    for (int number = 0;; ++number) {
      barrier_wait(memory.query_free(buffer.at), buffer.parity ^ 1);
      PrefillTile& tile = memory.notes->tile[number % HopperNotes::kTiles];
      if (thread == 0) {
        if (drawn < limit) {
          tile = PrefillTile::of<D>(p, drawn);
          drawn = gridDim.x + atomicAdd(p.space.queue + Queue::kPrefill, 1);
        } else {
          tile.rows = 0;
        }
        barrier_arrive(memory.tile_full(buffer.at));
      }
      barrier_wait(memory.tile_full(buffer.at), buffer.parity);
      if (tile.rows == 0) break;
      copy_queries(tile, buffer.at);
      barrier_arrive(memory.query_full(buffer.at));
      buffer.next();
    }
    barrier_arrive(memory.query_full(buffer.at));
    if (thread == 0) Queue::leave(p);
  }
};

// ---- the warpgroups that compute ----------------------------------------------------------------------------------

// What the rows of a thread, row l/4 of its warp and the eighth after it, see.
struct HopperRows {
  int position[2];
  float slope[2];        // ALiBi
  int clear, clear_end;  // keys that all rows of the warp see

  template <bool kExtras>
  MII_DEVICE static HopperRows of(const AttentionParams& p, const PrefillTile& tile, int row) {
    HopperRows rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const RowView view = RowView::of<kExtras>(p, tile.first, tile.head, tile.row + row + 8 * half);
      rows.position[half] = view.position;
      rows.slope[half] = view.slope;
    }
    rows.clear = __reduce_max_sync(kFullMask, rows.begin(p, 1));
    rows.clear_end = __reduce_min_sync(kFullMask, rows.end(0, tile.load_end));
    return rows;
  }
  MII_DEVICE int begin(const AttentionParams& p, int half) const {
    return p.a.window > 0 ? position[half] - p.a.window + 1 : 0;
  }
  MII_DEVICE int end(int half, int load_end) const { return min(position[half] + 1, load_end); }
  MII_DEVICE bool cuts(int key) const { return key < clear || key + kHopperKeys > clear_end; }
};

// The keys of a tile of rows, the same for all threads.
struct HopperKeys {
  int begin, limit;          // that exist and are seen by some row
  int load_begin, load_end;  // that are read

  MII_DEVICE static HopperKeys of(const PrefillTile& tile) {
    return {same_for_warp(tile.key_begin), same_for_warp(tile.key_limit), same_for_warp(tile.load_begin),
            same_for_warp(tile.load_end)};
  }
};

template <typename T, int D, bool kExtras>
struct HopperWorker {
  using Shape = HopperShape<D>;
  static constexpr int kKeys = Shape::kKeys;
  const HopperParams& all;
  const AttentionParams& p;
  const HopperMemory<D> memory;
  const int group, thread;  // number of the warpgroup, thread in it
  RingPlace<Shape::kSlots> place;
  RingPlace<Shape::kQueries> buffer;
  int number;                      // of the tile, counted from the CTA's first
  float out[D / 2];                // fragment D of [64, D]
  float score[kKeys / 2];          // fragment D of [64, kKeys]
  uint32_t weight[kKeys / 16][4];  // fragments A of [64, 16] each
  float top[2], sum[2], factor[2];  // top: in units of log2; sum: of this lane's columns only
  bool moved;                       // some factor of the warp is not 1

  MII_DEVICE void start_out() {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] = 0.0f;
  }
  MII_DEVICE void start_totals() {
    top[0] = top[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
  }
  // Notes maximum and sum of the rows, for when their results are stored.
  MII_DEVICE void keep_totals() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = quad_sum(sum[half]);
      if (thread % 4 == 0) memory.notes->totals[first_row() + 8 * half] = make_float2(top[half], total);
    }
    __syncwarp();
  }
  MII_DEVICE int first_row() const { return 64 * group + thread / kWarp * 16 + thread % kWarp / 4; }
  MII_DEVICE const PrefillTile& tile_at(int which) const { return memory.notes->tile[which % HopperNotes::kTiles]; }

  // The warpgroups take turns in handing products to the tensor cores, so that each makes weights in the other's time.
  MII_DEVICE void take_turn() const {
    threads_wait(HopperBarrier::kTurn + group, kHopperConsumers * kWarpgroup);
  }
  MII_DEVICE void pass_turn() const {
    threads_arrive(HopperBarrier::kTurn + 1 - group, kHopperConsumers * kWarpgroup);
  }
  MII_DEVICE void release(uint32_t barrier) const {
    if (thread % kWarp == 0) barrier_arrive(barrier);
  }

  // The next slot, once it is full.
  MII_DEVICE int next_slot() {
    const int at = place.at;
    barrier_wait(memory.slot_full(at), place.parity);
    place.next();
    return at;
  }

  // Addresses that descriptors are made of.
  MII_DEVICE uint32_t slot(int at) const { return same_for_warp(static_cast<int>(memory.slot(at))); }
  MII_DEVICE uint32_t queries() const {
    return same_for_warp(static_cast<int>(memory.queries(buffer.at) + Shape::Queries::elements_at(64 * group, 0)));
  }

  // Hands over score = queries . the keys of a slot.
  MII_DEVICE void multiply_keys(uint32_t queries, uint32_t slot) {
    const uint64_t a = matrix_descriptor(queries, 16, Shape::Queries::kStrideBytes);
    const uint64_t b = matrix_descriptor(slot, 16, Shape::Keys::kStrideBytes);
    products_fence();
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      const uint64_t a_step = advanced(a, Shape::Queries::elements_at(0, step));
      const uint64_t b_step = advanced(b, Shape::Keys::elements_at(0, step));
      if (step == 0) {
        product<T, false>(score, a_step, b_step);
      } else {
        product<T, true>(score, a_step, b_step);
      }
    }
    products_commit();
  }

  // Hands over out += weight . the values of a slot.
  MII_DEVICE void add_values(uint32_t slot) {
    const uint64_t b = matrix_descriptor(slot, Shape::Keys::kPanelBytes, Shape::Keys::kStrideBytes);
    products_fence();
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      product_transposed<T>(out, weight[step], advanced(b, Shape::Keys::rows_at(step)));
    }
    products_commit();
  }

  // Scale, soft cap and ALiBi where asked for, and -infinity for keys that a row does not see.
  MII_DEVICE void finish_scores(const HopperRows& rows, int key, int load_end) {
    const int first = key + thread % 4 * 2;
    const auto column = [first](int i) { return first + i / 4 * 8 + i % 2; };
    if constexpr (kExtras) {
      // one branch for all scores, not one for each: the cap needs twice the special functions of all else
      const auto finish = [&](const MiiAttention& a) {
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) {
          const RowView view = {rows.position[i / 2 % 2], 0, rows.slope[i / 2 % 2]};
          score[i] = full_score(a, score[i], column(i), view);
        }
      };
      MiiAttention a = p.a;
      if (a.softcap > 0.0f) {
        finish(a);
      } else {
        a.softcap = 0.0f;
        finish(a);
      }
    }
    if (!rows.cuts(key)) return;
    const int begin[2] = {rows.begin(p, 0), rows.begin(p, 1)}, end[2] = {rows.end(0, load_end), rows.end(1, load_end)};
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      const int half = i / 2 % 2;
      if (column(i) < begin[half] || column(i) >= end[half]) score[i] = -INFINITY;
    }
  }

  // Turns scores into weights relative to a running maximum, still in `score`. The maximum of a row moves only when it
  // grows by more than kSlack: until then weights above one are as good, and nothing has to be scaled.
  MII_DEVICE void soften() {
    constexpr float kSlack = 8.0f;
    const float unit = kExtras ? 1.0f : p.unit;
    float zero[2];
    bool moves_any = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float best = score[2 * half];
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
        best = fmaxf(best, fmaxf(score[4 * i + 2 * half], score[4 * i + 2 * half + 1]));
      }
      best = quad_max(best) * unit;
      const bool moves = best > top[half] + kSlack;
      factor[half] = moves ? exp2_fast(top[half] - best) : 1.0f;
      top[half] = moves ? best : top[half];
      sum[half] *= factor[half];
      zero[half] = top[half] == -INFINITY ? 0.0f : top[half];
      moves_any |= moves;
    }
    moved = __any_sync(kFullMask, moves_any);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) {
        float& left = score[4 * i + 2 * half];
        float& right = score[4 * i + 2 * half + 1];
        left = exp2_fast(fmaf(left, unit, -zero[half]));
        right = exp2_fast(fmaf(right, unit, -zero[half]));
        total += left + right;
      }
      sum[half] += total;
    }
  }

  // Once the products that read the old weights and wrote `out` are finished.
  MII_DEVICE void take_weights() {
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) weight[i][j] = pack_pair<T>(score[8 * i + 2 * j], score[8 * i + 2 * j + 1]);
    }
  }
  MII_DEVICE void scale_out() {
    if (!moved) return;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] *= factor[i / 2 % 2];
  }

  // The keys of the present tile are read; its results are still to come. Waits for the next tile and its queries;
  // false: there is no more work.
  MII_DEVICE bool next_tile() {
    release(memory.query_free(buffer.at));
    buffer.next();
    ++number;
    return wait_for_tile();
  }
  MII_DEVICE bool wait_for_tile() {
    barrier_wait(memory.query_full(buffer.at), buffer.parity);
    return same_for_warp(tile_at(number).rows) != 0;
  }

  // Values of keys that no row sees become zeros, whatever the cache holds there: weights of zero do not undo a NaN. Both
  // warpgroups do all of it, as neither knows how far the other is.
  MII_DEVICE void clear_values(const HopperKeys& range, int key, int at) {
    const int begin = range.begin - key, end = range.limit - key;
    if (begin <= 0 && end >= kKeys) return;
    const uint32_t slot = memory.slot(at);
#pragma unroll 1
    for (int i = thread; i < kKeys * Shape::Keys::kChunks; i += kWarpgroup) {
      const int row = i / Shape::Keys::kChunks, column = i % Shape::Keys::kChunks;
      if (row < begin || row >= end) store_zeros(slot + Shape::Keys::offset(row, column));
    }
    publish_writes();
    threads_wait(HopperBarrier::kGroup + group, kWarpgroup);
  }

  // Stores the results of a tile that is done.
  MII_DEVICE void finish(const PrefillTile& tile) const {
    if (tile.parts == 1) {
      store_rows(tile);
    } else {
      join(tile);
    }
  }

  // Scores of the keys from `key` on become weights, while the values of the keys at hand, from `old_key` on, which may
  // be another tile's, are added up.
  MII_DEVICE void turn(const HopperRows& rows, const HopperKeys& range, int key, const HopperKeys& old, int old_key) {
    const int keys = next_slot(), values = next_slot();
    clear_values(old, old_key, values);
    const uint32_t queries_at = queries(), keys_at = slot(keys), values_at = slot(values);
    take_turn();
    multiply_keys(queries_at, keys_at);
    add_values(values_at);
    pass_turn();
    products_wait<1>();
    settle(score);
    release(memory.slot_free(keys));
    finish_scores(rows, key, range.load_end);
    soften();
    made_by_now(sum[0] + sum[1]);  // the weights are made while values are added up, not after the wait
    products_wait<0>();
    settle(out);
    release(memory.slot_free(values));
    take_weights();
  }

  // The first of all: there are no values yet.
  MII_DEVICE void first_turn(const HopperRows& rows, const HopperKeys& range, int key) {
    const int keys = next_slot();
    take_turn();
    multiply_keys(queries(), slot(keys));
    pass_turn();
    products_wait<0>();
    settle(score);
    release(memory.slot_free(keys));
    finish_scores(rows, key, range.load_end);
    soften();
    take_weights();
  }

  // The last: there are no keys any more.
  MII_DEVICE void last_turn(const HopperKeys& old, int old_key) {
    const int values = next_slot();
    clear_values(old, old_key, values);
    take_turn();
    add_values(slot(values));
    pass_turn();
    products_wait<0>();
    settle(out);
    release(memory.slot_free(values));
  }

  // All tiles, the first of which is there.
  MII_DEVICE void attend() {
    HopperRows rows = HopperRows::of<kExtras>(p, tile_at(number), first_row());
    HopperKeys range = HopperKeys::of(tile_at(number));
    int key = range.load_begin;
    start_totals();
    start_out();
    first_turn(rows, range, key);
#pragma unroll 1
    while (true) {
      const int old_key = key;
      const HopperKeys old = range;
      const bool ends = key + kKeys >= range.load_end;
      key += kKeys;
      if (ends) {
        keep_totals();
        if (!next_tile()) break;
        start_totals();
        rows = HopperRows::of<kExtras>(p, tile_at(number), first_row());
        range = HopperKeys::of(tile_at(number));
        key = range.load_begin;
      }
      turn(rows, range, key, old, old_key);
      if (ends) {
        finish(tile_at(number - 1));
        start_out();
      } else {
        scale_out();
      }
    }
    last_turn(range, key - kKeys);
    finish(tile_at(number - 1));
  }

  // Rounded rows. Two lanes with neighbouring pairs of elements trade, so that one has four in a row of one chunk of eight
  // and the other of the next, and the four lanes of a row fill a sector.
  MII_DEVICE void store_rows(const PrefillTile& tile) const {
    const int part = thread % 4, row = first_row();
    const bool odd = part % 2 == 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = row + 8 * half;
      const float scale = __fdividef(1.0f, memory.notes->totals[at].y);
      const bool stored = at < tile.rows;
      T* target = out_row<T, D>(p, tile.q_start, tile.head, tile.row + (stored ? at : 0)) + 8 * odd + part / 2 * 4;
#pragma unroll
      for (int i = 0; i < D / 16; ++i) {
        const float* pair = &out[8 * i + 2 * half];
        const uint32_t left = pack_pair<T>(pair[0] * scale, pair[1] * scale);
        const uint32_t right = pack_pair<T>(pair[4] * scale, pair[5] * scale);
        const uint32_t got = __shfl_xor_sync(kFullMask, odd ? left : right, 1);
        if (stored) *reinterpret_cast<uint2*>(target + 16 * i) = make_uint2(odd ? got : left, odd ? right : got);
      }
    }
  }

  MII_DEVICE void store_part(const PrefillTile& tile, float* part) const {
    const int row = first_row();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = row + 8 * half;
      if (at >= tile.rows) continue;
      if (thread % 4 == 0) *part_scale<D, Shape::kRows>(part, at) = memory.notes->totals[at];
      float2* target = reinterpret_cast<float2*>(part + at * D) + thread % 4;
#pragma unroll
      for (int i = 0; i < D / 8; ++i) target[4 * i] = make_float2(out[4 * i + 2 * half], out[4 * i + 2 * half + 1]);
    }
  }

  // Whether this warpgroup is the last of those that share its rows; each of the two counts for itself.
  MII_DEVICE bool is_last(const PrefillTile& tile) const {
    threads_wait(HopperBarrier::kGroup + group, kWarpgroup);
    int* last = &memory.notes->last[group];
    if (thread == 0) {
      __threadfence();
      int32_t* counter = p.space.prefill_arrived + tile.parts_at + group;
      *last = atomicAdd(counter, 1) == tile.parts - 1;
      if (*last) *counter = 0;
      __threadfence();
    }
    threads_wait(HopperBarrier::kGroup + group, kWarpgroup);
    return *last != 0;
  }

  MII_DEVICE void join(const PrefillTile& tile) const {
    const auto part = [&](int i) {
      return p.space.prefill_parts + (tile.parts_at + i) * part_floats(Shape::kRows, D);
    };
    store_part(tile, part(tile.part));
    if (!is_last(tile)) return;
    const int end = min(64 * (group + 1), tile.rows);
    for (int i = 64 * group + thread / kWarp; i < end; i += kWarpgroup / kWarp) {
      join_row<T, D, Shape::kRows>(out_row<T, D>(p, tile.q_start, tile.head, tile.row + i), i, tile.parts, part);
    }
  }

  MII_DEVICE void run() {
    if (group == 1) pass_turn();
    if (wait_for_tile()) attend();
    if (group == 0) take_turn();
  }
};

#endif  // MII_HOPPER

template <typename T, int D, bool kExtras>
__global__ void __launch_bounds__(kHopperThreads, 1) hopper_prefill_kernel(const __grid_constant__ HopperParams all) {
#if defined(MII_HOPPER)
  extern __shared__ __align__(1024) unsigned char shared[];
  const HopperMemory<D> memory(shared);
  if (threadIdx.x == 0) memory.init();
  wait_for_previous();
  start_next();
  __syncthreads();
  // The same for a warp, and the compiler has to see it: only then each part gets its own count of registers.
  const int group = __shfl_sync(kFullMask, threadIdx.x / kWarpgroup, 0), thread = threadIdx.x % kWarpgroup;
  if (group == kHopperConsumers) {
    give_registers<40>();
    if (thread < kWarp) {
      HopperCarrier<D>{all, all.p, memory, thread}.run();
    } else {
      HopperScout<T, D>{all.p, memory, thread - kWarp}.run();
    }
  } else {
    take_registers<232>();
    HopperWorker<T, D, kExtras>{all, all.p, memory, group, thread}.run();
  }
#endif
}

}  // namespace mii
