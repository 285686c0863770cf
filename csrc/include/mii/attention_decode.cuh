// Decode attention: few query rows against long keys, bound by reading the cache.
//
// A team walks its chunk of the decode axis (attention_work.cuh) job by job. Every warp keeps a running softmax of its
// own, fed by its own ring of asynchronous copies, which runs ahead across jobs. Of a CTA that is one team each of the
// four warps takes 16 keys of every 64; they meet only when a job ends, where the four results become one. A warp that
// is a team takes all keys of its jobs and meets nobody. Where other teams had a share of a job the last of them joins
// the parts (Flash-Decoding, with the even cut of stream-K).
//
// In a step without prompts the first keys are asked for before the kernel before this one has ended: keys of earlier
// steps lie there, and so does the work list, whose kernel lets nobody start before it has ended itself. Where the
// token's own key is not taken from the cache (attention_new.cuh) that goes for every key.
#pragma once
#include "mii/attention_new.cuh"
#include "mii/attention_score.cuh"
#include "mii/quad.cuh"

namespace mii {

template <int D, int kBudget>
struct DecodeShape {
  using Rows = HeadRows<D>;
  static constexpr int kWarps = kAttentionWarps;
  static constexpr int kSlot = kDecodeStep * Rows::kStride;  // bytes of the K or the V of a warp's step
  static constexpr int kMergeFloats = 1024;                  // of each warp, for the end of a job
  static constexpr int kMerge = kWarps * kMergeFloats * int(sizeof(float));
  static constexpr int kFits = (kBudget - kMerge) / (kWarps * 2 * kSlot);
  static constexpr int kDepth = kFits > 4 ? 4 : kFits;  // steps in the ring
  static constexpr int kShared = kMerge + kWarps * 2 * kDepth * kSlot;
  static_assert(kDecodeStep == 16 && kWarps * kDecodeStep == kDecodeTile && kDepth >= 1);
};

// The 16-byte chunks of a step that a lane copies: number i, of row `row`, goes to `offset` in the step's slot.
template <int D>
struct StepChunks {
  using Rows = HeadRows<D>;
  static constexpr int kCount = kDecodeStep * Rows::kChunks / kWarp;
  // Where a warp copies whole rows at once, of a lane's chunks the later ones follow from the first.
  static constexpr bool kWhole = Rows::kSwizzled && kWarp % Rows::kChunks == 0;
  static constexpr int kRows = kWhole ? kWarp / Rows::kChunks : 1;
  int lane, first;

  MII_DEVICE explicit StepChunks(int lane_) : lane(lane_), first(Rows::offset(lane / Rows::kChunks, lane % Rows::kChunks)) {}
  MII_DEVICE int row(int i) const { return (lane + i * kWarp) / Rows::kChunks; }
  MII_DEVICE uint32_t offset(int i) const {
    if constexpr (kWhole) return i * kRows * Rows::kStride + (first ^ (16 * (i * kRows & 7)));
    return Rows::offset(row(i), (lane + i * kWarp) % Rows::kChunks);
  }
};

// The copying side of a warp: runs ahead of the computing side by the depth of the ring.
template <typename T, int D>
struct DecodeLoader {
  JobCursor at;
  int block;  // of the cache, of the keys at `at`: looked up a step before it is needed

  MII_DEVICE void load(const AttentionParams& p, const void* cache, uint32_t slot, int thread) const {
    if (at.more()) {
      const int lane = thread % kWarp;
      const StepChunks<D> chunks(lane);
      const int64_t page = static_cast<int64_t>(block) * p.a.kv_heads + at.head;
      const int64_t row = (page << p.block_bits) + (at.key & (p.a.block_size - 1));
      const T* source = static_cast<const T*>(cache) + row * D + lane * 8;
      if (at.full()) {
#pragma unroll
        for (int i = 0; i < chunks.kCount; ++i) copy_async(slot + chunks.offset(i), source + i * kWarp * 8, true);
      } else {
#pragma unroll
        for (int i = 0; i < chunks.kCount; ++i) {
          const int key = at.key + chunks.row(i);
          copy_async(slot + chunks.offset(i), source + i * kWarp * 8, key >= at.seq.key_begin && key < at.seq.kv_len);
        }
      }
    }
    copy_async_commit();
  }

  MII_DEVICE void step(const AttentionParams& p, const Team& team) {
    const int before = at.key >> p.block_bits;
    at.key += team.stride;
    if (at.key >= at.key_end || at.key >> p.block_bits != before) find_step(p, team);
  }

