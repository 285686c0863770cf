// Barriers of a CTA on Hopper: those in shared memory that count arrivals and the bytes of copies (PTX ISA, "mbarrier"), and
// those of some of its threads by number. Kernels that use the former have an empty body below sm_90.
//
// A phase of a barrier in shared memory ends when the expected arrivals are there and as many bytes have landed as were
// announced. Phases alternate between parity 0 and 1; waiting for parity p returns once the phase of that parity is over.
#pragma once
#include "mii/attention_mma.cuh"

namespace mii {

constexpr int kBarrierBytes = 8;

// ---- in shared memory ---------------------------------------------------------------------------------------------
// Makes this thread's writes to shared memory visible to copies and products, which go to it by another way than loads do.
MII_DEVICE void publish_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The same for global memory, by the thread that wrote and, once it knows of the writes, by the one that copies.
MII_DEVICE void publish_global_writes() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

MII_DEVICE void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After barrier_init, by the thread that did it: copies see the barriers too.
MII_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  publish_writes();
}
MII_DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives and announces bytes that copies are going to bring.
MII_DEVICE void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Whether the phase of this parity is over; waits for a moment of the hardware's choice.
MII_DEVICE bool barrier_try(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.b32 %0, 1, 0, done;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}
// An error in the hand-over shall give wrong numbers, not hang the card: after a wait this long (seconds) it goes on. A
// trap in its place keeps the assembler from giving the warpgroups registers of their own.
MII_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  constexpr int kTries = 1 << 22;
#pragma unroll 1
  for (int i = 0; i < kTries; ++i) {
    if (barrier_try(barrier, parity)) break;
  }
}
// As barrier_wait without its count, however long it takes.
MII_DEVICE void barrier_wait_forever(uint32_t barrier, uint32_t parity) {
  while (!barrier_try(barrier, parity)) {
  }
}

// Before an arrival by which others learn that they may overwrite what `Count` of these fragments were loaded from: they have
// been read by then. The assembler moves arrivals up past products, and an arrival overtakes loads that nobody waits for; one
// register of each is looked at, since a load brings its four at once.
template <int Count, int N>
MII_DEVICE void have_read(const uint32_t (&fragments)[N][4]) {
  uint32_t any = 0;
#pragma unroll
  for (int i = 0; i < Count; ++i) any ^= fragments[i][0];
  asm volatile("{\n.reg .pred some;\nsetp.eq.u32 some, %0, 0x7fc1dead;\n@some nanosleep.u32 20;\n}" ::"r"(any) : "memory");
}

// The same by what became of them: these sums wait for all that was multiplied into them.
MII_DEVICE void have_multiplied(float one, float other) {
  asm volatile(
      "{\n.reg .pred some;\n.reg .b32 both;\nxor.b32 both, %0, %1;\nsetp.eq.u32 some, both, 0x7fc1dead;\n@some nanosleep.u32 20;\n}" ::
          "r"(__float_as_uint(one)),
      "r"(__float_as_uint(other))
      : "memory");
}

// ---- of `threads` threads by number (0 is __syncthreads): all come, of them some without waiting --------------------
MII_DEVICE void threads_wait(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
MII_DEVICE void threads_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

}  // namespace mii
