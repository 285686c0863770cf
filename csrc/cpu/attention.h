// The work list of attention, made once a step by mii_attention_plan and read by mii_attention for every layer.
#pragma once
#include <stdint.h>

#include "cpu.h"
#include "mii/abi/attention.h"

namespace mii::cpu {

constexpr int kMaxParts = 16;       // parts along the keys of one decode item
constexpr int kMaxSplitItems = 64;  // at most so many items are cut: with more, every thread has work anyway

// Query tokens token .. token + tokens (local to the sequence) of one KV head against keys key_begin .. key_end.
struct WorkItem {
  int32_t seq, head, token, tokens, key_begin, key_end;
  int32_t slot, part, parts;  // parts > 1: the result goes to workspace slot + part
};

struct WorkList {
  int32_t items;
  int32_t decodes;  // the first so many items have one query token
  int32_t joins;    // the first so many items are part 0 of an item that was cut
  int64_t cost;     // elements of keys that all query rows look at
  WorkItem item[1];
};

}  // namespace mii::cpu
