// Attention of whole prompts and chunks of them, bound by the tensor cores: FlashAttention-2 over the block table.
//
// A CTA takes a tile of packed rows (token-major, the query heads of one KV head side by side), so every key tile is
// read once for all heads of the group. Four warps own a quarter of the rows each; K and V tiles alternate in one
// ring of shared memory that asynchronous copies fill from the cache's blocks, and tiles that no row sees are never
// touched.
#pragma once
#include "mii/attention_queue.cuh"
#include "mii/attention_score.cuh"

namespace mii {

template <int D, int kBudget>
struct PrefillShape {
  using Rows = HeadRows<D>;
  static constexpr int kRows = prefill_rows(D), kKeys = prefill_keys(D);
  static constexpr int kWarps = kAttentionThreads / kWarp;
  static constexpr int kRowTiles = kRows / kWarps / 16;  // mma tiles along a warp's rows
  static constexpr int kQuery = kRows * Rows::kStride;   // bytes
  static constexpr int kSlot = kKeys * Rows::kStride;    // bytes of a K or V tile
  // One slot is computed on; the others hold `kAhead` pairs of K and V tiles that are on their way.
  static constexpr int kAhead = (kBudget - kQuery) / kSlot >= 5 ? 2 : 1;
  static constexpr int kStages = 2 * kAhead + 1;
  static constexpr int kShared = kQuery + kStages * kSlot;
  static_assert(kRows * Rows::kChunks % kAttentionThreads == 0 && kKeys * Rows::kChunks % kAttentionThreads == 0);
  static_assert(kShared <= kBudget);
};

// Fills the ring with K tile, V tile, K tile ...
template <typename T, int D, int kBudget>
struct PrefillLoader {
  using Shape = PrefillShape<D, kBudget>;
  using Rows = HeadRows<D>;
  uint32_t rows;  // lane l: row in the cache, seen as [rows, D], of the tile's keys 16 l ..

  // Called one tile ahead, so nobody waits for the block table.
  MII_DEVICE void look_up(const AttentionParams& p, const PrefillTile& tile, int key, int lane) {
    const int at = key + 16 * lane;
    if (lane < Shape::kKeys / 16 && at < tile.key_end && at + 16 > tile.key_begin) {
      const int block = p.a.block_table[tile.slot * p.a.max_blocks + (at >> p.block_bits)];
      rows = ((static_cast<uint32_t>(block) * p.a.kv_heads + tile.head) << p.block_bits) + (at & (p.a.block_size - 1));
    }
  }

  MII_DEVICE void load(const PrefillTile& tile, const void* cache, uint32_t slot, int key, int thread) const {
    constexpr int kCopies = Shape::kKeys * Rows::kChunks / kAttentionThreads;
    constexpr int kStep = kAttentionThreads / Rows::kChunks;  // rows that the CTA copies at once
    constexpr bool kEven = kAttentionThreads % Rows::kChunks == 0 && 16 % kStep == 0;
    const int begin = tile.key_begin - key, end = tile.key_end - key;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      // Chunk `column` of row 16 * sixteen + row_in.
      int sixteen, row_in, column;
      if constexpr (kEven) {
        sixteen = i * kStep / 16;
        row_in = thread / Rows::kChunks + i * kStep % 16;
        column = thread % Rows::kChunks;
      } else {
        const int row = (thread + i * kAttentionThreads) / Rows::kChunks;
        sixteen = row / 16;
        row_in = row % 16;
        column = (thread + i * kAttentionThreads) % Rows::kChunks;
      }
      const int row = 16 * sixteen + row_in;
      const uint32_t cache_row = __shfl_sync(kFullMask, rows, sixteen) + row_in;
      const T* source = static_cast<const T*>(cache) + static_cast<int64_t>(cache_row) * D + column * 8;
      copy_async(slot + Rows::offset(row, column), source, row >= begin && row < end);
    }
  }
};

template <typename T, int D, int kBudget>
struct PrefillState {
  using Shape = PrefillShape<D, kBudget>;
  using Rows = HeadRows<D>;
  static constexpr int kRowTiles = Shape::kRowTiles, kKeys = Shape::kKeys;
  float out[kRowTiles][D / 8][4];
  float top[kRowTiles][2], sum[kRowTiles][2];  // top: in units of log2; sum: of this lane's columns only

