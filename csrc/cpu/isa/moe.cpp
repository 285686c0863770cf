// Mixture of experts: routing, the experts' products, the sum of a token's choices (struct MiiMoe... of abi/moe.h).
//
// An expert's weight is packed as for a plain product (linear.cpp); that of gate and up has panels of 16 gate features and
// of the same 16 up features in turn, so a span of panels yields both halves of its outputs. A part of the work is a run
// of panels of one expert that has rows: experts without any are never touched, and a few rows stream each weight once.
#include "activate.h"
#include "linear.h"
#include "mii/abi/moe.h"

namespace mii::cpu::MII_ISA {
namespace {

constexpr int64_t kRowsAtOnce = 256;  // rows of an expert whose copy and products stay in the second cache
constexpr int64_t kSpan = 64;         // panels whose products do, before they are finished

int64_t panels_of(int64_t out_features, bool gated) { return panel_count(out_features) * (gated ? 2 : 1); }

struct Run {  // some rows of one expert by panels [begin, end) of its weight
  const MiiMoeLinear& a;
  const char* weight;
  int64_t first, rows, begin, end;
};

// The rows of x, one after the other: an expert's tokens lie apart.
const void* gathered_rows(const Run& run, void* to) {
  const int64_t size = item_size(run.a.dtype), bytes = run.a.in_features * size;
  for (int64_t r = 0; r < run.rows; ++r)
    memcpy((char*)to + r * bytes,
           (const char*)run.a.x + run.a.pairs[run.first + r] / run.a.top_k * run.a.x_stride * size, bytes);
  return to;
}

// The products of panels [panel, panel + count), [rows][count * kPanel] at `out`.
void multiply_span(const Run& run, const void* x, int64_t x_stride, int64_t panel, int64_t count, void* out) {
  const int64_t size = item_size(run.a.dtype);
  MiiLinear product = {};
  product.out = out;
  product.x = x;
  product.weight = run.weight + panel * kPanel * padded_depth(run.a.dtype, run.a.in_features) * size;
  product.rows = run.rows;
  product.in_features = run.a.in_features;
  product.out_features = product.out_stride = count * kPanel;
  product.x_stride = x_stride;
  product.dtype = run.a.dtype;
  linear_panels(product, 0, count);
}

// out = act(gate) * up for the span's panels, which hold both in turn.
template <class T>
void finish_gated(const Run& run, const T* products, int64_t panel, int64_t count) {
  with_activation(run.a.activation, [&](auto kind) {
    for (int64_t r = 0; r < run.rows; ++r) {
      T* out = (T*)run.a.out + (run.first + r) * run.a.out_stride;
      for (int64_t p = 0; p < count; p += 2)
        for (int64_t i = 0; i < kPanel; i += W) {
          const int64_t feature = (panel + p) / 2 * kPanel + i, left = run.a.out_features - feature;
          if (left <= 0) break;
          const T* gate = products + (r * count + p) * kPanel + i;
          const V value = activate<decltype(kind)::value>(load(gate), 0.0f) * load(gate + kPanel);
          left >= W ? store(out + feature, value) : store_n(out + feature, value, static_cast<int>(left));
        }
    }
  });
}

// out[pair] = weight of the pair times the span's products.
template <class T>
void finish_weighted(const Run& run, const T* products, int64_t panel, int64_t count) {
  const int64_t left = run.a.out_features - panel * kPanel, width = left < count * kPanel ? left : count * kPanel;
  for (int64_t r = 0; r < run.rows; ++r) {
    const int64_t pair = run.a.pairs[run.first + r];
    T* out = (T*)run.a.out + pair * run.a.out_stride + panel * kPanel;
    const V weight = set1(run.a.pair_weights[pair]);
    for (int64_t i = 0; i < width; i += W) {
      const V value = weight * load(products + r * count * kPanel + i);
      width - i >= W ? store(out + i, value) : store_n(out + i, value, static_cast<int>(width - i));
    }
  }
}

template <class T>
void multiply(const Run& run, bool gated) {
  const int64_t widest = run.end - run.begin < kSpan ? run.end - run.begin : kSpan;
  const int64_t copied = gated ? run.rows * run.a.in_features : 0;
  T* products = (T*)scratch((run.rows * widest * kPanel + copied) * sizeof(T), Scratch::outer);
  const void* x = (const T*)run.a.x + run.first * run.a.x_stride;
  if (gated) x = gathered_rows(run, products + run.rows * widest * kPanel);
  for (int64_t panel = run.begin; panel < run.end; panel += kSpan) {
    const int64_t count = run.end - panel < kSpan ? run.end - panel : kSpan;
    multiply_span(run, x, gated ? run.a.in_features : run.a.x_stride, panel, count, products);
    gated ? finish_gated(run, products, panel, count) : finish_weighted(run, products, panel, count);
  }
}

// How the panels of each expert that has rows are cut: into `chunks` runs of whole pairs of panels.
struct Cut {
  int64_t experts, chunks, panels;

