// The sampler of every instruction set: rows 0 .. rows-1 of arguments that csrc/cpu/sampler.cpp has checked.
#pragma once
#include "cpu.h"
#include "mii/abi/sample.h"

namespace mii::cpu {

namespace plain {
int32_t sample_rows(const MiiSample& a, int64_t rows);
}
namespace avx2 {
int32_t sample_rows(const MiiSample& a, int64_t rows);
}
namespace avx512 {
int32_t sample_rows(const MiiSample& a, int64_t rows);
}
namespace avx512_bf16 {
int32_t sample_rows(const MiiSample& a, int64_t rows);
}
namespace amx {
int32_t sample_rows(const MiiSample& a, int64_t rows);
}

}  // namespace mii::cpu
