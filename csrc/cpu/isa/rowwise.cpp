// Operations that treat every row alone: embedding, gather, norms, rotary embedding with the KV write, activations.
#include "activate.h"
#include "mii/abi/norm.h"
#include "mii/abi/rope_kv.h"
#include "mii/abi/rows.h"

namespace mii::cpu::MII_ISA {
namespace {

// ---- copies -------------------------------------------------------------------------------------------------------

int32_t gather(const MiiGather& a) {
  const int64_t size = item_size(a.dtype), bytes = a.width * size;
  parallel(a.rows, a.width, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      memcpy((char*)a.out + r * bytes, (const char*)a.x + a.index[r] * a.x_stride * size, bytes);
  });
  return MII_OK;
}

template <class T>
void embed_row(const MiiEmbedding& a, int64_t r) {
  const bool inside = a.ids[r] >= 0 && a.ids[r] < a.vocab;  // else a row of zeros
  const T* from = (const T*)a.table + (inside ? a.ids[r] : 0) * a.width;
  const T* position = nullptr;
  if (a.position_table != nullptr) {
    int64_t p = static_cast<int64_t>(a.positions[r]) + a.position_offset;
    p = p < 0 ? 0 : (p < a.max_positions ? p : a.max_positions - 1);
    position = (const T*)a.position_table + p * a.width;
  }
  T* out = (T*)a.out + r * a.width;
  if (position == nullptr && !inside) {
    memset((void*)out, 0, a.width * sizeof(T));
    return;
  }
  if (position == nullptr && a.scale == 1.0f) {
    memcpy((void*)out, from, a.width * sizeof(T));
    return;
  }
  for (int64_t i = 0; i < a.width; i += W) {
    const int n = static_cast<int>(a.width - i < W ? a.width - i : W);
    const V token = inside ? load_n(from + i, n) : set1(0.0f);
    store_n(out + i, fma(token, set1(a.scale), position == nullptr ? set1(0.0f) : load_n(position + i, n)), n);
  }
}

int32_t embedding(const MiiEmbedding& a) {
  with_dtype(a.dtype, [&](auto tag) {
    parallel(a.rows, a.width, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) embed_row<decltype(tag)>(a, r);
    });
  });
  return MII_OK;
}

// ---- norms --------------------------------------------------------------------------------------------------------

template <class T>
MII_INLINE float sum_of_squares(const T* x, int64_t width, float mean) {
  V total = set1(0.0f), total2 = set1(0.0f);
  const V centre = set1(mean);
  int64_t i = 0;
  for (; i + 2 * W <= width; i += 2 * W) {
    const V d = load(x + i) - centre, e = load(x + i + W) - centre;
    total = fma(d, d, total);
    total2 = fma(e, e, total2);
  }
  float rest = 0.0f;
  for (; i < width; ++i) {
    const float d = to_float(x[i]) - mean;
    rest += d * d;
  }
  return sum(total + total2) + rest;
}

template <class T>
MII_INLINE float sum_of_row(const T* x, int64_t width) {
  V total = set1(0.0f);
  int64_t i = 0;
  for (; i + W <= width; i += W) total = total + load(x + i);
  float rest = 0.0f;
  for (; i < width; ++i) rest += to_float(x[i]);
  return sum(total) + rest;
}

struct Affine {
  V mean, scale;
  int kind;
};

template <class T>
MII_INLINE V normed(V x, const Affine& a, const T* weight, const T* bias, int n) {
  x = (x - a.mean) * a.scale;
  if (a.kind == MII_RMS) {
    x = rounded(x, T{});
    return weight == nullptr ? x : x * load_n(weight, n);
  }
  if (a.kind == MII_RMS_PLUS1) return weight == nullptr ? x : x * (set1(1.0f) + load_n(weight, n));
  if (weight != nullptr) x = x * load_n(weight, n);
  return bias == nullptr ? x : x + load_n(bias, n);
}

// residual += normed x
template <class T>
void add_normed(const MiiNorm& a, const T* x, T* residual) {
  const T* weight = (const T*)a.x_weight;
  const float squares = sum_of_squares(x, a.width, 0.0f) / static_cast<float>(a.width);
  const Affine affine = {set1(0.0f), set1(1.0f / sqrtf(squares + a.eps)), a.kind};
  for (int64_t i = 0; i < a.width; i += W) {
    const int n = static_cast<int>(a.width - i < W ? a.width - i : W);
    const V y = rounded(normed(load_n(x + i, n), affine, weight + i, (const T*)nullptr, n), T{});
    store_n(residual + i, load_n(residual + i, n) + y, n);
  }
}

