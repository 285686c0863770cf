// A CTA of device code on one thread of the host: its threads are fibers that yield where they wait.
//
// What the hardware does some time later happens here at the last moment that the code allows: copies and products when
// they are waited for. Code that hands a buffer on too early, or reads one too late, then gives wrong numbers.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <setjmp.h>
#include <ucontext.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#undef __align__
#undef __device__
#undef __forceinline__
#undef __global__
#undef __grid_constant__
#undef __host__
#undef __launch_bounds__
#undef __shared__
#define __align__(bytes)
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __global__
#define __grid_constant__
#define __host__
#define __launch_bounds__(...)
#define __shared__

using std::max;
using std::min;

namespace emulation {

constexpr int kWarp = 32;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// Threads meet here; the last to come lets all go on.
struct Meeting {
  int come = 0;
  unsigned turn = 0;
  void arrive(int expected) {
    if (++come < expected) return;
    come = 0;
    ++turn;
  }
};

struct Warp {
  Meeting meeting;
  uint32_t values[2][kWarp];  // of this turn and of the one before
};

// Fibers give way by a jump: swapcontext would ask the system for the mask of signals each time.
struct Fiber {
  ucontext_t beginning;
  jmp_buf place;
  Index thread;
  bool begun = false, done = false;
};

struct Cta {
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<char[]>> stacks;  // kept from run to run
  std::vector<Warp> warps;
  Meeting barriers[16];
  Index block, grid, size;
  std::function<void()> body;
  jmp_buf caller;
  int running = 0, idle = 0;
  const char* failure = nullptr;
};

inline Cta& cta() {
  static Cta one;
  return one;
}
inline Fiber& self() { return cta().fibers[cta().running]; }

// Ends the run.
[[noreturn]] inline void fail(const char* why) {
  cta().failure = why;
  _longjmp(cta().caller, 1);
}

[[noreturn]] inline void enter(Fiber& fiber) {
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.beginning);
  std::abort();
}

inline void resume_another() {
  Cta& c = cta();
  const int from = c.running, count = static_cast<int>(c.fibers.size());
  for (int step = 1; step <= count; ++step) {
    const int next = (from + step) % count;
    if (c.fibers[next].done) continue;
    if (next == from) return;
    c.running = next;
    if (!_setjmp(c.fibers[from].place)) enter(c.fibers[next]);
    return;
  }
  _longjmp(c.caller, 1);  // that was the last
}

inline void progress() { cta().idle = 0; }
inline void yield() {
  if (++cta().idle > 100 * static_cast<int>(cta().fibers.size())) fail("all threads wait for one another");
  resume_another();
}

// Lets the others go on for a while, as a thread that is slow at this place would.
inline void dawdle() {
  for (int i = 0; i < 3; ++i) {
    progress();
    resume_another();
  }
}

inline void work() {
  cta().body();
  progress();
  self().done = true;
  resume_another();
}

// Runs `body` in `threads` threads in an order drawn from `seed`; null, or why it could not go on.
inline const char* run(unsigned block, unsigned grid, int threads, unsigned seed, std::function<void()> body) {
  constexpr int kStack = 1 << 17;
  Cta& c = cta();
  c.fibers.clear();
  c.fibers.resize(threads);
  c.warps.assign(threads / kWarp, Warp());
  std::fill(std::begin(c.barriers), std::end(c.barriers), Meeting());
  c.block.x = block;
  c.grid.x = grid;
  c.size.x = threads;
  c.body = std::move(body);
  c.running = c.idle = 0;
  c.failure = nullptr;
  std::vector<unsigned> order(threads);
  for (int i = 0; i < threads; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  while (static_cast<int>(c.stacks.size()) < threads) c.stacks.emplace_back(new char[kStack]);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = c.fibers[i];
    fiber.thread.x = order[i];
    getcontext(&fiber.beginning);
    fiber.beginning.uc_stack.ss_sp = c.stacks[i].get();
    fiber.beginning.uc_stack.ss_size = kStack;
    fiber.beginning.uc_link = nullptr;
    makecontext(&fiber.beginning, work, 0);
  }
  if (!_setjmp(c.caller)) enter(c.fibers[0]);
  return c.failure;
}

inline void wait_for(const std::function<bool()>& condition) {
  while (!condition()) yield();
  progress();
}
inline void meet(Meeting& meeting, int expected) {
  const unsigned turn = meeting.turn;
  meeting.arrive(expected);
  wait_for([&] { return meeting.turn != turn; });
}

inline int lane() { return self().thread.x % kWarp; }

// The values that the 32 threads of a warp bring, for all of them.
template <typename T>
const T* gather(T value) {
  static_assert(sizeof(T) == 4);
  Warp& warp = cta().warps[self().thread.x / kWarp];
  uint32_t* values = warp.values[warp.meeting.turn % 2];
  std::memcpy(values + lane(), &value, 4);
  meet(warp.meeting, kWarp);
  return reinterpret_cast<const T*>(values);
}

}  // namespace emulation

#define threadIdx (emulation::self().thread)
#define blockIdx (emulation::cta().block)
#define gridDim (emulation::cta().grid)
#define blockDim (emulation::cta().size)

template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return emulation::gather(value)[from % emulation::kWarp];
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int by) {
  return emulation::gather(value)[std::max(emulation::lane() - by, 0)];
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::gather(value)[emulation::lane() ^ mask];
}
inline int __reduce_max_sync(unsigned, int value) {
  const int* values = emulation::gather(value);
  return *std::max_element(values, values + emulation::kWarp);
}
inline int __reduce_min_sync(unsigned, int value) {
  const int* values = emulation::gather(value);
  return *std::min_element(values, values + emulation::kWarp);
}
inline bool __any_sync(unsigned, bool value) { return __reduce_max_sync(0, value) != 0; }
inline bool __all_sync(unsigned, bool value) { return __reduce_min_sync(0, value) != 0; }
inline void __syncthreads() { emulation::meet(emulation::cta().barriers[0], static_cast<int>(blockDim.x)); }
inline void __syncwarp() { emulation::gather(0); }
inline void __threadfence() {}
inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}
inline int atomicMax(int* address, int value) {
  const int before = *address;
  *address = std::max(before, value);
  return before;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
T __ldg(const T* address) {
  return *address;
}
inline float __fdividef(float x, float y) { return x / y; }