  // Goes on to a job of which this warp has keys, if this one has no more, and looks up their block.
  MII_DEVICE void find_step(const AttentionParams& p, const Team& team) {
    while (at.more() && at.key >= at.key_end) at.next_job(p, team);
    if (at.more()) block = __ldcg(p.a.block_table + at.seq.slot * p.a.max_blocks + (at.key >> p.block_bits));
  }
};

// A warp's running softmax over the job's 16 packed rows; a lane has rows lane / 4 and + 8.
template <typename T, int D>
struct DecodeState {
  using Rows = HeadRows<D>;
  // Large heads leave no registers for the queries: those lie in the memory where jobs are merged.
  static constexpr bool kSharedQuery = D > 128;
  uint32_t query[kSharedQuery ? 1 : D / 16][4];
  float out[D / 8][4];
  float top[2], sum[2];  // sum: of this lane's columns only

  MII_DEVICE void start(const AttentionParams& p, const JobCursor& job, int thread, unsigned char* shared) {
    const int lane = thread % kWarp, rows = job.seq.q_len * p.group;
    if constexpr (kSharedQuery) {
      __syncthreads();  // the job before is merged
      for (int i = thread; i < kDecodeRows * Rows::kChunks; i += kAttentionThreads) {
        const int row = i / Rows::kChunks, chunk = i % Rows::kChunks;
        uint4 value = {};
        const T* source = query_row<T, D>(p, job.seq.q_start, job.head, row < rows ? row : 0);
        if (row < rows) value = reinterpret_cast<const uint4*>(source)[chunk];
        *reinterpret_cast<uint4*>(shared + Rows::offset(row, chunk)) = value;
      }
      __syncthreads();
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half;
      const T* source = query_row<T, D>(p, job.seq.q_start, job.head, row < rows ? row : 0) + 2 * (lane % 4);
#pragma unroll
      for (int step = 0; step < (kSharedQuery ? 0 : D / 16); ++step) {
        const uint32_t* pair = reinterpret_cast<const uint32_t*>(source + 16 * step);
        query[step][half] = row < rows ? pair[0] : 0;
        query[step][half + 2] = row < rows ? pair[4] : 0;
      }
      top[half] = -INFINITY;
      sum[half] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < D / 8; ++i) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.0f;
  }

  // score = q . k of the 16 keys in `slot`; two chains of sums, as one product waits long for the one before.
  MII_DEVICE void multiply_keys(float (&score)[2][4], uint32_t shared, uint32_t slot, int lane) {
    const uint32_t from_query = shared + Rows::lane_offset(lane % 16, lane / 16);
    const uint32_t from_keys = slot + Rows::lane_offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    float odd[2][4] = {};
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      uint32_t keys[4];
      load_matrices(keys, Rows::at(from_keys, step, 0));
      if constexpr (kSharedQuery) load_matrices(query[0], Rows::at(from_query, step, 0));
      const uint32_t (&rows)[4] = query[kSharedQuery ? 0 : step];
      float (&sums)[2][4] = step % 2 ? odd : score;
      multiply_add<T>(sums[0], rows, keys[0], keys[1]);
      multiply_add<T>(sums[1], rows, keys[2], keys[3]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      score[0][i] += odd[0][i];
      score[1][i] += odd[1][i];
    }
  }

