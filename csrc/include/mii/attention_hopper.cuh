// Attention of whole prompts and chunks of them on Hopper: FlashAttention-3's division of labour over the block table.
//
// A CTA fills a multiprocessor and takes tile after tile of packed rows (token-major, the query heads of one KV head
// side by side) from the same list as the kernel for older cards. One warpgroup only copies: queries into two buffers,
// K and V tiles into a ring, in the order in which they are asked for (K0, K1, V0, K2, V1, ...). Two warpgroups
// compute, 64 rows each: while one turns scores into weights the other has the tensor cores, and within a warpgroup the
// weights of one tile are made while the values of the tile before are added up.
#pragma once
#include "mii/attention_queue.cuh"
#include "mii/attention_score.cuh"
#include "mii/tensor_map.cuh"
#include "mii/wgmma.cuh"

namespace mii {

constexpr int kHopperThreads = 3 * kWarpgroup;
constexpr int kHopperConsumers = 2;     // warpgroups that compute
constexpr int kHopperKeys = 128;        // of a K or V tile
constexpr int kHopperNotes = 1024;      // bytes of HopperNotes
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
  int box_rows;    // 0: no boxes, threads copy every row
};

struct HopperNotes {
  static constexpr int kMaxSlots = 8;
  uint64_t query_full[2], query_free[2];  // barriers
  uint64_t slot_full[kMaxSlots], slot_free[kMaxSlots];
  PrefillTile tile[2];         // of the queries in each buffer; rows 0: there is no more work
  int last[kHopperConsumers];  // whether a warpgroup was the last of those that share its rows
};
static_assert(sizeof(HopperNotes) <= kHopperNotes);

// Numbers of the barriers of threads.
struct HopperBarrier {
  static constexpr int kCopiers = 1, kTurn = 2, kGroup = 4;  // kTurn and kGroup: plus the number of the warpgroup
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
  MII_DEVICE uint32_t query_full(int buffer) const { return barriers + 8 * buffer; }
  MII_DEVICE uint32_t query_free(int buffer) const { return barriers + 16 + 8 * buffer; }
  MII_DEVICE uint32_t slot_full(int at) const { return barriers + 32 + 8 * at; }
  MII_DEVICE uint32_t slot_free(int at) const { return barriers + 32 + 8 * HopperNotes::kMaxSlots + 8 * at; }

  // By one thread, before all others go on.
  MII_DEVICE void init() const {
    constexpr int kWarps = kHopperConsumers * kWarpgroup / kWarp;
    for (int i = 0; i < Shape::kQueries; ++i) {
      barrier_init(query_full(i), kWarpgroup);
      barrier_init(query_free(i), kWarps);
    }
    for (int i = 0; i < Shape::kSlots; ++i) {
      barrier_init(slot_full(i), kWarpgroup);
      barrier_init(slot_free(i), kWarps);
    }
  }
};

// ---- the warpgroup that copies ------------------------------------------------------------------------------------

// Tells the others of finished copies: two tiles may be under way before this thread waits for one.
struct Announcer {
  uint32_t older = 0, newer = 0;  // barriers of the copies under way; 0: none

  MII_DEVICE void started(uint32_t barrier) {
    copy_async_commit();
    if (older) {
      copy_async_wait<2>();
      publish_to_products();
      barrier_arrive(older);
    }
    older = newer;
    newer = barrier;
  }
  MII_DEVICE void finish() {
    copy_async_wait<0>();
    publish_to_products();
    if (older) barrier_arrive(older);
    if (newer) barrier_arrive(newer);
    older = newer = 0;
  }
  // Waits until a place may be written. Who is to free it may need what is under way here, so that is announced first.
  MII_DEVICE void wait(uint32_t barrier, uint32_t parity) {
    if (__all_sync(kFullMask, barrier_try(barrier, parity))) return;
    finish();
    barrier_wait(barrier, parity);
  }
};

template <typename T, int D>
struct HopperCopier {
  using Shape = HopperShape<D>;
  static constexpr int kChunks = Shape::Keys::kChunks;
  static constexpr int kStep = kWarpgroup / kChunks;  // rows that the warpgroup copies at once
  static_assert(kWarpgroup % kChunks == 0 && 16 % kStep == 0);
  const HopperParams& all;
  const AttentionParams& p;
  const HopperMemory<D> memory;
  const int thread;
  Announcer announcer;
  RingPlace<Shape::kSlots> place;

