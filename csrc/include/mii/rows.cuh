// Kernels that move whole rows: the embedding and the gather.
#pragma once
#include "mii/common.cuh"

namespace mii {

constexpr int kRowPacks = 4;  // packs that a thread has in flight

// The CTA's share of a row: `chunks` CTAs to a row, each blockDim.x * kRowPacks packs of it.
struct RowShare {
  int64_t row;
  int first;  // the thread's first pack; its others follow blockDim.x apart

  __device__ __forceinline__ RowShare(int chunks)
      : row(blockIdx.x / chunks), first((blockIdx.x % chunks) * blockDim.x * kRowPacks + threadIdx.x) {}
};

// out[r] = x[index[r]], in units of Bits; `count` units a row.
template <typename Bits>
__global__ void __launch_bounds__(128)
    gather_rows(Bits* out, const Bits* x, const int32_t* index, int64_t stride, int count, int chunks) {
  wait_for_previous();
  start_next();
  const RowShare share(chunks);
  const Bits* from = x + index[share.row] * stride;
  Bits* to = out + share.row * count;
  Bits packs[kRowPacks];
#pragma unroll
  for (int p = 0; p < kRowPacks; ++p) {
    const int i = share.first + p * blockDim.x;
    if (i < count) packs[p] = from[i];
  }
#pragma unroll
  for (int p = 0; p < kRowPacks; ++p) {
    const int i = share.first + p * blockDim.x;
    if (i < count) to[i] = packs[p];
  }
}

template <typename T>
struct EmbeddingArgs {
  T* out;
  const T* table;
  const int32_t* ids;
  const T* position_table;  // or null
  const int32_t* positions;
  int64_t vocab, max_positions;
  int position_offset, count, chunks;  // count: packs of a row
  float scale;
};

// out[r] = scale * table[ids[r]] + position_table[positions[r] + offset], in packs of N; zeros for an id outside the
// table. The sum is made in float with one rounding; a scale of 1 without positions copies.
template <typename T, int N>
__global__ void __launch_bounds__(128) embedding_rows(const EmbeddingArgs<T> args) {
  wait_for_previous();
  start_next();
  const RowShare share(args.chunks);
  const int64_t width = int64_t(args.count) * N;
  const int64_t id = args.ids[share.row];
  const bool inside = id >= 0 && id < args.vocab;
  const T* from = args.table + (inside ? id : 0) * width;
  const T* position_row = nullptr;
  if (args.position_table != nullptr) {
    const int64_t position = int64_t(args.positions[share.row]) + args.position_offset;
    position_row = args.position_table + max(int64_t(0), min(position, args.max_positions - 1)) * width;
  }
  Pack<T, N> packs[kRowPacks];
#pragma unroll
  for (int p = 0; p < kRowPacks; ++p) {
    const int i = share.first + p * blockDim.x;
    if (i < args.count) packs[p] = load_pack_const<N>(from + int64_t(i) * N);
  }
#pragma unroll
  for (int p = 0; p < kRowPacks; ++p) {
    const int i = share.first + p * blockDim.x;
    if (i >= args.count) continue;
    float value[N], position[N] = {};
    unpack(value, packs[p]);
    if (position_row != nullptr) unpack(position, load_pack_const<N>(position_row + int64_t(i) * N));
#pragma unroll
    for (int e = 0; e < N; ++e) value[e] = (inside ? args.scale * value[e] : 0.0f) + position[e];
    store_pack(args.out + share.row * width + int64_t(i) * N, make_pack<T>(value));
  }
}

}  // namespace mii
