// What decode attention does with a step's own tokens where it gets them as their product left them, rows of [q | k | v]:
// it rotates the queries in their fragments, and the key of the token, which with the value goes to the cache and takes
// its place among the keys in shared memory.
//
// Of each job one warp has the token's key among its own, so each is stored once. Nobody else in the launch reads it: no
// other sequence sees a key of the step in which it is made, unless the step has prompts.
#pragma once
#include "mii/attention_queue.cuh"
#include "mii/rotate.cuh"

namespace mii {

// In the place of NewTokens where the cache holds them already.
struct StoredTokens {
  static constexpr bool kNew = false;
};

// A lane's share of a job's new key and value; lanes from D / 4 on have none.
struct NewKey {
  uint32_t key[2];    // columns 2 lane .. and D / 2 + 2 lane ..
  uint32_t value[2];  // columns 4 lane ..
  float2 cos, sin;    // of the key's columns
  int slot;           // of the cache
};

template <typename T>
MII_DEVICE float2 unpack_pair(uint32_t word) {
  float pair[2];
  unpack(pair, *reinterpret_cast<const Pack<T, 2>*>(&word));
  return make_float2(pair[0], pair[1]);
}

template <typename T, int D>
struct NewTokens {
  static constexpr bool kNew = true;
  static_assert(D % 16 == 0 && D <= kAloneHead, "a lane holds at most one pair of each half of a key");
  using Rows = HeadRows<D>;
  const DecodeAttentionParams& n;
  int token = -1, position = 0;  // of the job

  MII_DEVICE explicit NewTokens(const DecodeAttentionParams& params) : n(params) {}

  // Asks for the position of the job's token, which the kernel before this one does not write.
  MII_DEVICE void find_position(const DecodeSeq& seq) {
    if (n.cos_sin == nullptr || seq.q_start == token) return;
    token = seq.q_start;
    position = __ldcg(n.positions + token);
  }

  // The token's D / 2 cosines, then as many sines.
  MII_DEVICE const float* angles() const {
    return n.cos_sin + static_cast<int64_t>(max(0, min(position, n.max_positions - 1))) * D;
  }
  MII_DEVICE void prefetch_angles(int lane) const {
    if (n.cos_sin != nullptr && lane * 32 < D) prefetch_l2(angles() + lane * 32);
  }

  // Cosines and sines of columns column and column + 1, of the first half.
  MII_DEVICE void load_angles(float2& cos, float2& sin, int column) const {
    cos = __ldg(reinterpret_cast<const float2*>(angles() + column));
    sin = __ldg(reinterpret_cast<const float2*>(angles() + D / 2 + column));
  }

  MII_DEVICE static void rotate_pair(uint32_t& first, uint32_t& second, float2 cos, float2 sin) {
    float2 x = unpack_pair<T>(first), y = unpack_pair<T>(second);
    rotate(x.x, y.x, cos.x, sin.x);
    rotate(x.y, y.y, cos.y, sin.y);
    first = pack_pair<T>(x.x, x.y);
    second = pack_pair<T>(y.x, y.y);
  }

  // Of the 8-column blocks of a fragment row, number i has its partner at i + D / 16.
  MII_DEVICE void rotate_queries(uint32_t (&query)[D / 16][4], int rows, int lane) const {
    if (n.cos_sin == nullptr) return;
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      constexpr int kPartner = D / 16;
      float2 cos, sin;
      load_angles(cos, sin, 8 * i + 2 * (lane % 4));
      const int j = i + kPartner;
      rotate_pair(query[i / 2][2 * (i % 2)], query[j / 2][2 * (j % 2)], cos, sin);
      if (rows > 8) rotate_pair(query[i / 2][2 * (i % 2) + 1], query[j / 2][2 * (j % 2) + 1], cos, sin);
    }
  }

  MII_DEVICE void load_key(NewKey& fresh, const JobCursor& job, int lane) const {
    const AttentionParams& p = n.p;
    const int at = min(lane, D / 4 - 1);
    const T* row = static_cast<const T*>(p.a.q) + job.seq.q_start * p.a.q_stride;
    const uint32_t* key = reinterpret_cast<const uint32_t*>(row + (p.a.q_heads + job.head) * D);
    const uint2 value = reinterpret_cast<const uint2*>(row + (p.a.q_heads + p.a.kv_heads + job.head) * D)[at];
    fresh.key[0] = key[at];
    fresh.key[1] = key[at + D / 4];
    fresh.value[0] = value.x;
    fresh.value[1] = value.y;
    fresh.slot = __ldcg(n.kv_slots + job.seq.q_start);
    if (n.cos_sin != nullptr) load_angles(fresh.cos, fresh.sin, 2 * at);
  }

  // Rotates the key; the warp whose steps of the job have it stores it, with the value, in the cache.
  MII_DEVICE void store_key(NewKey& fresh, const JobCursor& job, const Team& team, int lane) const {
    if (n.cos_sin != nullptr) rotate_pair(fresh.key[0], fresh.key[1], fresh.cos, fresh.sin);
    const int step = (job.seq.kv_len - 1) / kDecodeStep * kDecodeStep;
    if (step < job.key || step >= job.key_end || (step - job.key) % team.stride != 0) return;
    if (fresh.slot < 0 || lane >= D / 4) return;
    const AttentionParams& p = n.p;
    const int64_t page = static_cast<int64_t>(fresh.slot >> p.block_bits) * p.a.kv_heads + job.head;
    const int64_t at = ((page << p.block_bits) + (fresh.slot & (p.a.block_size - 1))) * D;
    uint32_t* key = reinterpret_cast<uint32_t*>(static_cast<T*>(const_cast<void*>(p.a.k_cache)) + at);
    key[lane] = fresh.key[0];
    key[lane + D / 4] = fresh.key[1];
    uint2* value = reinterpret_cast<uint2*>(static_cast<T*>(const_cast<void*>(p.a.v_cache)) + at);
    value[lane] = make_uint2(fresh.value[0], fresh.value[1]);
  }

  // Into row `row` of a step's keys at `slot`, once what was copied there has arrived for all lanes.
  MII_DEVICE static void place_key(const NewKey& fresh, unsigned char* slot, int row, int lane) {
    if (lane < D / 4) {
      *reinterpret_cast<uint32_t*>(slot + Rows::offset(row, lane / 4) + 4 * (lane % 4)) = fresh.key[0];
      *reinterpret_cast<uint32_t*>(slot + Rows::offset(row, D / 16 + lane / 4) + 4 * (lane % 4)) = fresh.key[1];
    }
    __syncwarp();
  }
  MII_DEVICE static void place_value(const NewKey& fresh, unsigned char* slot, int row, int lane) {
    if (lane < D / 4) {
      uint2* target = reinterpret_cast<uint2*>(slot + Rows::offset(row, lane / 2) + 8 * (lane % 2));
      *target = make_uint2(fresh.value[0], fresh.value[1]);
    }
    __syncwarp();
  }
};

}  // namespace mii