// The row that is normed: x, or residual += x. Returns where it lies.
template <class T>
MII_INLINE const T* norm_input(const MiiNorm& a, int64_t r) {
  const T* x = (const T*)a.x + r * a.x_stride;
  if (a.residual == nullptr) return x;
  T* residual = (T*)a.residual + r * a.width;
  if (a.x_weight != nullptr) {
    add_normed(a, x, residual);
    return residual;
  }
  int64_t i = 0;
  for (; i + W <= a.width; i += W) store(residual + i, load(residual + i) + load(x + i));
  if (const int n = static_cast<int>(a.width - i); n > 0)
    store_n(residual + i, load_n(residual + i, n) + load_n(x + i, n), n);
  return residual;
}

template <class T>
void norm_row(const MiiNorm& a, int64_t r) {
  const T* x = norm_input<T>(a, r);
  if (a.out == nullptr) return;
  const T *weight = (const T*)a.weight, *bias = (const T*)a.bias;
  T* out = (T*)a.out + r * a.out_stride;
  const float width = static_cast<float>(a.width);
  const float mean = a.kind == MII_LAYER ? sum_of_row(x, a.width) / width : 0.0f;
  const Affine affine = {set1(mean), set1(1.0f / sqrtf(sum_of_squares(x, a.width, mean) / width + a.eps)), a.kind};
  int64_t i = 0;
  for (; i + W <= a.width; i += W)
    store(out + i, normed(load(x + i), affine, weight ? weight + i : nullptr, bias ? bias + i : nullptr, W));
  if (const int n = static_cast<int>(a.width - i); n > 0)
    store_n(out + i, normed(load_n(x + i, n), affine, weight ? weight + i : nullptr, bias ? bias + i : nullptr, n), n);
}

int32_t norm(const MiiNorm& a) {
  with_dtype(a.dtype, [&](auto tag) {
    parallel(a.rows, a.width, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) norm_row<decltype(tag)>(a, r);
    });
  });
  return MII_OK;
}

// ---- rotary embedding and KV write ----------------------------------------------------------------------------------

template <class T>
MII_INLINE void norm_head(float* head, const T* weight, const MiiRopeKv& a) {
  float squares = 0.0f;
  for (int i = 0; i < a.head_dim; ++i) squares += head[i] * head[i];
  const float scale = 1.0f / sqrtf(squares / static_cast<float>(a.head_dim) + a.norm_eps);
  for (int i = 0; i < a.head_dim; ++i) {
    const float w = to_float(weight[i]);
    head[i] *= scale * (a.norm_kind == MII_RMS_PLUS1 ? 1.0f + w : w);
  }
}

MII_INLINE void rotate_half(float* head, const float* cos_sin, int half) {
  int i = 0;
  for (; i + W <= half; i += W) {
    const V x = load(head + i), y = load(head + half + i), c = load(cos_sin + i), s = load(cos_sin + half + i);
    store(head + i, x * c - y * s);
    store(head + half + i, fma(y, c, x * s));
  }
  for (; i < half; ++i) {
    const float x = head[i], y = head[half + i], c = cos_sin[i], s = cos_sin[half + i];
    head[i] = x * c - y * s;
    head[half + i] = y * c + x * s;
  }
}

MII_INLINE void rotate_interleaved(float* head, const float* cos_sin, int half) {
  for (int i = 0; i < half; ++i) {
    const float x = head[2 * i], y = head[2 * i + 1], c = cos_sin[i], s = cos_sin[half + i];
    head[2 * i] = x * c - y * s;
    head[2 * i + 1] = y * c + x * s;
  }
}

template <class T>
MII_INLINE void widen_row(float* out, const T* x, int n) {
  int i = 0;
  for (; i + W <= n; i += W) store(out + i, load(x + i));
  for (; i < n; ++i) out[i] = to_float(x[i]);
}

template <class T>
MII_INLINE void narrow_row(T* out, const float* x, int n) {
  int i = 0;
  for (; i + W <= n; i += W) store(out + i, load(x + i));
  for (; i < n; ++i) from_float(out[i], x[i]);
}

template <class T>
MII_INLINE void turn_head(T* x, float* head, const T* weight, const float* cos_sin, const MiiRopeKv& a) {
  if (weight == nullptr && cos_sin == nullptr) return;
  widen_row(head, x, a.head_dim);
  if (weight != nullptr) norm_head(head, weight, a);
  if (cos_sin != nullptr && a.interleaved) rotate_interleaved(head, cos_sin, a.rotary_dim / 2);
  if (cos_sin != nullptr && !a.interleaved) rotate_half(head, cos_sin, a.rotary_dim / 2);
  narrow_row(x, head, a.head_dim);
}

