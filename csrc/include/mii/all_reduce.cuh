// Sums over the cards of one host, alone and with the norm that follows, and a gather: contracts in abi/ranks.h.
//
// One shot: every rank sends its packs to all others and adds up what came. Least delay; (size - 1) times the data leave
// a card. Two shots: a rank has a part of the packs, gets that part from all others, adds it up and sends the sum to all.
// One delay more; 2 (size - 1) / size times the data leave. The sums are made alike, in float in the order of the ranks, so
// which of them serves makes no difference to the bits. What is added up and sent is `present` (peers.cuh), also a rank's own,
// so that ranks agree in the sign of a zero too.
#pragma once
#include "mii/norm.cuh"
#include "mii/peers.cuh"

namespace mii {

template <typename T>
__device__ __forceinline__ uint4 load_bits(const T* address) {
  return present<T>(*reinterpret_cast<const uint4*>(address));
}
template <typename T>
__device__ __forceinline__ Pack<T> pack_of(const uint4& bits) {
  Pack<T> pack;
  *reinterpret_cast<uint4*>(&pack) = bits;
  return pack;
}
template <typename T>
__device__ __forceinline__ uint4 bits_of(const Pack<T>& pack) {
  return *reinterpret_cast<const uint4*>(&pack);
}

// By value: a choice between two places in memory would keep both there.
__device__ __forceinline__ uint4 choose(bool first, uint4 a, uint4 b) {
  return {first ? a.x : b.x, first ? a.y : b.y, first ? a.z : b.z, first ? a.w : b.w};
}

// The packs of all ranks added up; `mine` stands in the place of this rank's.
template <typename T, int Slots>
__device__ __forceinline__ uint4 sum_of(const uint4 (&packs)[Slots], const uint4& mine, int rank, int size) {
  float sum[kPack<T>];
#pragma unroll
  for (int r = 0; r < Slots; ++r) {
    if (r >= size) break;
    float values[kPack<T>];
    unpack(values, pack_of<T>(choose(r == rank, mine, packs[r])));
#pragma unroll
    for (int e = 0; e < kPack<T>; ++e) sum[e] = r == 0 ? values[e] : sum[e] + values[e];
  }
  return present<T>(bits_of<T>(make_pack<T>(sum)));
}

// The boxes of one shot: a rank's packs lie in the box of its number.
template <int Slots>
__device__ __forceinline__ void send_to_all(const Round<Slots>& round, int box, int64_t index, const uint4& pack) {
#pragma unroll
  for (int k = 1; k < Slots; ++k) {
    if (k < round.size()) round.send(round.after(k), box, index, pack);
  }
}
template <typename T, int Slots>
__device__ __forceinline__ uint4 receive_sum(Round<Slots>& round, int64_t index, const uint4& mine) {
  uint4 packs[Slots];
  round.receive(packs, 0, index, round.others());
  return sum_of<T>(packs, mine, round.rank(), round.size());
}

// Two shots for pack `index` of every rank's part. at(r): where the pack of rank r's part lies, null past the end. Boxes 0
// to size - 1: what ranks have of this one's part; from there on, the sums of each rank's part.
template <typename T, int Slots, typename At>
__device__ __forceinline__ void two_shots(Round<Slots>& round, int64_t index, At at, uint4 (&sums)[Slots]) {
  uint4 theirs[Slots], mine = {};
  const T* own = at(round.rank());
  if (own != nullptr) mine = load_bits(own);
#pragma unroll
  for (int k = 1; k < Slots; ++k) {
    const T* place = k < round.size() ? at(round.after(k)) : nullptr;
    if (place != nullptr) theirs[k] = load_bits(place);
  }
#pragma unroll
  for (int k = 1; k < Slots; ++k) {
    if (k >= round.size()) break;
    const int r = round.after(k);
    if (at(r) != nullptr) round.send(r, round.rank(), index, theirs[k]);
  }
  if (own != nullptr) {
    mine = receive_sum<T>(round, index, mine);
    send_to_all(round, round.size() + round.rank(), index, mine);
  }
  unsigned from = 0;
#pragma unroll
  for (int r = 0; r < Slots; ++r) {
    if (r < round.size() && r != round.rank() && at(r) != nullptr) from |= 1u << r;
  }
  round.receive(sums, round.size(), index, from);
#pragma unroll
  for (int r = 0; r < Slots; ++r) sums[r] = choose(r == round.rank(), mine, sums[r]);
}

constexpr int kSumThreads = 128;  // few, so that small sums spread over many SMs

template <typename T, int Slots>
struct SumArgs {
  Peers<Slots> peers;
  T* x;
  int64_t packs, part;  // part: packs that a rank adds up; of one shot all of them
};

template <typename T, int Slots, bool Two>
__global__ void __launch_bounds__(kSumThreads, Slots > 2 ? 4 : 8) all_reduce_packs(
    const __grid_constant__ SumArgs<T, Slots> args) {
  constexpr int N = kPack<T>;
  wait_for_previous();
  start_next();
  Round<Slots> round(args.peers, args.part);
  const int64_t step = int64_t(gridDim.x) * kSumThreads;
  for (int64_t index = int64_t(blockIdx.x) * kSumThreads + threadIdx.x; index < args.part; index += step) {
    if constexpr (Two) {
      const auto at = [&](int r) -> T* {
        const int64_t i = r * args.part + index;
        return i < args.packs ? args.x + i * N : nullptr;
      };
      uint4 sums[Slots];
      two_shots<T>(round, index, at, sums);
#pragma unroll
      for (int r = 0; r < Slots; ++r) {
        T* place = r < round.size() ? at(r) : nullptr;
        if (place != nullptr) store_pack(place, pack_of<T>(sums[r]));
      }
    } else {
      const uint4 mine = load_bits(args.x + index * N);
      send_to_all(round, round.rank(), index, mine);
      store_pack(args.x + index * N, pack_of<T>(receive_sum<T>(round, index, mine)));
    }
  }
  round.finish();
}

template <typename T, int Slots>
struct SumNormArgs {
  Peers<Slots> peers;
  NormArgs<T> norm;
  int part;  // packs of a row that lie side by side in one thread's reach: thread i holds packs i, i + part, ...
};

constexpr int sum_norm_threads(int slots, bool two) { return two && slots > 4 ? 384 : 512; }

// A CTA has a row at a time. Held: packs of a thread; of two shots one of each rank's part.
template <typename T, int Slots, int Held, bool Two>
__global__ void __launch_bounds__(sum_norm_threads(Slots, Two)) all_reduce_norm_rows(
    const __grid_constant__ SumNormArgs<T, Slots> args) {
  static_assert(!Two || Held == Slots);
  constexpr int N = kPack<T>;
  __shared__ float scratch[kWarp];
  const NormArgs<T>& norm = args.norm;
  const int part = args.part, count = norm.width / N;
  const int thread = static_cast<int>(threadIdx.x) < part ? static_cast<int>(threadIdx.x) : count;  // count: holds nothing
  if (blockIdx.x == 0 && norm.weight != nullptr) {
    for (int i = threadIdx.x; i * 128 < norm.width * int(sizeof(T)); i += blockDim.x) {
      prefetch_l2(reinterpret_cast<const char*>(norm.weight) + i * 128);
    }
  }
  wait_for_previous();
  start_next();
  Round<Slots> round(args.peers, norm.rows * part * (Two ? 1 : Held));
  for (int64_t row = blockIdx.x; row < norm.rows; row += gridDim.x) {
    const T* x = norm.x + row * norm.x_stride;
    T* residual = norm.residual + row * norm.width;
    Pack<T> v[Held], added[Held];
    if constexpr (Two) {
      constexpr bool kBefore = Slots <= 4;  // of more ranks the packs alone fill the registers
      if (kBefore) load_held<T>(added, residual, thread, part, count);
      const auto at = [&](int r) -> const T* {
        const int i = thread + r * part;
        return i < count ? x + i * N : nullptr;
      };
      uint4 sums[Slots];
      two_shots<T>(round, row * part + thread, at, sums);
#pragma unroll
      for (int p = 0; p < Held; ++p) v[p] = pack_of<T>(sums[p]);
      if (!kBefore) load_held<T>(added, residual, thread, part, count);
    } else {
      load_held<T>(v, x, thread, part, count);
#pragma unroll
      for (int p = 0; p < Held; ++p) {
        if (thread + p * part < count) {
          v[p] = pack_of<T>(present<T>(bits_of<T>(v[p])));
          send_to_all(round, round.rank(), (row * Held + p) * part + thread, bits_of<T>(v[p]));
        }
      }
      load_held<T>(added, residual, thread, part, count);
#pragma unroll
      for (int p = 0; p < Held; ++p) {
        if (thread + p * part >= count) continue;
        v[p] = pack_of<T>(receive_sum<T>(round, (row * Held + p) * part + thread, bits_of<T>(v[p])));
      }
    }
    add_held<T>(residual, v, added, thread, part, count);
    norm_held<T>(norm, row, v, thread, part, count, [&](float value) { return block_sum(value, scratch); });
  }
  round.finish();
}

template <int Slots>
struct GatherArgs {
  Peers<Slots> peers;
  uint32_t* out;
  const uint32_t* x;
  int64_t words;
};

// All words are sent before the first is waited for.
template <int Slots>
__global__ void __launch_bounds__(kSumThreads) all_gather_words(
    const __grid_constant__ GatherArgs<Slots> args) {
  wait_for_previous();
  start_next();
  Round<Slots> round(args.peers, args.words);
  const int64_t step = int64_t(gridDim.x) * kSumThreads, begin = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  for (int64_t index = begin; index < args.words; index += step) {
    const uint32_t value = args.x[index];
    args.out[round.rank() * args.words + index] = value;
    for (int k = 1; k < round.size(); ++k) round.send_word(round.after(k), round.rank(), index, value);
  }
  for (int64_t index = begin; index < args.words; index += step) {
    for (int k = 1; k < round.size(); ++k) {
      const int r = round.after(k);
      args.out[r * args.words + index] = round.receive_word(r, index);
    }
  }
  round.finish();
}

}  // namespace mii
