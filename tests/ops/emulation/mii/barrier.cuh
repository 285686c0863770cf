// In place of csrc/include/mii/barrier.cuh.
#pragma once
#include "mii/attention_mma.cuh"

namespace card {

inline thread_local uint32_t published[1024];         // by thread: the writes of threads that its products may find

}  // namespace card

namespace mii {

constexpr int kBarrierBytes = 8;

inline void publish_writes() { card::published[card::current] = card::writes; }
inline void publish_global_writes() {}
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
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  do {
    card::yield();
  } while (card::barriers.at(barrier).phase % 2 == parity);
}
inline void barrier_wait_forever(uint32_t barrier, uint32_t parity) { barrier_wait(barrier, parity); }

template <int Count, int N>
void have_read(const uint32_t (&)[N][4]) {}
inline void have_multiplied(float, float) {}

inline void threads_wait(int number, int threads) {
  card::named[number](threads, [] {});
}
inline void threads_arrive(int number, int threads) {
  card::named[number].arrive(threads, [] {});
}

}  // namespace mii