template <class T>
void rope_token(const MiiRopeKv& a, int64_t t, float* head) {
  const int64_t d = a.head_dim;
  T* row = (T*)a.qkv + t * a.qkv_stride;
  const int64_t last = a.max_positions - 1;
  const int64_t position = a.positions[t] < 0 ? 0 : (a.positions[t] < last ? a.positions[t] : last);
  const float* cos_sin = a.cos_sin == nullptr ? nullptr : a.cos_sin + position * a.rotary_dim;
  for (int h = 0; h < a.q_heads; ++h) turn_head(row + h * d, head, (const T*)a.q_norm, cos_sin, a);
  T* k = row + a.q_heads * d;
  for (int h = 0; h < a.kv_heads; ++h) turn_head(k + h * d, head, (const T*)a.k_norm, cos_sin, a);
  if (a.k_cache == nullptr || a.kv_slots[t] < 0) return;
  const T* v = k + a.kv_heads * d;
  const int64_t block = a.kv_slots[t] / a.block_size, offset = a.kv_slots[t] % a.block_size;
  for (int h = 0; h < a.kv_heads; ++h) {
    const int64_t to = ((block * a.kv_heads + h) * a.block_size + offset) * d;
    memcpy((T*)a.k_cache + to, k + h * d, d * sizeof(T));
    memcpy((T*)a.v_cache + to, v + h * d, d * sizeof(T));
  }
}

int32_t rope_kv(const MiiRopeKv& a) {
  const int64_t width = static_cast<int64_t>(a.q_heads + 2 * a.kv_heads) * a.head_dim;
  with_dtype(a.dtype, [&](auto tag) {
    parallel(a.tokens, width, [&](int64_t begin, int64_t end) {
      float* head = (float*)scratch(a.head_dim * sizeof(float));
      for (int64_t t = begin; t < end; ++t) rope_token<decltype(tag)>(a, t, head);
    });
  });
  return MII_OK;
}

// ---- activations ----------------------------------------------------------------------------------------------------

template <class T, int kKind>
MII_INLINE void activation_part(const MiiActivation& a, const T* x, T* out, int64_t i, int n) {
  const T* bias = (const T*)a.bias;
  V gate = load_n(x + i, n);
  if (bias != nullptr) gate = gate + load_n(bias + i, n);
  V y = activate<kKind>(gate, a.limit);
  if (a.gated) {
    V up = load_n(x + a.width + i, n);
    if (bias != nullptr) up = up + load_n(bias + a.width + i, n);
    y = y * up;
  }
  store_n(out + i, y, n);
}

template <class T, int kKind>
void activation_row(const MiiActivation& a, int64_t r) {
  const T* x = (const T*)a.x + r * a.x_stride;
  T* out = (T*)a.out + r * a.out_stride;
  int64_t i = 0;
  if (a.bias == nullptr && a.gated)
    for (; i + W <= a.width; i += W) store(out + i, activate<kKind>(load(x + i), a.limit) * load(x + a.width + i));
  for (; i + W <= a.width; i += W) activation_part<T, kKind>(a, x, out, i, W);
  if (i < a.width) activation_part<T, kKind>(a, x, out, i, static_cast<int>(a.width - i));
}

template <int kKind>
void activation_rows(const MiiActivation& a) {
  with_dtype(a.dtype, [&](auto tag) {
    parallel(a.rows, a.width * 2, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) activation_row<decltype(tag), kKind>(a, r);
    });
  });
}

int32_t activation(const MiiActivation& a) {
  with_activation(a.kind, [&](auto kind) { activation_rows<decltype(kind)::value>(a); });
  return MII_OK;
}

}  // namespace

// The rest of the table lies in the other files of this folder.
int32_t attention(const MiiAttention& a);
int32_t linear(const MiiLinear& a);
int32_t linear_pack(const MiiLinearPack& a);
int32_t moe_route(const MiiMoeRoute& a, int64_t tokens);
int32_t moe_linear(const MiiMoeLinear& a, bool gated);
int32_t moe_combine(const MiiMoeCombine& a, int64_t tokens);
int32_t moe_pack(const MiiMoePack& a);
int64_t moe_packed_bytes(const MiiMoePack& a);
int64_t linear_packed_bytes(const MiiLinearPack& a);
int32_t sample_rows(const MiiSample& a, int64_t rows);
int32_t unpack(const MiiUnpack& a);
void add_up(const Addends& a);

const Kernels kernels = {
    embedding,   norm,        rope_kv,             activation,  gather,   attention,       linear,
    linear_pack, linear_packed_bytes, moe_route, moe_linear, moe_combine, moe_pack, moe_packed_bytes,
    sample_rows, unpack,      add_up,
};

}  // namespace mii::cpu::MII_ISA
