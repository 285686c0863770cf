// In place of csrc/include/mii/barrier.cuh.
#pragma once
#include "mii/attention_mma.cuh"

namespace card {

// Copies by a thread itself, after which it arrives at a barrier.
struct Gathered {
  std::vector<mii::Copies::Copy> copies;
  uint32_t barrier;
};
inline thread_local std::map<int, std::deque<Gathered>> gathered;  // by thread; empty again when a CTA has ended
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
inline void barrier_arrive_after_copies(uint32_t barrier) {
  card::gathered[card::current].push_back({std::exchange(copies[card::current].open, {}), barrier});
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  do {
    card::yield();
  } while (card::barriers.at(barrier).phase % 2 == parity);
}
inline void barrier_wait_forever(uint32_t barrier, uint32_t parity) { barrier_wait(barrier, parity); }

inline void threads_wait(int number, int threads) {
  card::named[number](threads, [] {});
}
inline void threads_arrive(int number, int threads) {
  card::named[number].arrive(threads, [] {});
}

}  // namespace mii

namespace card {

inline void land_gathered() {
  for (auto& [thread, mine] : gathered) {
    if (mine.empty() || chance() % slowness != 0) continue;
    for (const auto& copy : mine.front().copies) mii::land(copy);
    mii::barrier_arrive(mine.front().barrier);
    mine.pop_front();
  }
}
inline bool none_gathered() {
  return std::all_of(gathered.begin(), gathered.end(), [](const auto& each) { return each.second.empty(); });
}
inline const bool gathers = (engines.push_back({land_gathered, none_gathered}), true);

}  // namespace card