  MII_DEVICE void start() {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < D / 8; ++i) out[r][i][0] = out[r][i][1] = out[r][i][2] = out[r][i][3] = 0.0f;
      top[r][0] = top[r][1] = -INFINITY;
      sum[r][0] = sum[r][1] = 0.0f;
    }
  }

  // `query`: the warp's first row; `tile`: the K slot.
  MII_DEVICE static void multiply_keys(float (&score)[kRowTiles][kKeys / 8][4], uint32_t query, uint32_t tile,
                                       int lane) {
    const uint32_t from_query = query + Rows::lane_offset(lane % 16, lane / 16);
    const uint32_t from_keys = tile + Rows::lane_offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      uint32_t rows[kRowTiles][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) load_matrices(rows[r], Rows::at(from_query, step, 16 * r));
#pragma unroll
      for (int i = 0; i < kKeys / 16; ++i) {
        uint32_t keys[4];
        load_matrices(keys, Rows::at(from_keys, step, 16 * i));
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          multiply_add<T>(score[r][2 * i], rows[r], keys[0], keys[1]);
          multiply_add<T>(score[r][2 * i + 1], rows[r], keys[2], keys[3]);
        }
      }
    }
  }

  // Turns scores into weights relative to a running maximum, rounded and packed as the next product wants them. `unit`
  // brings scores to units of log2. The maximum of a row moves only when it grows by more than kSlack units: until then
  // weights above one are as good, and what was summed before need not be scaled.
  MII_DEVICE void soften(float (&score)[kRowTiles][kKeys / 8][4], float unit,
                         uint32_t (&weight)[kRowTiles][kKeys / 16][4]) {
    constexpr float kSlack = 8.0f;
    float factor[kRowTiles][2];
    bool moved = false;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float best = score[r][0][2 * half];
#pragma unroll
        for (int i = 0; i < kKeys / 8; ++i) best = fmaxf(best, fmaxf(score[r][i][2 * half], score[r][i][2 * half + 1]));
        best = quad_max(best) * unit;
        const bool moves = best > top[r][half] + kSlack;
        factor[r][half] = moves ? exp2_fast(top[r][half] - best) : 1.0f;
        top[r][half] = moves ? best : top[r][half];
        moved |= moves;
      }
    }
    if (__any_sync(kFullMask, moved)) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int i = 0; i < D / 8; ++i) {
          out[r][i][0] *= factor[r][0];
          out[r][i][1] *= factor[r][0];
          out[r][i][2] *= factor[r][1];
          out[r][i][3] *= factor[r][1];
        }
        sum[r][0] *= factor[r][0];
        sum[r][1] *= factor[r][1];
      }
    }
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float zero = top[r][half] == -INFINITY ? 0.0f : top[r][half];
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < kKeys / 8; ++i) {
          const float left = exp2_fast(fmaf(score[r][i][2 * half], unit, -zero));
          const float right = exp2_fast(fmaf(score[r][i][2 * half + 1], unit, -zero));
          total += left + right;
          weight[r][i / 2][i % 2 * 2 + half] = pack_pair<T>(left, right);
        }
        sum[r][half] += total;
      }
    }
  }

  MII_DEVICE void add_values(const uint32_t (&weight)[kRowTiles][kKeys / 16][4], uint32_t tile, int lane) {
    const uint32_t from = tile + Rows::lane_offset(lane % 16, lane / 16);
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
#pragma unroll
      for (int step = 0; step < D / 16; ++step) {
        uint32_t values[4];
        load_matrices_transposed(values, Rows::at(from, step, 16 * i));
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          multiply_add<T>(out[r][2 * step], weight[r][i], values[0], values[1]);
          multiply_add<T>(out[r][2 * step + 1], weight[r][i], values[2], values[3]);
        }
      }
    }
  }
};