  // Turns scores (in units of log2) into weights relative to `top`, which is the running maximum or up to kSlack below
  // it: as weights may exceed 1, sums need not be brought to a new maximum each time that it rises a little.
  MII_DEVICE void soften(float (&score)[2][4]) {
    constexpr float kSlack = 8.0f;
    const bool empty = top[0] == -INFINITY && top[1] == -INFINITY;
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* low = &score[0][2 * half];
      float* high = &score[1][2 * half];
      const float most = quad_max(fmaxf(fmaxf(low[0], low[1]), fmaxf(high[0], high[1])));
      const float best = most > top[half] + kSlack ? most : top[half];
      const float zero = best == -INFINITY ? 0.0f : best;
      factor[half] = exp2_fast(top[half] - zero);
      top[half] = best;
      low[0] = exp2_fast(low[0] - zero);
      low[1] = exp2_fast(low[1] - zero);
      high[0] = exp2_fast(high[0] - zero);
      high[1] = exp2_fast(high[1] - zero);
      sum[half] = sum[half] * factor[half] + ((low[0] + low[1]) + (high[0] + high[1]));
    }
    if (__any_sync(kFullMask, !empty && (factor[0] != 1.0f || factor[1] != 1.0f))) {
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        out[i][0] *= factor[0];
        out[i][1] *= factor[0];
        out[i][2] *= factor[1];
        out[i][3] *= factor[1];
      }
    }
  }

  MII_DEVICE void add_values(const float (&weight)[2][4], uint32_t slot, int lane) {
    const uint32_t from = slot + Rows::lane_offset(lane % 16, lane / 16);
    const uint32_t weights[4] = {pack_pair<T>(weight[0][0], weight[0][1]), pack_pair<T>(weight[0][2], weight[0][3]),
                                 pack_pair<T>(weight[1][0], weight[1][1]), pack_pair<T>(weight[1][2], weight[1][3])};
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      uint32_t values[4];
      load_matrices_transposed(values, Rows::at(from, step, 0));
      multiply_add<T>(out[2 * step], weights, values[0], values[1]);
      multiply_add<T>(out[2 * step + 1], weights, values[2], values[3]);
    }
  }
};

// Brings products to units of log2 (with soft cap and ALiBi where asked for) and hides keys that a row does not see.
template <bool kExtras>
MII_DEVICE void finish_scores(const AttentionParams& p, float (&score)[2][4], int first, int head, int key, bool edge,
                              int lane) {
  if constexpr (!kExtras) {
#pragma unroll
    for (int i = 0; i < 8; ++i) score[i / 4][i % 4] *= p.unit;
    if (!edge) return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const RowView row = RowView::of<kExtras>(p, first, head, lane / 4 + 8 * half);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = key + i / 2 * 8 + lane % 4 * 2 + i % 2;
      float& s = score[i / 2][2 * half + i % 2];
      if constexpr (kExtras) s = full_score(p.a, s, column, row);
      if (edge && !row.sees(column)) s = -INFINITY;
    }
  }
}

// Parts of a job: chunks first .. first + count of the axis have a share of its tiles.
struct JobParts {
  int first, count;

  MII_DEVICE JobParts(const JobCursor& job, const Team& team) {
    if (job.seq.tiles <= team.whole) {
      first = 0, count = 1;
      return;
    }
    const int begin = job.base + kJobOverhead;
    first = begin / team.chunk_units;
    count = (begin + job.seq.tiles - 1) / team.chunk_units - first + 1;
  }
  // A chunk's first slot is for the job that it continues, its second for the one that it starts and does not end.
  template <int D>
  MII_DEVICE float* part(const AttentionParams& p, int i) const {
    return p.space.decode_parts + (2 * (first + i) + (i == 0)) * part_floats(kDecodeRows, D);
  }
};

