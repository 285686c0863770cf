// Enough of a GPU to run a CTA of a kernel on the host: threads that take turns in random order, warps that meet, barriers
// that count bytes, and copies that land at any time between their start and the wait for them.
//
// The CTAs of a grid run one after another, in any order, which is right for kernels whose CTAs never wait for one
// another; those that do run in threads of the host, each of which has a card's state of its own. What a kernel must not do
// ends the program with a sentence.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "mii/abi/base.h"

using std::max;
using std::min;

#define __global__
#define __shared__
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes)
#define MII_DEVICE inline

namespace card {

constexpr int kSharedBytes = 232448, kRegisters = 65536;
alignas(1024) inline thread_local unsigned char shared[kSharedBytes];  // dynamic shared memory
inline thread_local std::mt19937 chance(1);

[[noreturn]] inline void refuse(const char* why) {
  std::puts(why);
  std::exit(1);
}

struct Index {
  int x;
};
inline thread_local Index block, grid;

inline int patience = 100000;  // rounds through all threads in which none ends

// ---- threads ------------------------------------------------------------------------------------------------------
// A turn begins and ends by a jump: swapcontext would ask the system for the mask of signals each time.
struct Thread {
  ucontext_t beginning;
  jmp_buf place;
  bool begun = false, done = false, waited = false;  // waited: for the kernel before this one
  int registers = 0;
};
constexpr int kStackBytes = 1 << 16;
inline thread_local std::vector<Thread> threads;
inline thread_local std::vector<std::unique_ptr<char[]>> stacks;  // kept from CTA to CTA
inline thread_local int current;
inline thread_local jmp_buf scheduler;
inline thread_local std::function<void()> body;

inline void yield() {
  if (!_setjmp(threads[current].place)) _longjmp(scheduler, 1);
}
// Lets a thread run until it yields or ends.
__attribute__((noinline)) inline void resume(int thread) {
  current = thread;
  if (_setjmp(scheduler)) return;
  if (threads[thread].begun) _longjmp(threads[thread].place, 1);
  threads[thread].begun = true;
  setcontext(&threads[thread].beginning);
}
inline int warp() { return current / 32; }
inline int lane() { return current % 32; }
inline void must_have_waited() {
  if (!threads[current].waited) refuse("touched memory before it waited for the kernel before");
}

// A place where `count` threads meet; the last one computes for all.
struct Meeting {
  int arrived = 0, generation = 0;

  void operator()(int count, const std::function<void()>& compute) {
    const int mine = generation;
    arrive(count, compute);
    while (generation == mine) yield();
  }
  void arrive(int count, const std::function<void()>& compute) {
    if (++arrived < count) return;
    compute();
    arrived = 0;
    ++generation;
  }
};
inline thread_local Meeting warps[32], named[16];

// ---- barriers and copies --------------------------------------------------------------------------------------------
struct Barrier {
  int arrivals = 0, pending = 0, phase = 0;
  int64_t bytes = 0;