// Scale, soft cap and ALiBi where asked for, and -infinity for keys that a row does not see. `row`: the warp's first.
template <bool kExtras, int kRowTiles, int kTiles>
MII_DEVICE void mask_scores(const AttentionParams& p, const PrefillNotes& notes, float (&score)[kRowTiles][kTiles][4],
                            int row, int key, bool edge, int lane) {
  const int first = notes.tile.position(p, 0);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = row + 16 * r + 8 * half + lane / 4;
      RowView view;
      view.position = first + notes.token[at];
      view.key_begin = p.a.window > 0 ? view.position - p.a.window + 1 : 0;
      if (kExtras) view.slope = notes.slope[at];
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        const int column = key + i / 2 * 8 + lane % 4 * 2 + i % 2;
        float& s = score[r][i / 2][2 * half + i % 2];
        if constexpr (kExtras) s = full_score(p.a, s, column, view);
        if (edge && !view.sees(column)) s = -INFINITY;
      }
    }
  }
}

// Rounded rows, by way of the warp's own rows of the query tile, so that they leave in whole lines.
template <typename T, int D, int kBudget>
MII_DEVICE void store_rows(const AttentionParams& p, const PrefillTile& tile, const PrefillState<T, D, kBudget>& state,
                           int thread, unsigned char* shared) {
  using Shape = PrefillShape<D, kBudget>;
  using Rows = HeadRows<D>;
  const int lane = thread % kWarp, first = thread / kWarp * 16 * Shape::kRowTiles;
  unsigned char* own = shared + first * Rows::kStride;
  __syncwarp();
#pragma unroll
  for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float factor = 1.0f / quad_sum(state.sum[r][half]);
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        const float* pair = &state.out[r][i][2 * half];
        uint32_t* target = reinterpret_cast<uint32_t*>(own + Rows::offset(16 * r + 8 * half + lane / 4, i)) + lane % 4;
        *target = pack_pair<T>(pair[0] * factor, pair[1] * factor);
      }
    }
  }
  __syncwarp();
  for (int i = lane; i < 16 * Shape::kRowTiles * Rows::kChunks; i += kWarp) {
    const int row = i / Rows::kChunks, chunk = i % Rows::kChunks;
    if (first + row >= tile.rows) break;
    T* target = out_row<T, D>(p, tile.q_start, tile.head, tile.row + first + row) + 8 * chunk;
    *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(own + Rows::offset(row, chunk));
  }
}

template <typename T, int D, int kBudget>
MII_DEVICE void store_part(const PrefillTile& tile, const PrefillState<T, D, kBudget>& state, int thread, float* part) {
  using Shape = PrefillShape<D, kBudget>;
  const int lane = thread % kWarp, first = thread / kWarp * 16 * Shape::kRowTiles;
#pragma unroll
  for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + 16 * r + 8 * half + lane / 4;
      const float sum = quad_sum(state.sum[r][half]);
      if (row >= tile.rows) continue;
      if (lane % 4 == 0) *part_scale<D, Shape::kRows>(part, row) = make_float2(state.top[r][half], sum);
      float2* target = reinterpret_cast<float2*>(part + row * D) + lane % 4;
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        target[4 * i] = make_float2(state.out[r][i][2 * half], state.out[r][i][2 * half + 1]);
      }
    }
  }
}

