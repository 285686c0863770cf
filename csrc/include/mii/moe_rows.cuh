// Experts' products of one to four rows each: a warp takes two rows of weights at a time, all of k, on the plain cores.
//
// With so few rows there is nothing but reading the weights, and no sum has to be put together from several CTAs: what a
// kernel of a few microseconds loses at its beginning and its end counts. A warp has 4 KB on their way, and asks for those
// of its next rows before it finishes these. For moe_up the two rows are gate and up of a column, so the activation is
// part of the epilogue; for moe_down they are two columns.
#pragma once
#include "mii/moe_product.cuh"

namespace mii {

constexpr int kRowsThreads = 256;
constexpr int kRowsWarps = kRowsThreads / kWarp;
constexpr int kRowsSteps = 4;                     // of 32 chunks of 16 bytes of a row, that are loaded at once
constexpr int64_t kRowsAhead = int64_t(16) << 20;  // bytes that moe_down brings into L2 before moe_up ends

// Weights are read once: they leave the first cache to x.
template <typename T>
MII_DEVICE Pack<T> load_once(const T* address) {
#if defined(__CUDA_ARCH__)
  Pack<T> pack;
  uint4& bits = *reinterpret_cast<uint4*>(&pack);
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(address));
  return pack;
#else
  return load_pack<kPack<T>>(address);
#endif
}

// Two rows of weights, and where a warp is in them.
template <typename T, bool Up>
struct RowPair {
  static constexpr int kColumns = Up ? 1 : 2;  // of out

  const T* rows[2];
  int4 tile;
  int column, step;

  MII_DEVICE static int per_tile(const MoeArgs<T>& a) { return (a.n + kColumns - 1) / kColumns; }
  // `tile_`: the entry of the list that `item` belongs to.
  MII_DEVICE void set(const MoeArgs<T>& a, int item, const int4 tile_) {
    tile = tile_, column = item % per_tile(a) * kColumns, step = 0;
    const T* weight = a.weight + int64_t(tile.x) * (Up ? 2 : 1) * a.n * a.k;
    rows[0] = weight + int64_t(column) * a.k;
    rows[1] = weight + int64_t(Up ? a.n + column : min(column + 1, a.n - 1)) * a.k;
  }
};

template <typename T>
struct RowBlock {
  Pack<T> packs[kRowsSteps][2];

  MII_DEVICE static int chunk(int step) { return (step * kWarp + threadIdx.x % kWarp) * kPack<T>; }
  template <bool Up>
  MII_DEVICE void load(const RowPair<T, Up>& pair, int k) {
#pragma unroll
    for (int s = 0; s < kRowsSteps; ++s) {
      const int at = chunk(pair.step + s);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (at < k) packs[s][r] = load_once(pair.rows[r] + at);
      }
    }
  }
};

template <int Tokens>
struct RowSums {
  float of[2][Tokens] = {};

  template <typename T>
  MII_DEVICE void add(const RowBlock<T>& block, const T* const (&x)[Tokens], int step, int k) {
#pragma unroll
    for (int s = 0; s < kRowsSteps; ++s) {
      const int at = RowBlock<T>::chunk(step + s);
      if (at >= k) continue;
      float weight[2][kPack<T>], value[kPack<T>];
      unpack(weight[0], block.packs[s][0]);
      unpack(weight[1], block.packs[s][1]);
#pragma unroll
      for (int t = 0; t < Tokens; ++t) {
        unpack(value, load_pack<kPack<T>>(x[t] + at));
#pragma unroll
        for (int i = 0; i < kPack<T>; ++i) {
          of[0][t] += weight[0][i] * value[i];
          of[1][t] += weight[1][i] * value[i];
        }
      }
    }
  }
  // Over the lanes of the warp; lane t returns those of row t.
  MII_DEVICE float2 total() const {
    float2 mine = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int t = 0; t < Tokens; ++t) {
      const float first = warp_sum(of[0][t]), second = warp_sum(of[1][t]);
      if (static_cast<int>(threadIdx.x % kWarp) == t) mine = make_float2(first, second);
    }
    return mine;
  }
};

// By lane t: the results of row t of a tile.
template <typename T, bool Up>
MII_DEVICE void store_row(const MoeArgs<T>& a, const RowPair<T, Up>& pair, const float2 sums) {
  const int t = threadIdx.x % kWarp;
  if (t >= pair.tile.z) return;
  const int row = pair.tile.y + t;
  if constexpr (Up) {
    a.out[row * a.out_stride + pair.column] = from_float<T>(activate_any<T>(sums.x, a.activation) * sums.y);
  } else {
    const int number = a.pairs[row];
    const float weight = a.pair_weights[number];
    T* out = a.out + number * a.out_stride + pair.column;
    out[0] = from_float<T>(weight * sums.x);
    if (pair.column + 1 < a.n) out[1] = from_float<T>(weight * sums.y);
  }
}

// What comes after a warp's first rows, while what writes x still runs.
template <typename T>
MII_DEVICE void fetch_ahead(const MoeArgs<T>& a, int item, int items, int warps) {
  const int lane = threadIdx.x % kWarp, line = 128 / sizeof(T), per_tile = RowPair<T, false>::per_tile(a);
  int64_t left = kRowsAhead / warps;
  for (item += warps; item < items && left > 0; item += warps, left -= int64_t(2) * a.k * sizeof(T)) {
    RowPair<T, false> pair;
    pair.set(a, item, a.tiles[1 + item / per_tile]);
    for (int r = 0; r < 2; ++r) {
      for (int at = lane * line; at < a.k; at += kWarp * line) prefetch_l2(pair.rows[r] + at);
    }
  }
}

// Grid: any number of CTAs. `most_tiles`: entries of the list after the first. Early reads are those of moe_stream.
template <typename T, int Tokens, bool Up>
__global__ void __launch_bounds__(kRowsThreads, 4) moe_rows(const MoeArgs<T> a, int most_tiles) {
  if constexpr (Up) {
    wait_for_previous();
    start_next();
  }
  const int warps = gridDim.x * kRowsWarps, per_tile = RowPair<T, Up>::per_tile(a);
  int item = blockIdx.x * kRowsWarps + threadIdx.x / kWarp;
  const int4 first = a.tiles[1 + min(item / per_tile, most_tiles - 1)];  // together with the number of tiles
  const int items = a.tiles[0].x * per_tile;
  RowPair<T, Up> pair;
  RowBlock<T> block;
  if (item < items) {
    pair.set(a, item, first);
    block.load(pair, a.k);
  }
  if constexpr (!Up) {
    fetch_ahead(a, item, items, warps);
    wait_for_previous();
    start_next();
  }
  while (item < items) {
    const T* x[Tokens];
#pragma unroll
    for (int t = 0; t < Tokens; ++t) {
      x[t] = a.x + source_row<T, Up>(a, pair.tile.y + min(t, pair.tile.z - 1)) * a.x_stride;
    }
    RowSums<Tokens> sums;
    for (;;) {
      sums.add(block, x, pair.step, a.k);
      pair.step += kRowsSteps;
      if (pair.step * kWarp * kPack<T> >= a.k) break;
      block.load(pair, a.k);
    }
    const RowPair<T, Up> done = pair;
    item += warps;
    if (item < items) {
      pair.set(a, item, a.tiles[1 + item / per_tile]);
      block.load(pair, a.k);
    }
    store_row(a, done, sums.total());
  }
}

}  // namespace mii
