// Attention for what the tensor-core kernel does not take: float32, unusual head sizes, odd strides. One warp serves
// one query row of one head: 32 keys at a time, a key for each lane in q . k, a slice of the head for each lane in
// the sum.
#include "attention.cuh"

#include "mii/attention_score.cuh"

namespace mii {
namespace {

constexpr int kWarps = 8;
constexpr int kMaxHead = 512;

struct GenericParams {
  MiiAttention a;
  int32_t group;
};

// The sequence that query row `row` belongs to.
MII_DEVICE int find_sequence(const MiiAttention& a, int seqs, int row) {
  int low = 0, high = seqs;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (a.q_start[middle] <= row ? low : high) = middle;
  }
  return low;
}

// First element of a cached key or value.
MII_DEVICE int64_t cached(const MiiAttention& a, const int32_t* blocks, int head, int key) {
  const int64_t page = static_cast<int64_t>(blocks[key / a.block_size]) * a.kv_heads + head;
  return (page * a.block_size + key % a.block_size) * a.head_dim;
}

// One query row of one head; `query` is the warp's shared copy of it, kSlices * 32 >= head_dim.
template <typename T, int kSlices>
__device__ void attend(const GenericParams& p, int seq, int row, int q_head, const float* query) {
  const MiiAttention& a = p.a;
  const int lane = threadIdx.x % kWarp, head = q_head / p.group;
  const int position = a.kv_len[seq] - a.q_start[seq + 1] + row;
  const RowView view = {position, a.window > 0 ? position - a.window + 1 : 0,
                        a.alibi_slopes ? a.alibi_slopes[q_head] : 0.0f};
  const int32_t* blocks = a.block_table + a.seq_slot[seq] * a.max_blocks;
  const T* k_cache = static_cast<const T*>(a.k_cache);
  const T* v_cache = static_cast<const T*>(a.v_cache);
  float out[kSlices] = {}, top = -INFINITY, sum = 0.0f;
  for (int from = max(0, view.key_begin); from <= position; from += kWarp) {
    const int key = from + lane;
    float score = -INFINITY;
    int64_t value = 0;
    if (key <= position) {
      value = cached(a, blocks, head, key);
      float product = 0.0f;
      for (int i = 0; i < a.head_dim; ++i) product += query[i] * to_float(k_cache[value + i]);
      score = full_score(a, product, key, view);
    }
    const float best = fmaxf(top, warp_max(score)), factor = exp2f(top - best), weight = exp2f(score - best);
    sum = sum * factor + warp_sum(weight);
    top = best;
#pragma unroll
    for (int i = 0; i < kSlices; ++i) out[i] *= factor;
    for (int k = 0; k < min(kWarp, position - from + 1); ++k) {
      const float w = __shfl_sync(kFullMask, weight, k);
      const T* source = v_cache + __shfl_sync(kFullMask, value, k);
#pragma unroll
      for (int i = 0; i < kSlices; ++i) {
        if (lane + i * kWarp < a.head_dim) out[i] += w * to_float(source[lane + i * kWarp]);
      }
    }
  }
  T* target = static_cast<T*>(a.out) + row * a.out_stride + static_cast<int64_t>(q_head) * a.head_dim;
#pragma unroll
  for (int i = 0; i < kSlices; ++i) {
    if (lane + i * kWarp < a.head_dim) target[lane + i * kWarp] = from_float<T>(out[i] / sum);
  }
}

template <typename T, int kSlices>
__global__ void __launch_bounds__(kWarps* kWarp) generic_kernel(const __grid_constant__ GenericParams p) {
  __shared__ float queries[kWarps][kSlices * kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  wait_for_previous();
  start_next();
  const int seqs = min(p.a.counts[MII_NUM_SEQS], static_cast<int>(p.a.max_seqs));
  if (seqs <= 0) return;
  const int rows = p.a.q_start[seqs];
  for (int64_t i = blockIdx.x * kWarps + warp; i < static_cast<int64_t>(rows) * p.a.q_heads; i += gridDim.x * kWarps) {
    const int row = static_cast<int>(i / p.a.q_heads), q_head = static_cast<int>(i % p.a.q_heads);
    const int seq = find_sequence(p.a, seqs, row);
    if (p.a.kv_len[seq] <= 0 || row >= p.a.q_start[seq + 1]) continue;
    const T* query = static_cast<const T*>(p.a.q) + row * p.a.q_stride + static_cast<int64_t>(q_head) * p.a.head_dim;
    __syncwarp();
    for (int d = lane; d < p.a.head_dim; d += kWarp) queries[warp][d] = to_float(query[d]);
    __syncwarp();
    attend<T, kSlices>(p, seq, row, q_head, queries[warp]);
  }
}

}  // namespace

int32_t launch_generic(const MiiAttention& a, void* stream) {
  MII_REQUIRE(a.head_dim <= kMaxHead, MII_UNSUPPORTED, "attention: a head of %d elements is above %d", a.head_dim,
              kMaxHead);
  const GenericParams p = {a, a.q_heads / a.kv_heads};
  const int64_t warps = a.max_tokens * a.q_heads;
  const Shape shape = {dim3(int(std::min<int64_t>(ceil_div(warps, kWarps), card().sms * 8))), dim3(kWarps * kWarp)};
  return dispatch_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (a.head_dim <= 128) return launch("mii_attention", generic_kernel<T, 4>, shape, stream, p);
    if (a.head_dim <= 256) return launch("mii_attention", generic_kernel<T, 8>, shape, stream, p);
    return launch("mii_attention", generic_kernel<T, 16>, shape, stream, p);
  });
}

}  // namespace mii
