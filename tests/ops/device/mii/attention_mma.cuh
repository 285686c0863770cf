// Stands in for csrc/include/mii/attention_mma.cuh where device code runs on the host: asynchronous copies that happen
// when they are waited for, and the arithmetic of the host.
#pragma once
#include "emulation.h"
#include "mii/common.cuh"

#define MII_DEVICE inline

namespace mii {

constexpr float kLog2e = 1.4426950408889634f;

// The shared memory of the CTA; it begins at an address that is no multiple of anything.
constexpr uint32_t kSharedStart = 48;
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
