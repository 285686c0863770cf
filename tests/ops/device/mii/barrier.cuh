// Stands in for csrc/include/mii/barrier.cuh where device code runs on the host.
#pragma once
#include "mii/attention_mma.cuh"

namespace mii {

struct Barrier {
  int32_t bytes : 31;  // still to come
  uint32_t parity : 1;
  uint16_t pending, arrivals;

  void settle() {
    if (pending > 0 || bytes != 0) return;
    pending = arrivals;
    parity ^= 1;
  }
};
static_assert(sizeof(Barrier) == 8);
inline Barrier& barrier_at(uint32_t address) { return *reinterpret_cast<Barrier*>(shared_at(address)); }

inline void barrier_init(uint32_t barrier, int arrivals) {
  barrier_at(barrier) = {0, 0, static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals)};
}
inline void barrier_arrive(uint32_t barrier) {
  if (barrier_at(barrier).pending == 0) emulation::fail("more arrivals than a barrier was made for");
  --barrier_at(barrier).pending;
  barrier_at(barrier).settle();
  emulation::dawdle();
}
inline bool barrier_try(uint32_t barrier, uint32_t parity) { return barrier_at(barrier).parity != parity; }
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  emulation::wait_for([=] { return barrier_try(barrier, parity); });
}
inline void barrier_expect(uint32_t barrier, int bytes) {
  barrier_at(barrier).bytes += bytes;
  barrier_arrive(barrier);
}
inline void publish_writes() {}

inline void threads_wait(int number, int threads) { emulation::meet(emulation::cta().barriers[number], threads); }
inline void threads_arrive(int number, int threads) { emulation::cta().barriers[number].arrive(threads); }

}  // namespace mii
