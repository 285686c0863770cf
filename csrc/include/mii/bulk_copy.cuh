// Bulk asynchronous copies into shared memory and the barriers that count their bytes (Hopper; PTX ISA, "cp.async.bulk"
// and "mbarrier"). Kernels that use them have an empty body below sm_90.
//
// A barrier's phase ends when the expected arrivals are there and as many bytes have landed as were announced. Phases
// alternate between parity 0 and 1; waiting for parity p returns once the phase of that parity is over.
#pragma once
#include "mii/attention_mma.cuh"

namespace mii {

constexpr int kBarrierBytes = 8;

MII_DEVICE void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After barrier_init, by the thread that did it: copies, which are not ordered with plain writes, see the barriers too.
MII_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
MII_DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives and announces bytes that copies are going to bring.
MII_DEVICE void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
MII_DEVICE void barrier_wait(uint32_t barrier, int parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n.reg .pred over;\nmbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\nselp.u32 %0, 1, 0, over;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// True in one lane of a warp that is here as a whole. The compiler knows that it is one alone.
MII_DEVICE bool elect_lane() {
  uint32_t elected;
  asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\nselp.u32 %0, 1, 0, one;\n}" : "=r"(elected));
  return elected != 0;
}

// How the L2 cache treats what is read once: it goes first.
MII_DEVICE uint64_t read_once_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Copies `bytes`, a multiple of 16, between addresses that are aligned to 16; the barrier counts them.
MII_DEVICE void bulk_copy(uint32_t target, const void* source, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
               "l"(source), "r"(bytes), "r"(barrier)
               : "memory");
}
MII_DEVICE void bulk_copy(uint32_t target, const void* source, int bytes, uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          target),
      "l"(source), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// Brings `bytes`, a multiple of 16, into the L2 cache.
MII_DEVICE void bulk_prefetch(const void* source, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes) : "memory");
}

// A barrier of the first `Threads` threads of the CTA alone; 0 is that of __syncthreads().
template <int Id, int Threads>
MII_DEVICE void partial_barrier() {
  asm volatile("bar.sync %0, %1;" ::"n"(Id), "n"(Threads) : "memory");
}

}  // namespace mii