  // Lane l < 8: row in the cache, seen as [rows, D], of the keys key + 16 l ...
  MII_DEVICE uint32_t look_up(const PrefillTile& tile, int key) const {
    const int lane = thread % kWarp, at = key + 16 * lane;
    if (lane >= Shape::kKeys / 16 || at >= tile.key_end || at + 16 <= tile.key_begin) return 0;
    const int block = p.a.block_table[tile.slot * p.a.max_blocks + (at >> p.block_bits)];
    return ((static_cast<uint32_t>(block) * p.a.kv_heads + tile.head) << p.block_bits) + (at & (p.a.block_size - 1));
  }

  // A K or V tile into the next slot: as boxes where rows of the tile see every key of it.
  MII_DEVICE void copy_keys(const PrefillTile& tile, bool values, uint32_t rows, int key) {
    announcer.wait(memory.slot_free(place.at), place.parity ^ 1);
    if (all.box_rows > 0 && key >= tile.key_begin && key + Shape::kKeys <= tile.key_end) {
      copy_boxes(values ? &all.v : &all.k, rows);
    } else {
      copy_rows(tile, values ? p.a.v_cache : p.a.k_cache, rows, key);
    }
    place.next();
  }

  MII_DEVICE void copy_boxes(const TensorMap* map, uint32_t rows) {
    const uint32_t barrier = memory.slot_full(place.at), slot = memory.slot(place.at);
    if (thread == 0) barrier_expect(barrier, Shape::Keys::kBytes);
#pragma unroll 1
    for (int row = 0; row < Shape::kKeys; row += all.box_rows) {
      const uint32_t cache_row = __shfl_sync(kFullMask, rows, row / 16);
      if (thread != 0) continue;
#pragma unroll
      for (int panel = 0; panel < D / 64; ++panel) {
        copy_box(slot + Shape::Keys::offset(row, 8 * panel), map, 64 * panel, static_cast<int>(cache_row), barrier);
      }
    }
    if (thread != 0) barrier_arrive(barrier);
  }

  // Keys that no row of the tile sees become zeros, whatever the cache holds there.
  MII_DEVICE void copy_rows(const PrefillTile& tile, const void* cache, uint32_t rows, int key) {
    const int begin = tile.key_begin - key, end = tile.key_end - key;
    const int row_in = thread / kChunks, column = thread % kChunks;
    const uint32_t slot = memory.slot(place.at);
#pragma unroll 4
    for (int i = 0; i < Shape::kKeys / kStep; ++i) {
      const int row = row_in + i * kStep;
      const uint32_t cache_row = __shfl_sync(kFullMask, rows, i * kStep / 16) + row % 16;
      const T* source = static_cast<const T*>(cache) + static_cast<int64_t>(cache_row) * D + column * 8;
      copy_async(slot + Shape::Keys::offset(row, column), source, row >= begin && row < end);
    }
    announcer.started(memory.slot_full(place.at));
  }

  MII_DEVICE void copy_queries(const PrefillTile& tile, int buffer) {
    const uint32_t queries = memory.queries(buffer);
#pragma unroll 1
    for (int i = 0; i < Shape::kRows / kStep; ++i) {
      const int row = thread / kChunks + i * kStep, column = thread % kChunks;
      const T* source = query_row<T, D>(p, tile.q_start, tile.head, tile.row + min(row, tile.rows - 1)) + column * 8;
      copy_async(queries + Shape::Queries::offset(row, column), source, row < tile.rows);
    }
    announcer.started(memory.query_full(buffer));
  }

  // K0, K1, V0, K2, V1, ..., V of the last.
  MII_DEVICE void copy_tiles(const PrefillTile& tile) {
    uint32_t rows = look_up(tile, tile.load_begin), before = 0;
#pragma unroll 1
    for (int key = tile.load_begin; key < tile.load_end; key += Shape::kKeys) {
      const uint32_t after = look_up(tile, key + Shape::kKeys);
      copy_keys(tile, false, rows, key);
      if (key > tile.load_begin) copy_keys(tile, true, before, key - Shape::kKeys);
      before = rows;
      rows = after;
    }
    const int tiles = (tile.load_end - tile.load_begin + Shape::kKeys - 1) / Shape::kKeys;
    copy_keys(tile, true, before, tile.load_begin + (tiles - 1) * Shape::kKeys);
  }

