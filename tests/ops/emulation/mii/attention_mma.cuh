// In place of csrc/include/mii/attention_mma.cuh and common.cuh: one element type, fragments and products in lockstep.
#pragma once
#include "card.h"
#include "mii/head_rows.cuh"

namespace mii {

constexpr int kWarp = 32;

struct Half {  // bfloat16
  uint16_t bits;
};
inline float to_float(Half value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
template <typename T>
T from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <typename T>
float rounded(float value) {
  return to_float(from_float<T>(value));
}

inline uint32_t shared_address(const void* address) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(address) - card::shared);
}
inline void wait_for_previous() { card::yield(), card::threads[card::current].waited = true; }
inline void start_next() {}  // may come before the wait: what starts then waits itself

struct Lane {
  uint32_t address, result[4], a[4], b[2];
  float c[4];
};
inline thread_local Lane lanes[32][32];

inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
  Lane(&all)[32] = lanes[card::warp()];
  Lane& mine = all[card::lane()];
  mine.address = address;
  card::warps[card::warp()](32, [&] {
    for (int i = 0; i < 32 * 4; ++i) {
      const uint32_t row = all[i / 32 * 8 + i % 32 / 4].address;
      if (row % 16) card::refuse("a matrix row is not aligned to 16 bytes");
      std::memcpy(&all[i % 32].result[i / 32], card::shared + row + 4 * (i % 4), 4);
    }
  });
  std::memcpy(r, mine.result, sizeof mine.result);
}

inline float element(uint32_t pair, int half) { return to_float(Half{static_cast<uint16_t>(pair >> 16 * half)}); }

// mma.m16n8k16; see the fragments in csrc/include/mii/attention_mma.cuh.
inline void multiply_warp(Lane (&all)[32]) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int row = lane / 4, column = 2 * (lane % 4);
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) a[row + 8 * (i % 2)][column + 8 * (i / 2) + half] = element(all[lane].a[i], half);
      for (int i = 0; i < 2; ++i) b[column + 8 * i + half][row] = element(all[lane].b[i], half);
    }
  }
  for (int i = 0; i < 32 * 4; ++i) {
    const int row = i / 16 + 8 * (i % 4 / 2), column = 2 * (i / 4 % 4) + i % 2;
    for (int k = 0; k < 16; ++k) all[i / 4].c[i % 4] += a[row][k] * b[k][column];
  }
}

template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Lane(&all)[32] = lanes[card::warp()];
  Lane& mine = all[card::lane()];
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.c, c, sizeof mine.c);
  mine.b[0] = b0, mine.b[1] = b1;
  card::warps[card::warp()](32, [&] { multiply_warp(all); });
  std::memcpy(c, mine.c, sizeof mine.c);
}

// ---- copies by the threads themselves ------------------------------------------------------------------------------
// A copy lands at once or when its thread waits for it, as chance has it; what never lands is missed by the result.
struct Copies {
  struct Copy {
    uint32_t target;
    const void* source;  // null: zeros
  };
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};
inline thread_local std::map<int, Copies> copies;  // by thread; empty again when a CTA has ended

inline void land(const Copies::Copy& copy) {
  if (copy.source == nullptr) std::memset(card::shared + copy.target, 0, 16);
  else std::memcpy(card::shared + copy.target, copy.source, 16);
  card::written[copy.target / 16] = ++card::writes;
}
inline void copy_async(uint32_t target, const void* source, bool valid) {
  if (target % 16 || reinterpret_cast<uintptr_t>(source) % 16) card::refuse("a copy is not aligned to 16 bytes");
  if (target + 16 > card::kSharedBytes) card::refuse("a copy leaves shared memory");
  const Copies::Copy copy = {target, valid ? source : nullptr};
  if (card::chance() % 2) land(copy);
  else copies[card::current].open.push_back(copy);
}
inline void store_chunk(uint32_t target, uint4 value) {
  if (target % 16 || target + 16 > card::kSharedBytes) card::refuse("a chunk is not aligned, or leaves shared memory");
  std::memcpy(card::shared + target, &value, 16);
}
inline void copy_async_commit() {
  Copies& mine = copies[card::current];
  mine.groups.push_back(std::exchange(mine.open, {}));
}
template <int N>
void copy_async_wait() {
  auto& groups = copies[card::current].groups;
  for (; static_cast<int>(groups.size()) > N; groups.erase(groups.begin())) {
    for (const Copies::Copy& copy : groups.front()) land(copy);
  }
}

// ---- the rest of attention_mma.cuh and common.cuh that kernels here use -------------------------------------------------
constexpr unsigned kFullMask = 0xffffffffu;

inline float warp_sum(float value) {
  for (int by = 16; by > 0; by /= 2) value += __shfl_xor_sync(kFullMask, value, by);
  return value;
}
inline float warp_max(float value) {
  for (int by = 16; by > 0; by /= 2) value = std::fmax(value, __shfl_xor_sync(kFullMask, value, by));
  return value;
}
template <typename T>
constexpr int kPack = 16 / sizeof(T);
template <typename T, int N = kPack<T>>
struct alignas(sizeof(T) * N) Pack {
  T data[N];
};
template <int N, typename T>
Pack<T, N> load_pack(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(Pack<T, N>)) card::refuse("a pack is not aligned");
  Pack<T, N> pack;
  std::memcpy(&pack, address, sizeof pack);
  return pack;
}
template <typename T, int N>
void unpack(float (&out)[N], const Pack<T, N>& pack) {
  for (int i = 0; i < N; ++i) out[i] = to_float(pack.data[i]);
}
inline void prefetch_l2(const void*) {}
template <typename T>
uint32_t pack_pair(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}
template <typename T, int N>
Pack<T, N> make_pack(const float (&values)[N]) {
  Pack<T, N> pack;
  for (int i = 0; i < N; ++i) pack.data[i] = from_float<T>(values[i]);
  return pack;
}

}  // namespace mii
