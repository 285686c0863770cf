// What the attention kernels are made of: tensor-core fragments and asynchronous copies.
//
// Fragments of mma.m16n8k16 (PTX ISA, "Matrix fragments for mma.m16n8k16"), lane l, pairs of neighbouring columns:
//   A [16 x 16]: a[0] row l/4, column 2(l%4);  a[1] row + 8;  a[2] column + 8;  a[3] both
//   B [16 x 8]:  b[0] row 2(l%4), column l/4;  b[1] row + 8
//   C [16 x 8]:  c[0..1] row l/4, columns 2(l%4) .. +1;  c[2..3] row + 8
// C of one product, rounded and packed, is A of the next: scores turn into weights without leaving the registers.
#pragma once
#include <math.h>

#include "mii/common.cuh"

#define MII_DEVICE __device__ __forceinline__

#include "mii/head_rows.cuh"

namespace mii {

constexpr float kLog2e = 1.4426950408889634f;

MII_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// threadIdx.x as a value that the compiler has to ask for anew each time: it then keeps nothing that follows from it
// across the loop over work, where registers are short.
MII_DEVICE int thread_in_cta() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// Starts copying 16 bytes from global to shared memory; where not valid, writes zeros and reads nothing.
MII_DEVICE void copy_async(uint32_t target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}
MII_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's youngest groups are still under way.
template <int N>
MII_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

MII_DEVICE void store_chunk(uint32_t target, uint4 value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(target), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

// Four 8x8 matrices whose rows the lanes 0-7, 8-15, 16-23 and 24-31 point to.
MII_DEVICE void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
MII_DEVICE void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// c += a b
template <typename T>
MII_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

MII_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to T, the first in the low half.
template <typename T>
MII_DEVICE uint32_t pack_pair(float low, float high) {
  const Pack<T, 2> pack = make_pack<T, 2>({low, high});
  return *reinterpret_cast<const uint32_t*>(&pack);
}

// Maximum and sum over the four lanes that share a row of C.
MII_DEVICE float quad_max(float value) { return warp_max<4>(value); }
MII_DEVICE float quad_sum(float value) { return warp_sum<4>(value); }

}  // namespace mii
