// mii_unpack of libmii_cpu.so: argument checks, then the code for the instruction set in use.
#include "gguf.h"

extern "C" int32_t mii_unpack(const MiiUnpack* args, void*) {
  using namespace mii::cpu;
  if (args->dtype != MII_F32 && args->dtype != MII_F16 && args->dtype != MII_BF16)
    return fail(MII_INVALID, "unpack takes dtype codes 0 (float32), 1 (float16) and 2 (bfloat16), not %d", args->dtype);
  switch (active_isa()) {
#if defined(MII_HAVE_AMX)
    case Isa::amx: return amx::unpack(*args);
#endif
#if defined(MII_HAVE_AVX512_BF16)
    case Isa::avx512_bf16: return avx512_bf16::unpack(*args);
#endif
#if defined(MII_HAVE_AVX512)
    case Isa::avx512: return avx512::unpack(*args);
#endif
#if defined(MII_HAVE_AVX2)
    case Isa::avx2: return avx2::unpack(*args);
#endif
    default: return plain::unpack(*args);
  }
}
