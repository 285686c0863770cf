// Stands in for csrc/include/mii/wgmma.cuh where device code runs on the host: products that read their operands, by
// descriptor, when they are waited for, as the PTX ISA lays the fragments and the 128-byte swizzle out.
#pragma once
#include "mii/barrier.cuh"
#include "mii/ring_place.cuh"
#include "mii/wgmma_layout.h"

#define MII_HOPPER 1

namespace mii {

constexpr int kWarpgroup = 128;

// ---- products -----------------------------------------------------------------------------------------------------
struct Product {
  float* d;
  const uint32_t* a_registers;  // null: a is in shared memory
  uint64_t a, b;
  int columns;
  bool add, is_half;
};
struct Products {
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;
};
inline std::vector<Products> products;  // of each thread
inline Products& own_products() { return products[threadIdx.x]; }

inline float number(uint16_t bits, bool is_half) {
  __half half;
  __nv_bfloat16 bfloat;
  std::memcpy(&half, &bits, 2);
  std::memcpy(&bfloat, &bits, 2);
  return is_half ? __half2float(half) : __bfloat162float(bfloat);
}
inline float element(uint32_t address, bool is_half) {
  uint16_t bits;
  std::memcpy(&bits, shared_at(address ^ (address >> 7 & 7) << 4), 2);
  return number(bits, is_half);
}
inline uint32_t field(uint64_t descriptor, int bit) {
  return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4;
}
// Element (n, k) of an operand with k along its rows' elements, and of one with N along them.
inline float along_elements(uint64_t d, int n, int k, bool is_half) {
  return element(field(d, 0) + n / 8 * field(d, 32) + n % 8 * 128 + k * 2, is_half);
}
inline float along_rows(uint64_t d, int n, int k, bool is_half) {
  return element(field(d, 0) + n / 64 * field(d, 16) + k / 8 * field(d, 32) + k % 8 * 128 + n % 64 * 2, is_half);
}

// Element k of row lane / 4 + 8 half of fragment A, which four lanes hold together.
inline float left_element(const Product& product, size_t at, int half, int k) {
  const int thread = threadIdx.x, row = thread % kWarpgroup / kWarp * 16 + thread % kWarp / 4 + 8 * half;
  if (product.a_registers == nullptr) return along_elements(product.a, row, k, product.is_half);
  const int owner = thread / 4 * 4 + k % 8 / 2;
  const uint32_t word = products[owner].groups.front()[at].a_registers[half + k / 8 * 2];
  return number(static_cast<uint16_t>(word >> 16 * (k % 2)), product.is_half);
}

inline void multiply(const Product& product, size_t at) {
  for (int half = 0; half < 2; ++half) {
    float left[16];
    for (int k = 0; k < 16; ++k) left[k] = left_element(product, at, half, k);
    for (int i = 0; i < product.columns / 4; ++i) {
      const int column = i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2;
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) {
        sum += left[k] * (product.a_registers ? along_rows(product.b, column, k, product.is_half)
                                              : along_elements(product.b, column, k, product.is_half));
      }
      float& d = product.d[i / 2 * 4 + 2 * half + i % 2];
      d = product.add ? d + sum : sum;
    }
  }
}

inline void products_fence() {}
inline void products_commit() {
  own_products().groups.push_back(std::move(own_products().open));
  own_products().open.clear();
}
template <int N>
void products_wait() {
  auto& groups = own_products().groups;
  while (groups.size() > N) {
    emulation::gather(0);  // all lanes of the warp are here, with what they hold of A
    for (size_t i = 0; i < groups.front().size(); ++i) multiply(groups.front()[i], i);
    emulation::gather(0);
    groups.erase(groups.begin());
  }
}
template <typename Register, int N>
void settle(Register (&)[N]) {}
inline void made_by_now(float) {}

template <typename T, bool kAdd, int kRegisters>
void product(float (&d)[kRegisters], uint64_t a, uint64_t b) {
  own_products().open.push_back({d, nullptr, a, b, 2 * kRegisters, kAdd, std::is_same_v<T, __half>});
}
template <typename T, int kRegisters>
void product_transposed(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b) {
  own_products().open.push_back({d, a, 0, b, 2 * kRegisters, true, std::is_same_v<T, __half>});
}

inline void store_zeros(uint32_t address) { std::memset(shared_at(address), 0, 16); }
template <int kCount>
void take_registers() {}
template <int kCount>
void give_registers() {}

}  // namespace mii
