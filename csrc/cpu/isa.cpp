// Chooses the instruction set once: what the build holds, what CPUID says, what the operating system saves on a context
// switch (XGETBV), for AMX the kernel's permission to use tiles, and at last MII_CPU_ISA, which can only lower it.
#include <stdlib.h>
#include <string.h>

#include "cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mii::cpu {
namespace {

#if defined(__x86_64__)

struct Cpuid {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  Cpuid(unsigned leaf, unsigned subleaf) {
    if (!__get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx)) eax = ebx = ecx = edx = 0;
  }
};

bool bit(unsigned word, int index) { return (word >> index) & 1u; }

constexpr int kAvx512[] = {16, 17, 28, 30, 31};  // F, DQ, CD, BW, VL in leaf 7, EBX

uint64_t saved_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux grants the tile registers per process on request: ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA (18).
bool request_tiles() {
  constexpr long kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

Isa detect() {
  const Cpuid basic(1, 0), extended(7, 0), extended1(7, 1);
  if (!bit(basic.ecx, 27)) return Isa::plain;  // OSXSAVE
  const uint64_t saved = saved_state();
  const bool ymm = (saved & 0x06) == 0x06, zmm = (saved & 0xe6) == 0xe6, tiles = (saved & 0x60000) == 0x60000;
  const bool fma = bit(basic.ecx, 12), f16c = bit(basic.ecx, 29);
  if (!(ymm && bit(extended.ebx, 5) && fma && f16c)) return Isa::plain;
  bool avx512 = zmm;
  for (const int index : kAvx512) avx512 = avx512 && bit(extended.ebx, index);
  if (!avx512) return Isa::avx2;
  const bool vnni = bit(extended.ecx, 11), bf16 = bit(extended1.eax, 5);
  const bool amx = bit(extended.edx, 22) && bit(extended.edx, 24) && bit(extended.edx, 25);  // BF16, TILE, INT8
  if (!bf16) return Isa::avx512;
  return tiles && vnni && amx && request_tiles() ? Isa::amx : Isa::avx512_bf16;
}

#else

Isa detect() { return Isa::plain; }

#endif

Isa limit() {
  const char* name = getenv("MII_CPU_ISA");
  if (name == nullptr) return Isa::amx;
  if (strcmp(name, "plain") == 0) return Isa::plain;
  if (strcmp(name, "avx2") == 0) return Isa::avx2;
  if (strcmp(name, "avx512") == 0) return Isa::avx512;
  if (strcmp(name, "avx512_bf16") == 0) return Isa::avx512_bf16;
  return Isa::amx;
}

// Null where the compiler could not build that set.
const Kernels* kernels_of(Isa isa) {
  switch (isa) {
#if defined(MII_HAVE_AMX)
    case Isa::amx:
      return &amx::kernels;
#endif
#if defined(MII_HAVE_AVX512_BF16)
    case Isa::avx512_bf16:
      return &avx512_bf16::kernels;
#endif
#if defined(MII_HAVE_AVX512)
    case Isa::avx512:
      return &avx512::kernels;
#endif
#if defined(MII_HAVE_AVX2)
    case Isa::avx2:
      return &avx2::kernels;
#endif
    case Isa::plain:
      return &plain::kernels;
    default:
      return nullptr;
  }
}

Isa choose() {
  int isa = static_cast<int>(detect());
  if (limit() < static_cast<Isa>(isa)) isa = static_cast<int>(limit());
  while (kernels_of(static_cast<Isa>(isa)) == nullptr) --isa;
  return static_cast<Isa>(isa);
}

}  // namespace

Isa active_isa() {
  static const Isa isa = choose();
  return isa;
}

const Kernels& active_kernels() {
  static const Kernels& kernels = *kernels_of(active_isa());
  return kernels;
}

}  // namespace mii::cpu
