// mii_sample of libmii_cpu.so: argument checks, then the code for the instruction set in use.
#include "cpu.h"
#include "mii/abi/sample.h"
#include "mii/sampling.h"

namespace mii::cpu {
namespace {

int32_t check(const MiiSample& a) {
  if (a.dtype != MII_F32 && a.dtype != MII_F16 && a.dtype != MII_BF16)
    return fail(MII_INVALID, "sample takes dtype codes 0 (float32), 1 (float16) and 2 (bfloat16), not %d", a.dtype);
  if (a.vocab < 1 || a.vocab > kMaxVocab)
    return fail(MII_INVALID, "sample takes a vocabulary of 1 to %lld, not %lld", static_cast<long long>(kMaxVocab),
                static_cast<long long>(a.vocab));
  return MII_OK;
}

}  // namespace
}  // namespace mii::cpu

extern "C" {

int32_t mii_sample(const MiiSample* args, void*) {
  using namespace mii::cpu;
  const int32_t status = check(*args);
  if (status != MII_OK) return status;
  int64_t rows = args->rows;
  if (args->counts != nullptr && args->counts[MII_NUM_SAMPLES] < rows) rows = args->counts[MII_NUM_SAMPLES];
  return active_kernels().sample_rows(*args, rows);
}

int64_t mii_sample_workspace_bytes(const MiiSample*) { return 0; }

}  // extern "C"
