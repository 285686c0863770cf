// mii_unpack of libmii_cpu.so: argument checks, then the code for the instruction set in use.
#include "cpu.h"
#include "mii/abi/gguf.h"

extern "C" int32_t mii_unpack(const MiiUnpack* args, void*) {
  using namespace mii::cpu;
  if (args->dtype != MII_F32 && args->dtype != MII_F16 && args->dtype != MII_BF16)
    return fail(MII_INVALID, "unpack takes dtype codes 0 (float32), 1 (float16) and 2 (bfloat16), not %d", args->dtype);
  return active_kernels().unpack(*args);
}