template <typename T, int D, bool kExtras, int kBudget>
MII_DEVICE void prefill_item(const AttentionParams& p, int number, int thread, unsigned char* shared,
                             SharedNotes* notes) {
  using Shape = PrefillShape<D, kBudget>;
  using Rows = HeadRows<D>;
  const int warp = thread / kWarp, lane = thread % kWarp, row = warp * 16 * Shape::kRowTiles;
  const uint32_t query = shared_address(shared), ring = query + Shape::kQuery;
  const auto after = [ring](uint32_t slot) {
    return slot == ring + (Shape::kStages - 1) * Shape::kSlot ? ring : slot + Shape::kSlot;
  };
  const auto before = [ring](uint32_t slot) {
    return slot == ring ? ring + (Shape::kStages - 1) * Shape::kSlot : slot - Shape::kSlot;
  };
  if (thread == 0) notes->prefill.tile = PrefillTile::of<D>(p, number);
  __syncthreads();
  const PrefillTile& tile = notes->prefill.tile;
  const int last = min(row + 16 * Shape::kRowTiles, tile.rows) - 1;  // of the warp's rows; below `row`: it only copies
  if (lane == 0) {
    WarpKeys& keys = notes->prefill.keys[warp];
    keys = {0, 0, 0, 0};
    if (last >= row) keys = WarpKeys::of(tile.position(p, row), tile.position(p, last), Shape::kKeys, p.a.window);
  }

  if (thread < Shape::kRows) {
    const int token = (tile.row + thread) / p.group;
    notes->prefill.token[thread] = token - tile.row / p.group;
    if (kExtras && p.a.alibi_slopes) {
      notes->prefill.slope[thread] = p.a.alibi_slopes[tile.head * p.group + tile.row + thread - token * p.group];
    } else if (kExtras) {
      notes->prefill.slope[thread] = 0.0f;
    }
  }
  PrefillLoader<T, D, kBudget> loader = {0};
  int key = tile.load_begin;
  loader.look_up(p, tile, key, lane);
#pragma unroll 1
  for (int i = 0; i < Shape::kRows * Rows::kChunks / kAttentionThreads; ++i) {
    const int chunk = thread + i * kAttentionThreads, at = chunk / Rows::kChunks, column = chunk % Rows::kChunks;
    const T* source = query_row<T, D>(p, tile.q_start, tile.head, tile.row + min(at, tile.rows - 1)) + column * 8;
    copy_async(query + Rows::offset(at, column), source, at < tile.rows);
  }
#pragma unroll 1
  for (int i = 0; i < Shape::kAhead; ++i, key += Shape::kKeys) {
    const uint32_t slot = ring + 2 * i * Shape::kSlot;
    if (key < tile.load_end) loader.load(tile, p.a.k_cache, slot, key, thread);
    copy_async_commit();
    if (key < tile.load_end) loader.load(tile, p.a.v_cache, slot + Shape::kSlot, key, thread);
    copy_async_commit();
    loader.look_up(p, tile, key + Shape::kKeys, lane);
  }

  if (thread == 0) Queue::draw(p, notes);
  PrefillState<T, D, kBudget> state;
  state.start();
  uint32_t slot = ring;
  __syncwarp();
#pragma unroll 1
  for (key = tile.load_begin; key < tile.load_end; key += Shape::kKeys) {
    const int ahead = key + Shape::kAhead * Shape::kKeys;  // the tile to load meanwhile
    const WarpKeys keys = notes->prefill.keys[warp];
    const bool live = keys.has(key);
    uint32_t weight[Shape::kRowTiles][Shape::kKeys / 16][4];
    copy_async_wait<Shape::kStages - 2>();
    __syncthreads();
    if (ahead < tile.load_end) loader.load(tile, p.a.k_cache, before(slot), ahead, thread);
    copy_async_commit();
    if (live) {
      float score[Shape::kRowTiles][Shape::kKeys / 8][4] = {};
      state.multiply_keys(score, query + row * Rows::kStride, slot, lane);
      const bool edge = keys.cuts(key);
      if (kExtras || edge) mask_scores<kExtras>(p, notes->prefill, score, row, key, edge, lane);
      state.soften(score, kExtras ? 1.0f : p.unit, weight);
    }
    slot = after(slot);
    copy_async_wait<Shape::kStages - 2>();
    __syncthreads();
    if (ahead < tile.load_end) loader.load(tile, p.a.v_cache, before(slot), ahead, thread);
    copy_async_commit();
    loader.look_up(p, tile, ahead + Shape::kKeys, lane);
    if (live) state.add_values(weight, slot, lane);
    slot = after(slot);
  }
  if (tile.parts == 1) {
    store_rows<T, D, kBudget>(p, tile, state, thread, shared);
    return;
  }
  const auto part = [&](int i) { return p.space.prefill_parts + (tile.parts_at + i) * part_floats(Shape::kRows, D); };
  store_part<T, D, kBudget>(tile, state, thread, part(tile.part));
  if (!last_to_arrive(p.space.prefill_arrived + tile.parts_at, tile.parts, &notes->flag)) return;
  for (int i = warp; i < tile.rows; i += Shape::kWarps) {
    join_row<T, D, Shape::kRows>(out_row<T, D>(p, tile.q_start, tile.head, tile.row + i), i, tile.parts, part);
  }
}

}  // namespace mii
