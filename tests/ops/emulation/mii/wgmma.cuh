// In place of csrc/include/mii/wgmma.cuh: products of a warpgroup with both operands in shared memory. They are computed
// when their thread waits for them, the latest moment that they may read what they were given.
#pragma once
#include "mii/attention_mma.cuh"
#include "mii/wgmma_layout.h"

#define MII_HOPPER 1

namespace mii {

constexpr int kWarpgroup = 128;

struct Product {
  float* d;
  uint64_t a, b;
};
struct Products {
  std::vector<Product> open;
  std::vector<std::vector<Product>> batches;
};
inline std::map<int, Products> products;  // by thread

// Element k of row `row` of an operand, as the 128-byte swizzle lays it out.
inline float operand(uint64_t descriptor, int row, int k) {
  const uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  uint32_t address = start + row / 8 * stride + row % 8 * 128 + 2 * k;
  address ^= (address >> 7 & 7) << 4;
  Half value;
  std::memcpy(&value, card::shared + address, 2);
  return to_float(value);
}
// This thread's elements of d [64 x 128] += a b; the fragment is described in the header that this one stands for.
inline void compute(const Product& p) {
  const int warp = card::current / 32 % 4, lane = card::lane();
  for (int i = 0; i < 64; ++i) {
    const int row = 16 * warp + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; ++k) p.d[i] += operand(p.a, row, k) * operand(p.b, column, k);
  }
}

inline void products_fence() {}
inline void products_commit() {
  Products& mine = products[card::current];
  mine.batches.push_back(std::exchange(mine.open, {}));
}
template <int N>
void products_wait() {
  auto& batches = products[card::current].batches;
  for (; static_cast<int>(batches.size()) > N; batches.erase(batches.begin())) {
    for (const Product& each : batches.front()) compute(each);
  }
  card::yield();
}
template <typename Register, int N>
void settle(Register (&)[N]) {}
template <typename T, bool kAdd, int N>
void product(float (&d)[N], uint64_t a, uint64_t b) {
  static_assert(kAdd && N == 64);
  products[card::current].open.push_back({d, a, b});
}
inline void publish_to_products() {}

}  // namespace mii
