// Hopper's warpgroup products (wgmma) and the hand-over of registers.
//
// Fragments of wgmma.m64nNk16 (PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16"), warp w of a group, lane l:
//   D [64 x N]:  d[4 i], d[4 i + 1] row 16 w + l/4, columns 8 i + 2(l%4) .. +1;  d[4 i + 2], d[4 i + 3] row + 8
//   A [64 x 16]: as A of mma.m16n8k16 for the warp's 16 rows (attention_mma.cuh)
// so D of one product, rounded and packed, is A of the next.
#pragma once
#include "mii/barrier.cuh"
#include "mii/ring_place.cuh"
#include "mii/wgmma_layout.h"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MII_HOPPER 1
#endif

namespace mii {

constexpr int kWarpgroup = 128;

#if defined(MII_HOPPER)

// ---- products -----------------------------------------------------------------------------------------------------
// Before the first product of a batch, and after registers that one reads or adds to were written.
MII_DEVICE void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
MII_DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most N of the youngest batches are under way.
template <int N>
MII_DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from moving uses of finished results before the wait for them.
template <typename Register, int N>
MII_DEVICE void settle(Register (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if constexpr (sizeof(Register) == 4 && std::is_same_v<Register, float>) {
      asm volatile("" : "+f"(registers[i])::"memory");
    } else {
      asm volatile("" : "+r"(registers[i])::"memory");
    }
  }
}

// What makes this value, which is never negative, is done before the next wait. The assembler would move a wait up past
// arithmetic, and with it lose what the two were to do at the same time, but not past a branch.
MII_DEVICE void made_by_now(float never_negative) {
  if (never_negative < 0.0f) asm volatile("nanosleep.u32 20;" ::: "memory");
}

// d (+)= a b, a and b in shared memory, both with k along their rows' elements. N = 2 kRegisters columns.
template <typename T, bool kAdd, int kRegisters>
MII_DEVICE void product(float (&d)[kRegisters], uint64_t a, uint64_t b);
// d += a b, a in registers, b in shared memory with N along its rows' elements ("transposed").
template <typename T, int kRegisters>
MII_DEVICE void product_transposed(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b);
#define MII_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define MII_NAMES_32 \
  MII_NAMES_16 ", " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MII_NAMES_48 \
  MII_NAMES_32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define MII_NAMES_64 \
  MII_NAMES_48 ", " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MII_NAMES_96 \
  MII_NAMES_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MII_NAMES_112 \
  MII_NAMES_96 ", " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define MII_NAMES_128 \
  MII_NAMES_112 ", " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MII_RESULTS_8(I) \
  "+f"(d[I]), "+f"(d[I + 1]), "+f"(d[I + 2]), "+f"(d[I + 3]), "+f"(d[I + 4]), "+f"(d[I + 5]), "+f"(d[I + 6]), "+f"(d[I + 7])
#define MII_RESULTS_16 MII_RESULTS_8(0), MII_RESULTS_8(8)
#define MII_RESULTS_32 MII_RESULTS_16, MII_RESULTS_8(16), MII_RESULTS_8(24)
#define MII_RESULTS_48 MII_RESULTS_32, MII_RESULTS_8(32), MII_RESULTS_8(40)
#define MII_RESULTS_64 MII_RESULTS_48, MII_RESULTS_8(48), MII_RESULTS_8(56)
#define MII_RESULTS_96 MII_RESULTS_64, MII_RESULTS_8(64), MII_RESULTS_8(72), MII_RESULTS_8(80), MII_RESULTS_8(88)
#define MII_RESULTS_112 MII_RESULTS_96, MII_RESULTS_8(96), MII_RESULTS_8(104)
#define MII_RESULTS_128 MII_RESULTS_112, MII_RESULTS_8(112), MII_RESULTS_8(120)

#define MII_PRODUCT(REGISTERS, COLUMNS, TYPE, A, B, ADD)                                                      \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #ADD ", 0;\n"                                         \
               "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE                          \
               " {" MII_NAMES_##REGISTERS "}, %" #A ", %" #B ", add, 1, 1, 0, 0;\n}"                          \
               : MII_RESULTS_##REGISTERS                                                                     \
               : "l"(a), "l"(b), "n"(kAdd ? 1 : 0))
#define MII_PRODUCT_OF(REGISTERS, COLUMNS, A, B, ADD)             \
  if constexpr (kRegisters == REGISTERS) {                        \
    if constexpr (std::is_same_v<T, __half>) {                    \
      MII_PRODUCT(REGISTERS, COLUMNS, "f16", A, B, ADD);          \
    } else {                                                      \
      MII_PRODUCT(REGISTERS, COLUMNS, "bf16", A, B, ADD);         \
    }                                                             \
  }
#define MII_PRODUCT_TRANSPOSED(REGISTERS, COLUMNS, TYPE, A0, A1, A2, A3, B)                                      \
  asm volatile("{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"                                                    \
               "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE                             \
               " {" MII_NAMES_##REGISTERS "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", add, 1, 1, 1;\n}" \
               : MII_RESULTS_##REGISTERS                                                                        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

template <typename T, bool kAdd, int kRegisters>
MII_DEVICE void product(float (&d)[kRegisters], uint64_t a, uint64_t b) {
  static_assert(kRegisters % 16 == 0 && kRegisters <= 128 && kRegisters != 80, "no such product here");
  MII_PRODUCT_OF(16, 32, 16, 17, 18)
  MII_PRODUCT_OF(32, 64, 32, 33, 34)
  MII_PRODUCT_OF(48, 96, 48, 49, 50)
  MII_PRODUCT_OF(64, 128, 64, 65, 66)
  MII_PRODUCT_OF(96, 192, 96, 97, 98)
  MII_PRODUCT_OF(112, 224, 112, 113, 114)
  MII_PRODUCT_OF(128, 256, 128, 129, 130)
}

template <typename T, int kRegisters>
MII_DEVICE void product_transposed(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b) {
  static_assert(kRegisters == 32 || kRegisters == 64);
  if constexpr (kRegisters == 32) {
    if constexpr (std::is_same_v<T, __half>) {
      MII_PRODUCT_TRANSPOSED(32, 64, "f16", 32, 33, 34, 35, 36);
    } else {
      MII_PRODUCT_TRANSPOSED(32, 64, "bf16", 32, 33, 34, 35, 36);
    }
  } else {
    if constexpr (std::is_same_v<T, __half>) {
      MII_PRODUCT_TRANSPOSED(64, 128, "f16", 64, 65, 66, 67, 68);
    } else {
      MII_PRODUCT_TRANSPOSED(64, 128, "bf16", 64, 65, 66, 67, 68);
    }
  }
}

#undef MII_PRODUCT
#undef MII_PRODUCT_OF
#undef MII_PRODUCT_TRANSPOSED
#undef MII_RESULTS_8
#undef MII_NAMES_16
#undef MII_NAMES_32
#undef MII_NAMES_48
#undef MII_NAMES_64
#undef MII_NAMES_96
#undef MII_NAMES_112
#undef MII_NAMES_128
#undef MII_RESULTS_16
#undef MII_RESULTS_32
#undef MII_RESULTS_48
#undef MII_RESULTS_64
#undef MII_RESULTS_96
#undef MII_RESULTS_112
#undef MII_RESULTS_128

// Writes 16 bytes of zeros to shared memory.
MII_DEVICE void store_zeros(uint32_t address) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
}

// ---- registers ----------------------------------------------------------------------------------------------------
template <int kCount>
MII_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
MII_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

#endif  // MII_HOPPER

}  // namespace mii