// Adds up what the four warps found for a job and stores the result, or this chunk's part of it.
template <typename T, int D, int kBudget>
MII_DEVICE void finish_job(const AttentionParams& p, const JobCursor& job, DecodeState<T, D>& state, const Team& team,
                           int thread, float* merge, SharedNotes* notes) {
  using Shape = DecodeShape<D, kBudget>;
  const int warp = thread / kWarp, lane = thread % kWarp, rows = job.seq.q_len * p.group;
  const JobParts parts(job, team);
  // Columns that fit at once: 256 with up to 4 rows, 128 with 8, 64 with 16.
  const int quad_bits = rows <= 4 ? 6 : rows <= 8 ? 5 : 4, columns = 4 << quad_bits;
  float* part = parts.count > 1 ? parts.part<D>(p, team.chunk - parts.first) : nullptr;
  state.sum[0] = quad_sum(state.sum[0]);
  state.sum[1] = quad_sum(state.sum[1]);
  for (int left = 0; left < D; left += columns) {
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half;
      if (row >= rows) continue;
      if (lane % 4 == 0) notes->decode.scale[warp][row] = make_float2(state.top[half], state.sum[half]);
      float* target = merge + warp * Shape::kMergeFloats + row * columns;
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        const int column = 8 * i - left;
        if (column < 0 || column >= columns) continue;
        float2* pair = reinterpret_cast<float2*>(target + (column ^ (8 * (row & 7))) + 2 * (lane % 4));
        *pair = make_float2(state.out[i][2 * half], state.out[i][2 * half + 1]);
      }
    }
    __syncthreads();
    for (int quad = thread; quad < rows << quad_bits; quad += kAttentionThreads) {
      const int row = quad >> quad_bits, column = 4 * (quad & ((1 << quad_bits) - 1));
      if (left + column >= D) continue;
      float top = -INFINITY, sum = 0.0f;
      float4 out = {};
      for (int w = 0; w < Shape::kWarps; ++w) top = fmaxf(top, notes->decode.scale[w][row].x);
#pragma unroll
      for (int w = 0; w < Shape::kWarps; ++w) {
        const float2 scale = notes->decode.scale[w][row];
        const float factor = scale.x == -INFINITY ? 0.0f : exp2_fast(scale.x - top);
        const float* source = merge + w * Shape::kMergeFloats + row * columns;
        const float4 v = *reinterpret_cast<const float4*>(source + (column ^ (8 * (row & 7))));
        sum += factor * scale.y;
        out.x += factor * v.x;
        out.y += factor * v.y;
        out.z += factor * v.z;
        out.w += factor * v.w;
      }
      if (part == nullptr) {
        T* target = out_row<T, D>(p, job.seq.q_start, job.head, row);
        store_four<T>(target + left + column, out, 1.0f / sum);
      } else {
        *reinterpret_cast<float4*>(part + row * D + left + column) = out;
        if (left + column == 0) *part_scale<D, kDecodeRows>(part, row) = make_float2(top, sum);
      }
    }
  }
  if (part == nullptr) return;
  if (!last_to_arrive(p.space.decode_arrived + parts.first, parts.count, &notes->flag)) return;
  for (int row = warp; row < rows; row += Shape::kWarps) {
    T* target = out_row<T, D>(p, job.seq.q_start, job.head, row);
    join_row<T, D, kDecodeRows>(target, row, parts.count, [&](int i) { return parts.part<D>(p, i); });
  }
}

// As finish_job, for a warp that is a team.
template <typename T, int D>
MII_DEVICE void finish_alone(const AttentionParams& p, const JobCursor& job, DecodeState<T, D>& state, const Team& team,
                             int lane) {
  const int rows = job.seq.q_len * p.group;
  const JobParts parts(job, team);
  float* part = parts.count > 1 ? parts.part<D>(p, team.chunk - parts.first) : nullptr;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (8 * half >= rows) break;
    const int row = lane / 4 + 8 * half;
    const float sum = quad_sum(state.sum[half]), factor = 1.0f / sum;
    T* target = out_row<T, D>(p, job.seq.q_start, job.head, row < rows ? row : 0);
#pragma unroll
    for (int left = 0; left < D / 8; left += 4) {
      uint32_t packs[4] = {};
#pragma unroll
      for (int i = left; i < left + 4 && i < D / 8; ++i) {
        const float two[2] = {state.out[i][2 * half], state.out[i][2 * half + 1]};
        packs[i - left] = pack_pair<T>(two[0] * factor, two[1] * factor);
        if (part == nullptr || row >= rows) continue;
        *reinterpret_cast<float2*>(part + row * D + 8 * i + 2 * (lane % 4)) = make_float2(two[0], two[1]);
      }
      if (part != nullptr) continue;
      transpose_quad(packs);
      const int column = 8 * (left + lane % 4);
      if (row >= rows || column >= D) continue;
      *reinterpret_cast<uint4*>(target + column) = make_uint4(packs[0], packs[1], packs[2], packs[3]);
    }
    if (part != nullptr && row < rows && lane % 4 == 0) {
      *part_scale<D, kDecodeRows>(part, row) = make_float2(state.top[half], sum);
    }
  }
  if (part == nullptr || !last_warp_to_arrive(p.space.decode_arrived + parts.first, parts.count)) return;
  for (int row = 0; row < rows; ++row) {
    T* target = out_row<T, D>(p, job.seq.q_start, job.head, row);
    join_row<T, D, kDecodeRows>(target, row, parts.count, [&](int i) { return parts.part<D>(p, i); });
  }
}