  void settle() {
    if (pending < 0) refuse("more arrivals at a barrier than it expects");
    if (pending > 0 || bytes != 0) return;
    ++phase;
    pending = arrivals;
  }
};
inline thread_local std::map<uint32_t, Barrier> barriers;

struct Copy {
  std::function<void()> land;
  int bytes;
  uint32_t barrier;
};
inline thread_local std::vector<Copy> copies;  // under way
inline thread_local uint32_t latest;           // the barrier that the last one tells of its bytes
inline thread_local unsigned slowness;         // of the copies into a CTA
inline bool lazy_warps = false;                // whether some warps take fewer turns than others
inline thread_local unsigned laziness[32];     // of a CTA's warps: one turn of so many is theirs

inline void begin(Copy copy) {
  latest = copy.barrier;
  copies.push_back(std::move(copy));
}
inline void start(uint32_t target, const void* source, int bytes, uint32_t barrier) {
  const bool aligned = target % 16 == 0 && bytes % 16 == 0 && reinterpret_cast<uintptr_t>(source) % 16 == 0;
  if (!aligned || bytes <= 0) refuse("a bulk copy is not of whole 16 bytes at aligned addresses");
  if (target + bytes > kSharedBytes) refuse("a bulk copy leaves shared memory");
  begin({[=] { std::memcpy(shared + target, source, bytes); }, bytes, barrier});
}
inline void land_some() {
  if (chance() % slowness) return;
  for (int count = copies.empty() ? 0 : static_cast<int>(chance() % (copies.size() + 1)); count > 0; --count) {
    std::swap(copies[chance() % copies.size()], copies.back());
    const Copy copy = copies.back();
    copies.pop_back();
    copy.land();
    Barrier& barrier = barriers.at(copy.barrier);
    barrier.bytes -= copy.bytes;
    barrier.settle();
  }
}

// ---- what is fetched into the L2 cache ------------------------------------------------------------------------------
inline const char* fetch_begin;  // what may be
inline int64_t fetch_size;
inline std::atomic<int64_t> fetched;

inline void fetch(const void* source, int bytes) {
  for (const Copy& copy : copies) {
    if (copy.barrier == latest) refuse("fetches what comes next before all of its own has come");
  }
  const int64_t at = static_cast<const char*>(source) - fetch_begin;
  if (at < 0 || bytes <= 0 || bytes % 16 || at + bytes > fetch_size) refuse("fetches what is not there");
  fetched += bytes;
}

// What works beside the threads, a little after each round of theirs.
struct Engine {
  void (*work)();
  bool (*idle)();
};
inline std::vector<Engine> engines;

// When a thread wrote 16 bytes of shared memory last, by the number of all such writes; 0: a copy engine wrote them.
inline thread_local uint32_t written[kSharedBytes / 16], writes;

// ---- a CTA ----------------------------------------------------------------------------------------------------------
inline void prepare(int count, std::function<void()> kernel) {
  body = std::move(kernel);
  std::memset(shared, 0xff, kSharedBytes);  // NaN in every format
  std::fill(std::begin(written), std::end(written), 0);
  slowness = 1u << chance() % 4;
  for (unsigned& one : laziness) one = !lazy_warps || chance() % 3 ? 1 : 1u << chance() % 6;
  barriers.clear();
  for (Meeting& meeting : warps) meeting = {};
  for (Meeting& meeting : named) meeting = {};
  threads = std::vector<Thread>(count);
  while (static_cast<int>(stacks.size()) < count) stacks.emplace_back(new char[kStackBytes]);
  for (int i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.registers = kRegisters / count / 8 * 8;
    getcontext(&thread.beginning);
    thread.beginning.uc_stack.ss_sp = stacks[i].get();
    thread.beginning.uc_stack.ss_size = kStackBytes;
    makecontext(&thread.beginning, [] { body(), threads[current].done = true, _longjmp(scheduler, 1); }, 0);
  }
}

inline void run_cta(int count, std::function<void()> kernel) {
  prepare(count, std::move(kernel));
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  for (int left = count, idle = 0; left > 0; ++idle) {
    if (idle > patience) refuse("the threads wait for one another forever");
    std::shuffle(order.begin(), order.end(), chance);
    bool lazy[32];
    for (int warp = 0; warp < 32; ++warp) lazy[warp] = laziness[warp] > 1 && chance() % laziness[warp] != 0;
    for (const int thread : order) {
      if (threads[thread].done || lazy[thread / 32]) continue;
      resume(thread);
      if (!threads[thread].done) continue;
      if (!threads[thread].waited) refuse("a thread ended without waiting for the kernel before");
      --left, idle = 0;
    }
    if (!copies.empty()) idle = 0;
    land_some();
    for (const Engine& engine : engines) engine.work();
  }
  const bool idle = std::all_of(engines.begin(), engines.end(), [](const Engine& engine) { return engine.idle(); });
  if (!copies.empty() || !idle) refuse("a CTA ended while something in it was under way");
}

}  // namespace card

#define threadIdx (card::Index{card::current})
#define blockIdx card::block
#define gridDim card::grid

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct int2 {
  int x, y;
};
struct int4 {
  int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline void __syncwarp() {
  card::warps[card::warp()](32, [] {});
}
inline void __syncthreads() {
  card::named[0](static_cast<int>(card::threads.size()), [] {});
}
inline void __threadfence() { card::yield(); }
inline void __nanosleep(unsigned) { card::yield(); }
inline void __stcg(float4* address, float4 value) { card::must_have_waited(), *address = value; }
inline void __stcs(uint4* address, uint4 value) { card::must_have_waited(), *address = value; }
inline float4 __ldcg(const float4* address) { return card::must_have_waited(), *address; }
inline int __ldcg(const int* address) { return card::must_have_waited(), *address; }
inline uint4 __ldcg(const uint4* address) { return card::must_have_waited(), *address; }
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  card::must_have_waited();
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  card::must_have_waited();
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}
inline int atomicAdd(int* address, int value) {
  card::must_have_waited();
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}

inline unsigned atomicOr(unsigned* address, unsigned bits) { return __atomic_fetch_or(address, bits, __ATOMIC_SEQ_CST); }

// ---- what the lanes of a warp tell one another ------------------------------------------------------------------------
namespace card {
template <typename T>
struct Words {
  T of[32];
};
template <typename T>
Words<T> tell(T mine) {
  static thread_local T told[32][32];
  T(&words)[32] = told[warp()];
  words[lane()] = mine;
  Words<T> all;
  warps[warp()](32, [] {});
  std::memcpy(all.of, words, sizeof words);
  warps[warp()](32, [] {});  // all have read before anyone goes on
  return all;
}
}  // namespace card

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return card::tell(value).of[lane & 31];
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int by) {
  return card::tell(value).of[max(card::lane() - by, 0)];
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int by) {
  return card::tell(value).of[card::lane() ^ by];
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  const auto all = card::tell(value);
  return *std::max_element(all.of, all.of + 32);
}
inline unsigned __ballot_sync(unsigned, bool mine) {
  const auto all = card::tell(mine);
  unsigned lanes = 0;
  for (int lane = 0; lane < 32; ++lane) lanes |= unsigned(all.of[lane]) << lane;
  return lanes;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
