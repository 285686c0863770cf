// From products q . k to scores: scale, soft cap, ALiBi, and which keys a row sees.
#pragma once
#include "mii/attention_mma.cuh"
#include "mii/attention_work.cuh"

namespace mii {

// A packed row: query token row / group of its sequence, query head row % group of the KV head's group.
struct RowView {
  int position;   // of the token, and so the last key that it sees
  int key_begin;  // the first
  float slope;    // ALiBi

  // `first` is the position of the sequence's first query token.
  template <bool kExtras>
  MII_DEVICE static RowView of(const AttentionParams& p, int first, int head, int row) {
    const int token = row / p.group;
    RowView view;
    view.position = first + token;
    view.key_begin = p.a.window > 0 ? view.position - p.a.window + 1 : 0;
    view.slope = kExtras && p.a.alibi_slopes ? p.a.alibi_slopes[head * p.group + row - token * p.group] : 0.0f;
    return view;
  }
  MII_DEVICE bool sees(int key) const { return key <= position && key >= key_begin; }
};

// tanh to within a few units of float's last place for large x, absolute 1e-7 for small: the soft cap wants no more.
MII_DEVICE float tanh_fast(float x) { return 1.0f - __fdividef(2.0f, 1.0f + exp2_fast(2.0f * kLog2e * x)); }

// A product in units of log2, with soft cap and ALiBi.
MII_DEVICE float full_score(const MiiAttention& a, float product, int key, const RowView& view) {
  float score = product * a.scale;
  if (a.softcap > 0.0f) score = a.softcap * tanh_fast(product * __fdividef(a.scale, a.softcap));
  return kLog2e * (score + view.slope * static_cast<float>(key - view.position));
}

// What full scores need: more than a factor above zero, which the exponential's own multiplication can carry.
inline bool needs_extras(const MiiAttention& a) {
  return a.softcap > 0.0f || a.alibi_slopes != nullptr || !(a.scale > 0.0f);
}

}  // namespace mii
