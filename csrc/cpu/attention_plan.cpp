// Cuts a step's attention into items (see attention.h). Plain integer work, no instruction set matters.
#include "attention.h"

#include "threads.h"

namespace mii::cpu {
namespace {

int ceil_div(int a, int b) { return (a + b - 1) / b; }
int smaller(int a, int b) { return a < b ? a : b; }
int larger(int a, int b) { return a > b ? a : b; }

// Query tokens of an item of a prompt. On AMX whole tiles of 16, and enough rows to repay the packing of the keys.
int item_tokens(const MiiAttention& a) {
  const int group = a.q_heads / a.kv_heads;
  if (active_isa() == Isa::amx && a.dtype == MII_BF16) return larger(1, 192 / group / 16) * 16;
  return larger(1, 48 / group);
}

int64_t max_items(const MiiAttention& a) {
  return a.kv_heads * (a.max_tokens / item_tokens(a) + a.max_seqs) + kMaxSplitItems * kMaxParts;
}

struct Plan {
  const MiiAttention& a;
  WorkList& list;
  int split_items = 0, slots = 0;

  int q_len(int s) const { return a.q_start[s + 1] - a.q_start[s]; }

  // First key that query token `token` of sequence s sees.
  int first_key(int s, int token) const {
    const int position = a.kv_len[s] - q_len(s) + token;
    return a.window > 0 ? larger(0, position - a.window + 1) : 0;
  }

  void add(WorkItem item) {
    list.cost +=
        static_cast<int64_t>(item.tokens) * (a.q_heads / a.kv_heads) * (item.key_end - item.key_begin) * a.head_dim;
    list.item[list.items++] = item;
  }

  // How many parts a decode item is cut into: enough for both ends of the machine's threads, no part below 128 keys.
  int parts(int s, int decode_items, int threads) const {
    if (decode_items > kMaxSplitItems || decode_items >= 4 * threads || threads == 1) return 1;
    const int keys = a.kv_len[s] - first_key(s, 0);
    return larger(1, smaller(smaller(kMaxParts, keys / 128), ceil_div(4 * threads, decode_items)));
  }

  void add_parts(int s, int head, int parts, bool leading) {
    const int begin = first_key(s, 0), end = a.kv_len[s], step = ceil_div(end - begin, parts);
    if (leading) {
      add({s, head, 0, 1, begin, parts == 1 ? end : begin + step, slots, 0, parts});
      return;
    }
    for (int p = 1; p < parts; ++p)
      add({s, head, 0, 1, begin + p * step, smaller(end, begin + (p + 1) * step), slots, p, parts});
  }

  void add_decodes(int seqs, int threads) {
    int decode_items = 0;
    for (int s = 0; s < seqs; ++s) decode_items += q_len(s) == 1 ? a.kv_heads : 0;
    for (int pass = 0; pass < 2; ++pass) {  // joins are found by number: parts 0 come first
      const bool leading = pass == 0;
      slots = 0;
      for (int s = 0; s < seqs; ++s) {
        if (q_len(s) != 1) continue;
        const int count = parts(s, decode_items, threads);
        for (int h = 0; h < a.kv_heads && count > 1; ++h, slots += count) add_parts(s, h, count, leading);
      }
      if (leading) list.joins = list.items;
    }
    for (int s = 0; s < seqs; ++s)
      for (int h = 0; h < a.kv_heads && q_len(s) == 1 && parts(s, decode_items, threads) == 1; ++h)
        add({s, h, 0, 1, first_key(s, 0), a.kv_len[s], 0, 0, 1});
  }

  // The longest items (last tokens of a prompt) first, so that the threads end together.
  void add_prompts(int seqs) {
    const int tile = item_tokens(a);
    for (int s = 0; s < seqs; ++s) {
      if (q_len(s) <= 1) continue;
      for (int token = (q_len(s) - 1) / tile * tile; token >= 0; token -= tile)
        for (int h = 0; h < a.kv_heads; ++h) {
          const int tokens = smaller(tile, q_len(s) - token);
          add({s, h, token, tokens, first_key(s, token), a.kv_len[s] - q_len(s) + token + tokens, 0, 0, 1});
        }
    }
  }
};

}  // namespace
}  // namespace mii::cpu

using namespace mii::cpu;

extern "C" {

int64_t mii_attention_work_bytes(const MiiAttention* args) {
  return static_cast<int64_t>(sizeof(WorkList)) + max_items(*args) * static_cast<int64_t>(sizeof(WorkItem));
}

int64_t mii_attention_workspace_bytes(const MiiAttention* args) {
  const int64_t rows = static_cast<int64_t>(kMaxSplitItems) * kMaxParts * (args->q_heads / args->kv_heads);
  return rows * (args->head_dim + 2) * static_cast<int64_t>(sizeof(float));
}

int32_t mii_attention_plan(const MiiAttention* args, void*) {
  const int32_t status = check_attention(*args);
  if (status != MII_OK) return status;
  WorkList& list = *static_cast<WorkList*>(args->work);
  list.items = list.joins = 0;
  list.cost = 0;
  Plan plan{*args, list};
  const int seqs = args->counts[MII_NUM_SEQS];
  plan.add_decodes(seqs, max_threads());
  list.decodes = list.items;
  plan.add_prompts(seqs);
  return MII_OK;
}

}  // extern "C"