  MII_DEVICE void run() {
    const int limit = p.work.header->prompts_apart ? p.work.header->items * p.a.kv_heads : 0;
    int number = blockIdx.x;  // of the work at hand; known to thread 0 alone
    RingPlace<Shape::kQueries> buffer;
#pragma unroll 1
    while (true) {
      announcer.wait(memory.query_free(buffer.at), buffer.parity ^ 1);
      PrefillTile& tile = memory.notes->tile[buffer.at];
      if (thread == 0) {
        if (number < limit) {
          tile = PrefillTile::of<D>(p, number);
        } else {
          tile.rows = 0;
        }
      }
      threads_wait(HopperBarrier::kCopiers, kWarpgroup);
      if (tile.rows == 0) break;
      if (thread == 0) number = gridDim.x + atomicAdd(p.space.queue + Queue::kPrefill, 1);
      copy_queries(tile, buffer.at);
      copy_tiles(tile);
      buffer.next();
    }
    announcer.finish();
    barrier_arrive(memory.query_full(buffer.at));
    if (thread == 0) Queue::leave(p);
  }
};

// ---- the warpgroups that compute ----------------------------------------------------------------------------------

// What the rows of a thread, row l/4 of its warp and the eighth after it, see.
struct HopperRows {
  int begin[2], end[2];  // keys
  int clear, clear_end;  // keys that all rows of the warp see
  float slope[2];        // ALiBi
  int position[2];

