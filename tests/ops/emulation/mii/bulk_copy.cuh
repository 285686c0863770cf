// In place of csrc/include/mii/bulk_copy.cuh.
#pragma once
#include "mii/attention_mma.cuh"

namespace mii {

constexpr int kBarrierBytes = 8;

inline void barrier_init(uint32_t barrier, int arrivals) { card::barriers[barrier] = {arrivals, arrivals}; }
inline void barrier_init_fence() {}
inline void barrier_arrive(uint32_t barrier) {
  --card::barriers.at(barrier).pending;
  card::barriers.at(barrier).settle();
}
inline void barrier_expect(uint32_t barrier, int bytes) {
  card::yield();
  card::barriers.at(barrier).bytes += bytes;
  barrier_arrive(barrier);
}
inline void barrier_wait(uint32_t barrier, int parity) {
  do {
    card::yield();
  } while (card::barriers.at(barrier).phase % 2 == parity);
}

inline bool elect_lane() {
  __syncwarp();
  return card::lane() == 0;
}

inline uint64_t read_once_policy() { return 0; }
inline void bulk_copy(uint32_t target, const void* source, int bytes, uint32_t barrier) {
  card::must_have_waited();
  card::start(target, source, bytes, barrier);
}
// Weights, which are there before the kernel before this one ends.
inline void bulk_copy(uint32_t target, const void* source, int bytes, uint32_t barrier, uint64_t) {
  card::start(target, source, bytes, barrier);
}

inline void bulk_prefetch(const void* source, int bytes) { card::fetch(source, bytes); }

template <int Id, int Threads>
void partial_barrier() {
  card::named[Id](Threads, [] {});
}

}  // namespace mii