  static Cut of(const MiiMoeLinear& a, bool gated) {
    Cut cut = {0, 1, panels_of(a.out_features, gated)};
    for (int64_t e = 0; e < a.experts; ++e) cut.experts += a.offsets[e + 1] > a.offsets[e];
    if (cut.experts == 0) return cut;
    const int64_t most = (cut.panels + 7) / 8, wanted = (4 * max_threads() + cut.experts - 1) / cut.experts;
    cut.chunks = max_threads() == 1 ? 1 : (wanted < most ? wanted : most);
    return cut;
  }
  int64_t begin(int64_t chunk) const {
    const int64_t begin = (panels + 1) / 2 * chunk / chunks * 2;
    return begin < panels ? begin : panels;
  }
};

int64_t expert_with_rows(const MiiMoeLinear& a, int64_t index) {
  int64_t e = 0;
  while (a.offsets[e + 1] == a.offsets[e] || index-- > 0) ++e;
  return e;
}

// ---- routing --------------------------------------------------------------------------------------------------------

// The scores of one token, in float.
template <class T>
void score_token(const MiiMoeRoute& a, int64_t token, float* scores) {
  const T* logits = (const T*)a.logits + token * a.logits_stride;
  float most = to_float(logits[0]);
  for (int64_t e = 1; e < a.experts; ++e) most = to_float(logits[e]) > most ? to_float(logits[e]) : most;
  const bool softmax = a.scoring == MII_MOE_SOFTMAX;
  for (int64_t e = 0; e < a.experts; e += W) {
    const int n = static_cast<int>(a.experts - e < W ? a.experts - e : W);
    const V logit = load_n(logits + e, n);
    store_n(scores + e, softmax ? exp(logit - set1(most)) : sigmoid(logit), n);
  }
  if (!softmax) return;
  float total = 0.0f;
  for (int64_t e = 0; e < a.experts; ++e) total += scores[e];
  for (int64_t e = 0; e < a.experts; ++e) scores[e] /= total;
}

// Whether a value comes before the best one so far; a NaN counts as the smallest, so that the best is always there.
bool better(float value, float best) { return value > best || (best != best && value == value); }

float value_of(const MiiMoeRoute& a, const float* scores, int32_t expert) {
  return scores[expert] + (a.bias == nullptr ? 0.0f : a.bias[expert]);
}

// What a group of experts counts: its largest value, or with sigmoid scores the sum of its two largest.
float group_value(const MiiMoeRoute& a, const float* scores, int32_t group) {
  const int32_t size = a.experts / a.groups, first = group * size;
  int32_t best = first, next = -1;
  for (int32_t e = first + 1; e < first + size; ++e) {
    if (better(value_of(a, scores, e), value_of(a, scores, best))) {
      next = best, best = e;
    } else if (next < 0 || better(value_of(a, scores, e), value_of(a, scores, next))) {
      next = e;
    }
  }
  const bool two = a.scoring == MII_MOE_SIGMOID && next >= 0;
  return value_of(a, scores, best) + (two ? value_of(a, scores, next) : 0.0f);
}

// Marks the experts of all groups but the best as taken.
void leave_best_groups(const MiiMoeRoute& a, const float* scores, char* taken) {
  const int32_t size = a.experts / a.groups;
  memset(taken, 2, a.experts);
  for (int32_t j = 0; j < a.top_groups; ++j) {
    int32_t best = -1;
    float most = 0.0f;
    for (int32_t group = 0; group < a.groups; ++group) {
      if (taken[group * size] == 0) continue;
      const float value = group_value(a, scores, group);
      if (best < 0 || better(value, most)) best = group, most = value;
    }
    memset(taken + best * size, 0, size);
  }
}

// Takes the largest one by one.
void choose(const MiiMoeRoute& a, int64_t token, const float* scores, char* taken) {
  int32_t* chosen = a.chosen + token * a.top_k;
  float *weights = a.weights + token * a.top_k, total = 0.0f;
  if (a.groups > 1) {
    leave_best_groups(a, scores, taken);
  } else {
    memset(taken, 0, a.experts);
  }
  for (int32_t j = 0; j < a.top_k; ++j) {
    int32_t best = -1;
    float most = 0.0f;
    for (int32_t e = 0; e < a.experts; ++e) {
      if (taken[e]) continue;
      const float value = value_of(a, scores, e);
      if (best < 0 || better(value, most)) best = e, most = value;
    }
    taken[best] = 1;
    chosen[j] = best;
    weights[j] = scores[best];
    total += scores[best];
  }
  const float factor = a.renormalise ? a.scale / (total + 1e-20f) : a.scale;
  for (int32_t j = 0; j < a.top_k; ++j) weights[j] *= factor;
}

void sort_pairs(const MiiMoeRoute& a, int64_t pairs) {
  int32_t* next = (int32_t*)scratch(a.experts * sizeof(int32_t), Scratch::outer);
  memset(next, 0, a.experts * sizeof(int32_t));
  for (int64_t p = 0; p < pairs; ++p) ++next[a.chosen[p]];
  int32_t row = 0, tiles = 0;
  for (int32_t e = 0; e < a.experts; ++e) {
    const int32_t count = next[e];
    a.offsets[e] = next[e] = row;
    for (int32_t first = 0; first < count; first += a.tile_rows) {
      int32_t* tile = a.tiles + 4 * ++tiles;
      tile[0] = e, tile[1] = row + first, tile[2] = count - first < a.tile_rows ? count - first : a.tile_rows, tile[3] = 0;
    }
    row += count;
  }
  a.offsets[a.experts] = row;
  a.tiles[0] = tiles;
  for (int64_t p = 0; p < pairs; ++p) {
    const int32_t row = next[a.chosen[p]]++;
    a.pairs[row] = static_cast<int32_t>(p);
    a.places[p] = row;
  }
}

}  // namespace

int32_t moe_route(const MiiMoeRoute& a, int64_t tokens) {
  with_dtype(a.dtype, [&](auto tag) {
    parallel(tokens, a.experts * (a.top_k + 8), [&](int64_t begin, int64_t end) {
      float* scores = (float*)scratch(a.experts * (sizeof(float) + 1), Scratch::outer);
      for (int64_t t = begin; t < end; ++t) {
        score_token<decltype(tag)>(a, t, scores);
        choose(a, t, scores, (char*)(scores + a.experts));
      }
    });
  });
  sort_pairs(a, tokens * a.top_k);
  return MII_OK;
}

int64_t moe_packed_bytes(const MiiMoePack& a) {
  return panels_of(a.out_features, a.gated != 0) * kPanel * padded_depth(a.dtype, a.in_features) * item_size(a.dtype);
}

int32_t linear_pack(const MiiLinearPack& a);

int32_t moe_pack(const MiiMoePack& a) {
  if (!a.gated) return linear_pack({a.packed, a.weight, a.in_features, a.out_features, a.weight_stride, a.dtype});
  const int64_t size = item_size(a.dtype), bytes = kPanel * padded_depth(a.dtype, a.in_features) * size;
  each_part(panels_of(a.out_features, true), [&](int64_t panel) {
    const int64_t feature = panel / 2 * kPanel, left = a.out_features - feature;
    const int64_t row = feature + (panel % 2) * a.out_features;
    linear_pack({(char*)a.packed + panel * bytes, (const char*)a.weight + row * a.weight_stride * size, a.in_features,
                 left < kPanel ? left : kPanel, a.weight_stride, a.dtype});
  });
  return MII_OK;
}

int32_t moe_linear(const MiiMoeLinear& a, bool gated) {
  const Cut cut = Cut::of(a, gated);
  const int64_t bytes = cut.panels * kPanel * padded_depth(a.dtype, a.in_features) * item_size(a.dtype);
  each_part(cut.experts * cut.chunks, [&](int64_t part) {
    const int64_t e = expert_with_rows(a, part / cut.chunks), chunk = part % cut.chunks;
    for (int64_t first = a.offsets[e]; first < a.offsets[e + 1]; first += kRowsAtOnce) {
      const int64_t left = a.offsets[e + 1] - first;
      const Run run = {a,     (const char*)a.weight + e * bytes, first, left < kRowsAtOnce ? left : kRowsAtOnce,
                       cut.begin(chunk), cut.begin(chunk + 1)};
      with_dtype(a.dtype, [&](auto tag) { multiply<decltype(tag)>(run, gated); });
    }
  });
  return MII_OK;
}

namespace {

template <class T>
void combine_row(const MiiMoeCombine& a, int64_t token) {
  const T* parts = (const T*)a.parts + token * a.top_k * a.width;
  const T* shared = a.shared == nullptr ? nullptr : (const T*)a.shared + token * a.shared_stride;
  V gate = set1(1.0f);
  if (shared != nullptr && a.shared_gate != nullptr) gate = sigmoid(set1(to_float(((const T*)a.shared_gate)[token])));
  T* out = (T*)a.out + token * a.out_stride;
  for (int64_t i = 0; i < a.width; i += W) {
    const int n = static_cast<int>(a.width - i < W ? a.width - i : W);
    V total = load_n(parts + i, n);
    for (int j = 1; j < a.top_k; ++j) total = total + load_n(parts + j * a.width + i, n);
    if (shared != nullptr) total = fma(gate, load_n(shared + i, n), total);
    store_n(out + i, total, n);
  }
}

}  // namespace

int32_t moe_combine(const MiiMoeCombine& a, int64_t tokens) {
  with_dtype(a.dtype, [&](auto tag) {
    parallel(a.tokens, a.width * (a.top_k + 1), [&](int64_t begin, int64_t end) {
      using T = decltype(tag);
      for (int64_t t = begin; t < end; ++t)
        t < tokens ? combine_row<T>(a, t) : (void)memset((void*)((T*)a.out + t * a.out_stride), 0, a.width * sizeof(T));
    });
  });
  return MII_OK;
}

}  // namespace mii::cpu::MII_ISA