  template <bool kExtras>
  MII_DEVICE static HopperRows of(const AttentionParams& p, const PrefillTile& tile, int row) {
    HopperRows rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const RowView view = RowView::of<kExtras>(p, tile.first, tile.head, tile.row + row + 8 * half);
      rows.position[half] = view.position;
      rows.slope[half] = view.slope;
      rows.begin[half] = view.key_begin;
      rows.end[half] = min(view.position + 1, tile.load_end);
    }
    rows.clear = __reduce_max_sync(kFullMask, max(rows.begin[0], rows.begin[1]));
    rows.clear_end = __reduce_min_sync(kFullMask, min(rows.end[0], rows.end[1]));
    return rows;
  }
  MII_DEVICE bool cuts(int key) const { return key < clear || key + kHopperKeys > clear_end; }
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
  float out[D / 2];                 // fragment D of [64, D]
  float score[kKeys / 2];           // fragment D of [64, kKeys]
  uint32_t weight[kKeys / 16][4];   // fragments A of [64, 16] each
  float top[2], sum[2], factor[2];  // top: in units of log2; sum: of this lane's columns only
  bool moved;                       // some factor of the warp is not 1

  MII_DEVICE void start() {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] = 0.0f;
    top[0] = top[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
  }

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

  // Hands over score = queries . the keys of the next slot; returns the slot.
  MII_DEVICE int multiply_keys(uint32_t queries) {
    const int at = place.at;
    barrier_wait(memory.slot_full(at), place.parity);
    place.next();
    const uint64_t a = matrix_descriptor(queries, 16, Shape::Queries::kStrideBytes);
    const uint64_t b = matrix_descriptor(memory.slot(at), 16, Shape::Keys::kStrideBytes);
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
    return at;
  }

  // Hands over out += weight . the values of the next slot; returns the slot.
  MII_DEVICE int add_values() {
    const int at = place.at;
    barrier_wait(memory.slot_full(at), place.parity);
    place.next();
    const uint64_t b = matrix_descriptor(memory.slot(at), Shape::Keys::kPanelBytes, Shape::Keys::kStrideBytes);
    products_fence();
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      product_transposed<T>(out, weight[step], advanced(b, Shape::Keys::rows_at(step)));
    }
    products_commit();
    return at;
  }

  // Scale, soft cap and ALiBi where asked for, and -infinity for keys that a row does not see.
  MII_DEVICE void finish_scores(const HopperRows& rows, int key) {
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
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      const int half = i / 2 % 2;
      if (column(i) < rows.begin[half] || column(i) >= rows.end[half]) score[i] = -INFINITY;
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

  MII_DEVICE void attend(const HopperRows& rows, const PrefillTile& tile, int buffer) {
    const uint32_t queries = memory.queries(buffer) + Shape::Queries::elements_at(64 * group, 0);
    start();
    take_turn();
    int keys = multiply_keys(queries);
    pass_turn();
    products_wait<0>();
    settle(score);
    release(memory.slot_free(keys));
    finish_scores(rows, tile.load_begin);
    soften();
    take_weights();
#pragma unroll 1
    for (int key = tile.load_begin + kKeys; key < tile.load_end; key += kKeys) {
      take_turn();
      keys = multiply_keys(queries);
      const int values = add_values();
      pass_turn();
      products_wait<1>();
      settle(score);
      release(memory.slot_free(keys));
      finish_scores(rows, key);
      soften();
      made_by_now(sum[0] + sum[1]);  // the weights are made while values are added up, not after the wait
      products_wait<0>();
      settle(out);
      release(memory.slot_free(values));
      scale_out();
      take_weights();
    }
    release(memory.query_free(buffer));
    take_turn();
    const int values = add_values();
    pass_turn();
    products_wait<0>();
    settle(out);
    release(memory.slot_free(values));
  }

  // Rounded rows. The four lanes of a row trade so that each stores whole chunks of 8 elements.
  MII_DEVICE void store_rows(const PrefillTile& tile, int row) const {
    const int part = thread % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float scale = 1.0f / quad_sum(sum[half]);
      const int at = row + 8 * half;
      const bool stored = at < tile.rows;
      T* target = out_row<T, D>(p, tile.q_start, tile.head, tile.row + (stored ? at : 0));
#pragma unroll
      for (int four = 0; four < D / 32; ++four) {
        uint32_t word[4];  // of chunk 4 four + i: elements 2 part, 2 part + 1
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &out[16 * four + 4 * i + 2 * half];
          word[i] = pack_pair<T>(pair[0] * scale, pair[1] * scale);
        }
        trade(word, part);
        if (stored) {
          *reinterpret_cast<uint4*>(target + 8 * (4 * four + part)) = make_uint4(word[0], word[1], word[2], word[3]);
        }
      }
    }
  }

  // Transposes a 4 x 4 matrix whose column `part` each of four lanes holds: lane i gets row i.
  MII_DEVICE static void trade(uint32_t (&word)[4], int part) {
    uint32_t row[4];
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const int other = part ^ step;  // the lane to trade with, and the row that it wants
      const uint32_t low = other & 1 ? word[1] : word[0], high = other & 1 ? word[3] : word[2];
      const uint32_t got = __shfl_xor_sync(kFullMask, other & 2 ? high : low, step);
#pragma unroll
      for (int i = 0; i < 4; ++i) row[i] = i == other ? got : (step == 0 ? 0 : row[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) word[i] = row[i];
  }

  MII_DEVICE void store_part(const PrefillTile& tile, int row, float* part) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = row + 8 * half;
      const float total = quad_sum(sum[half]);
      if (at >= tile.rows) continue;
      if (thread % 4 == 0) *part_scale<D, Shape::kRows>(part, at) = make_float2(top[half], total);
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

  MII_DEVICE void join(const PrefillTile& tile, int row) const {
    const auto part = [&](int i) {
      return p.space.prefill_parts + (tile.parts_at + i) * part_floats(Shape::kRows, D);
    };
    store_part(tile, row, part(tile.part));
    if (!is_last(tile)) return;
    const int end = min(64 * (group + 1), tile.rows);
    for (int i = 64 * group + thread / kWarp; i < end; i += kWarpgroup / kWarp) {
      join_row<T, D, Shape::kRows>(out_row<T, D>(p, tile.q_start, tile.head, tile.row + i), i, tile.parts, part);
    }
  }

  MII_DEVICE void run() {
    const int row = 64 * group + thread / kWarp * 16 + thread % kWarp / 4;  // the thread's first
    if (group == 1) pass_turn();
    RingPlace<Shape::kQueries> buffer;
#pragma unroll 1
    while (true) {
      barrier_wait(memory.query_full(buffer.at), buffer.parity);
      const PrefillTile tile = memory.notes->tile[buffer.at];
      if (tile.rows == 0) break;
      attend(HopperRows::of<kExtras>(p, tile, row), tile, buffer.at);
      if (tile.parts == 1) {
        store_rows(tile, row);
      } else {
        join(tile, row);
      }
      buffer.next();
    }
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
    HopperCopier<T, D>{all, all.p, memory, thread}.run();
  } else {
    take_registers<232>();
    HopperWorker<T, D, kExtras>{all, all.p, memory, group, thread}.run();
  }
#endif
}

}  // namespace mii
