// In place of csrc/include/mii/wgmma.cuh: what of it products with both operands in shared memory need.
//
// A product is computed at any time between its hand-over and the end of the wait for it, from what shared memory holds
// then, so an operand that came too late or was overwritten too early is missed by the result. It must not find what a
// thread wrote unless the thread that hands it over has published that since.
#pragma once
#include "mii/barrier.cuh"
#include "mii/ring_place.cuh"
#include "mii/wgmma_layout.h"

#define MII_HOPPER 1

namespace card {

struct Product {
  float* d;  // of this thread
  int columns;
  uint64_t a, b;
  uint32_t published;  // writes of threads that it may find
};
struct Orders {
  std::vector<Product> open;
  std::deque<std::vector<Product>> batches;
};
inline thread_local Orders orders[1024];  // by thread; done when a CTA has ended

// Elements 0 .. 15 of a row of an operand, as the 128-byte swizzle lays them out.
inline void load_operand(float (&to)[16], uint64_t descriptor, int row, uint32_t published) {
  if (descriptor >> 62 != 1) refuse("an operand is not laid out by the 128-byte swizzle");
  const uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  for (int chunk = 0; chunk < 2; ++chunk) {
    uint32_t address = start + row / 8 * stride + row % 8 * 128 + 16 * chunk;
    address ^= (address >> 7 & 7) << 4;
    if (written[address / 16] > published) refuse("a product reads what a thread wrote and nobody published");
    mii::Half values[8];
    std::memcpy(values, shared + address, sizeof values);
    for (int i = 0; i < 8; ++i) to[8 * chunk + i] = mii::to_float(values[i]);
  }
}
// A thread's elements of d [64 x columns] += a b; the fragment is described in the header that this one stands for.
inline void compute(int thread, const Product& p) {
  float a[2][16], b[16];
  for (int low = 0; low < 2; ++low) load_operand(a[low], p.a, thread / 32 % 4 * 16 + thread % 32 / 4 + 8 * low, p.published);
  for (int i = 0; i < p.columns / 4; ++i) {
    load_operand(b, p.b, i / 2 * 8 + thread % 4 * 2 + i % 2, p.published);
    for (int low = 0; low < 2; ++low) {
      p.d[i / 2 * 4 + 2 * low + i % 2] += std::inner_product(b, b + 16, a[low], 0.0f);
    }
  }
}
inline void compute_batch(int thread) {
  for (const Product& each : orders[thread].batches.front()) compute(thread, each);
  orders[thread].batches.pop_front();
}
// Products are slow where copies are fast, so that whichever of the two a kernel waits for too little comes last.
inline void work_on_orders() {
  for (int thread = 0; thread < static_cast<int>(threads.size()); ++thread) {
    if (!orders[thread].batches.empty() && chance() % (8 / slowness) == 0) compute_batch(thread);
  }
}
inline bool no_orders() {
  return std::all_of(std::begin(orders), std::end(orders), [](const Orders& each) {
    return each.open.empty() && each.batches.empty();
  });
}
inline const bool ordered = (engines.push_back({work_on_orders, no_orders}), true);

}  // namespace card

namespace mii {

constexpr int kWarpgroup = 128;

// ---- products: all lanes of a warp come
inline void products_fence() { __syncwarp(); }
template <typename T, bool kAdd, int kCount>
void product(float (&d)[kCount], uint64_t a, uint64_t b) {
  static_assert(kAdd);
  card::Orders& mine = card::orders[card::current];
  mine.open.push_back({d, 2 * kCount, a, b, card::published[card::current]});
}
inline void products_commit() {
  card::Orders& mine = card::orders[card::current];
  mine.batches.push_back(std::exchange(mine.open, {}));
}
template <int N>
void products_wait() {
  while (static_cast<int>(card::orders[card::current].batches.size()) > N) card::yield();
  __syncwarp();
}
template <typename Register, int N>
void settle(Register (&)[N]) {}

// ---- registers: whoever takes some waits until others have given enough
template <int kCount>
void give_registers() {
  int& mine = card::threads[card::current].registers;
  if (mine < kCount || kCount % 8) card::refuse("gives registers that it does not have");
  mine = kCount;
}
template <int kCount>
void take_registers() {
  const auto sum = [](int total, const card::Thread& thread) { return total + thread.registers; };
  int& mine = card::threads[card::current].registers;
  if (mine > kCount || kCount % 8) card::refuse("takes fewer registers than it has");
  while (std::accumulate(card::threads.begin(), card::threads.end(), kCount - mine, sum) > card::kRegisters) card::yield();
  mine = kCount;
}

}  // namespace mii
