// Unpacking of GGUF's quantised blocks for every instruction set; csrc/cpu/gguf.cpp has checked the arguments.
#pragma once
#include "cpu.h"
#include "mii/abi/gguf.h"

namespace mii::cpu {

namespace plain { int32_t unpack(const MiiUnpack& a); }
namespace avx2 { int32_t unpack(const MiiUnpack& a); }
namespace avx512 { int32_t unpack(const MiiUnpack& a); }
namespace avx512_bf16 { int32_t unpack(const MiiUnpack& a); }
namespace amx { int32_t unpack(const MiiUnpack& a); }

}  // namespace mii::cpu