// All that the teams of a CTA have of the decode axis; `number`: of the work that it drew. `tokens`: StoredTokens or
// NewTokens, of a step without prompts.
template <typename T, int D, bool kExtras, int kBudget, typename Tokens>
MII_DEVICE void decode_chunks(const AttentionParams& p, int number, int thread, unsigned char* shared,
                              SharedNotes* notes, Tokens tokens) {
  using Shape = DecodeShape<D, kBudget>;
  const int warp = thread / kWarp, lane = thread % kWarp;
  const uint32_t ring = shared_address(shared) + Shape::kMerge + warp * (2 * Shape::kDepth * Shape::kSlot);
  // Where the chunk starts, for one team and for four: asked for with the header, which says how many there are.
  [[maybe_unused]] ChunkStart one, four;
  if constexpr (Tokens::kNew) {
    one = ChunkStart::of(p, number);
    four = ChunkStart::of(p, number * kAttentionWarps + warp);
  }
  const PlanHeader header = load_planned(p.work.header);
  const Team team = Team::of(header, number, warp);
  JobCursor& job = notes->decode.job[warp];
  DecodeLoader<T, D> loader;
  if constexpr (Tokens::kNew) {
    if (team.alone()) one = four;
    loader.at.start_at(p, header, team, one);
    if (lane == 0) job = loader.at;
    if (loader.at.more()) tokens.find_position(loader.at.seq);
  } else {
    if (lane == 0) job.start(p, header, team);  // copied from the loader's it would make the kernel spill
    loader.at.start(p, header, team);
  }
  loader.find_step(p, team);
  bool waited = Tokens::kNew;
#pragma unroll 1
  for (int i = 0; i < Shape::kDepth; ++i) {
    if (!waited && !(loader.at.more() && loader.at.old())) {
      wait_for_previous();
      waited = true;
    }
    loader.load(p, p.a.k_cache, ring + 2 * i * Shape::kSlot, thread);
    loader.load(p, p.a.v_cache, ring + (2 * i + 1) * Shape::kSlot, thread);
    if (loader.at.more()) loader.step(p, team);
  }
  if constexpr (Tokens::kNew) tokens.prefetch_angles(lane);
  wait_for_previous();
  if constexpr (Tokens::kNew) {
    start_next();  // no earlier: the weights that the next kernel asks for would come before the rest of the keys
  } else if (thread == 0) {
    Queue::draw(p, notes);
  }
  uint32_t slot = ring;
  DecodeState<T, D> state;
  [[maybe_unused]] NewKey fresh;
  for (__syncwarp(); job.more(); __syncwarp()) {
    state.start(p, job, thread, shared);
    if constexpr (Tokens::kNew) {
      tokens.load_key(fresh, job, lane);  // all loads of a job before anything waits for one
      tokens.rotate_queries(state.query, p.group, lane);
      tokens.store_key(fresh, job, team, lane);
    }
    const int end = job.key_end;
    for (int key = job.key; key < end; key += team.stride) {
      const int first = job.seq.kv_len - job.seq.q_len;  // position of the first query token
      const WarpKeys keys = WarpKeys::of(first, job.seq.kv_len - 1, kDecodeStep, p.a.window);
      float score[2][4] = {};
      copy_async_wait<2 * Shape::kDepth - 1>();
      __syncwarp();
      const bool own = Tokens::kNew && key + kDecodeStep >= job.seq.kv_len;  // the step has the token's own key
      unsigned char* const place = shared + (slot - shared_address(shared));
      if constexpr (Tokens::kNew) {
        if (own) tokens.place_key(fresh, place, job.seq.kv_len - 1 - key, lane);
      }
      state.multiply_keys(score, shared_address(shared), slot, lane);
      __syncwarp();
      loader.load(p, p.a.k_cache, slot, thread);
      finish_scores<kExtras>(p, score, first, job.head, key, keys.cuts(key), lane);
      state.soften(score);
      copy_async_wait<2 * Shape::kDepth - 1>();
      __syncwarp();
      if constexpr (Tokens::kNew) {
        if (own) tokens.place_value(fresh, place + Shape::kSlot, job.seq.kv_len - 1 - key, lane);
      }
      state.add_values(score, slot + Shape::kSlot, lane);
      __syncwarp();
      loader.load(p, p.a.v_cache, slot + Shape::kSlot, thread);
      if (loader.at.more()) loader.step(p, team);
      slot = slot == ring + 2 * (Shape::kDepth - 1) * Shape::kSlot ? ring : slot + 2 * Shape::kSlot;
    }
    if (team.alone()) {
      finish_alone(p, job, state, team, lane);
    } else {
      finish_job<T, D, kBudget>(p, job, state, team, thread, reinterpret_cast<float*>(shared), notes);
    }
    __syncwarp();
    if (lane == 0) job.next_job(p, team);
    if constexpr (Tokens::kNew) {
      __syncwarp();
      if (job.more()) tokens.find_position(job.seq);
    }
  }
}

}  // namespace mii
