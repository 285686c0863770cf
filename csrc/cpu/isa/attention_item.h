// One item of the work list with what it refers to: its query rows, its keys in the paged cache, its output rows.
#pragma once
#include "../attention.h"
#include "simd.h"

namespace mii::cpu::MII_ISA {

constexpr float kNone = -INFINITY;

// Row r of an item is (token r / group, query head r % group of the KV head's group).
template <class T>
struct Item : WorkItem {
  const MiiAttention& a;
  int group, rows, position;  // query heads per KV head; rows of the item; position of its first token
  int block_shift;            // log2 of the block size
  const int32_t* table;

  Item(const MiiAttention& args, const WorkItem& item) : WorkItem(item), a(args) {
    group = a.q_heads / a.kv_heads;
    rows = tokens * group;
    const int q_len = a.q_start[seq + 1] - a.q_start[seq];
    position = a.kv_len[seq] - q_len + token;
    table = a.block_table + a.seq_slot[seq] * a.max_blocks;
    block_shift = __builtin_ctz(static_cast<unsigned>(a.block_size));
  }
  // Where a key lies in k_cache and v_cache, in elements.
  int64_t offset(int key) const {
    const int64_t block = table[key >> block_shift];
    return (((block * a.kv_heads + head) << block_shift) + (key & (a.block_size - 1))) * a.head_dim;
  }
  int64_t step_row(int row) const { return a.q_start[seq] + token + row / group; }
  int64_t column(int row) const { return static_cast<int64_t>(head * group + row % group) * a.head_dim; }
  const T* q(int row) const { return (const T*)a.q + step_row(row) * a.q_stride + column(row); }
  T* out(int row) const { return (T*)a.out + step_row(row) * a.out_stride + column(row); }
};

void attend_amx(const Item<bf16>& item);  // items of more than one token; in the AMX variant only

}  // namespace mii::cpu::MII_ISA
