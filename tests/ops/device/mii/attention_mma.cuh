// Stands in for csrc/include/mii/attention_mma.cuh where device code runs on the host: asynchronous copies that happen
// when they are waited for, products by warps, and the arithmetic of the host.
#pragma once
#include "emulation.h"
#include "mii/common.cuh"

#define MII_DEVICE inline

#include "mii/head_rows.cuh"

namespace mii {

constexpr float kLog2e = 1.4426950408889634f;

// The shared memory of the CTA; it begins at an address that is a multiple of 128 and of nothing more.
constexpr uint32_t kSharedStart = 3 * 128;
alignas(1024) inline unsigned char shared[228 * 1024];
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - shared) + kSharedStart;
}
inline unsigned char* shared_at(uint32_t address) {
  if (address < kSharedStart || address - kSharedStart >= sizeof(shared)) emulation::fail("an address past shared memory");
  return shared + (address - kSharedStart);
}

struct Copy {
  uint32_t target;
  const void* source;
  bool valid;
};
struct Copies {
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};
inline std::vector<Copies> copies;  // of each thread
inline Copies& own_copies() { return copies[threadIdx.x]; }

inline void copy_async(uint32_t target, const void* source, bool valid) {
  own_copies().open.push_back({target, source, valid});
}
inline void copy_async_commit() {
  own_copies().groups.push_back(std::move(own_copies().open));
  own_copies().open.clear();
}
template <int N>
void copy_async_wait() {
  auto& groups = own_copies().groups;
  for (; groups.size() > N; groups.erase(groups.begin())) {
    for (const Copy& copy : groups.front()) {
      if (copy.valid) {
        std::memcpy(shared_at(copy.target), copy.source, 16);
      } else {
        std::memset(shared_at(copy.target), 0, 16);
      }
    }
  }
}

inline int thread_in_cta() { return threadIdx.x; }

// ---- products by warps, whose fragments the header that this one stands for describes
inline void load_rows(uint16_t (&row)[8], uint32_t address) {
  if (address % 16 != 0) emulation::fail("a matrix row is not aligned to 16 bytes");
  std::memcpy(row, shared_at(address), 16);
}
inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
  const uint32_t* addresses = emulation::gather(address);
  const int lane = emulation::lane();
  for (int i = 0; i < 4; ++i) {
    uint16_t row[8];
    load_rows(row, addresses[8 * i + lane / 4]);
    r[i] = row[lane % 4 * 2] | uint32_t(row[lane % 4 * 2 + 1]) << 16;
  }
}
inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  const uint32_t* addresses = emulation::gather(address);
  const int lane = emulation::lane();
  for (int i = 0; i < 4; ++i) {
    uint16_t left[8], right[8];
    load_rows(left, addresses[8 * i + lane % 4 * 2]);
    load_rows(right, addresses[8 * i + lane % 4 * 2 + 1]);
    r[i] = left[lane / 4] | uint32_t(right[lane / 4]) << 16;
  }
}

template <typename T>
float half_of(uint32_t word, int high) {
  const uint16_t bits = static_cast<uint16_t>(word >> 16 * high);
  T value;
  std::memcpy(&value, &bits, 2);
  return to_float(value);
}
struct Operands {
  uint32_t a[4], b[2];
};
inline Operands operands[2][1024];  // of each thread's present product and of the one before

template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int thread = threadIdx.x, lane = thread % kWarp;
  Operands* all = operands[emulation::cta().warps[thread / kWarp].meeting.turn % 2];
  all[thread] = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulation::gather(0);
  const Operands* warp = all + thread / kWarp * kWarp;
  for (int k = 0; k < 16; ++k) {
    const int quad = k % 8 / 2, right = k / 8, high = k % 2;
    for (int i = 0; i < 4; ++i) {
      const Operands& left = warp[lane / 4 * 4 + quad];
      const Operands& column = warp[(lane % 4 * 2 + i % 2) * 4 + quad];
      c[i] += half_of<T>(left.a[i / 2 + 2 * right], high) * half_of<T>(column.b[right], high);
    }
  }
}

inline float exp2_fast(float x) { return exp2f(x); }
template <typename T>
uint32_t pack_pair(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t word;
  std::memcpy(&word, pair, 4);
  return word;
}
inline float quad_max(float value) { return warp_max<4>(value); }
inline float quad_sum(float value) { return warp_sum<4>(value); }

}  // namespace mii
