// What the CPU library's files share: the instruction set chosen at run time, errors, scratch memory, the kernel table.
//
// csrc/cpu/*.cpp       compiled once, with baseline flags: checks arguments, exports the C functions.
// csrc/cpu/isa/*.cpp   compiled once per instruction set with -DMII_ISA=<plain|avx2|avx512|avx512_bf16|amx>; everything
//                      in them is in namespace mii::cpu::MII_ISA, and each set offers one `kernels` table.
// Code under isa/ must not instantiate standard library templates: the linker keeps one copy of an inline function, and
// that one might use instructions which the running processor lacks.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "mii/abi/base.h"

struct MiiActivation;
struct MiiAttention;
struct MiiEmbedding;
struct MiiGather;
struct MiiLinear;
struct MiiLinearPack;
struct MiiMoeCombine;
struct MiiMoeLinear;
struct MiiMoePack;
struct MiiMoeRoute;
struct MiiNorm;
struct MiiRopeKv;
struct MiiSample;
struct MiiUnpack;

namespace mii::cpu {

struct Addends;

enum class Isa : int { plain = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

// The best instruction set that processor, operating system, build and MII_CPU_ISA allow; found once.
Isa active_isa();

// Stores the reason for mii_last_error() of this thread and returns `status`.
int32_t fail(int32_t status, const char* format, ...) __attribute__((format(printf, 2, 3)));

// MII_OK, or the failure with its reason stored.
int32_t check_attention(const MiiAttention& a);

// Memory of this thread, 64-byte aligned, kept and grown between calls; its content does not survive the next call for
// the same purpose. `outer` is for an operation that calls another one while it uses its own.
enum class Scratch : int { inner = 0, outer = 1 };
void* scratch(size_t bytes, Scratch purpose = Scratch::inner);

// Bytes of one element of a MiiDtype.
inline int64_t item_size(int32_t dtype) { return dtype == MII_F32 ? 4 : 2; }

// One entry per operation. Arguments were checked before; a kernel returns MII_OK or MII_UNSUPPORTED.
struct Kernels {
  int32_t (*embedding)(const MiiEmbedding&);
  int32_t (*norm)(const MiiNorm&);
  int32_t (*rope_kv)(const MiiRopeKv&);
  int32_t (*activation)(const MiiActivation&);
  int32_t (*gather)(const MiiGather&);
  int32_t (*attention)(const MiiAttention&);
  int32_t (*linear)(const MiiLinear&);
  int32_t (*linear_pack)(const MiiLinearPack&);
  int64_t (*linear_packed_bytes)(const MiiLinearPack&);
  int32_t (*moe_route)(const MiiMoeRoute&, int64_t tokens);
  int32_t (*moe_linear)(const MiiMoeLinear&, bool gated);
  int32_t (*moe_combine)(const MiiMoeCombine&, int64_t tokens);
  int32_t (*moe_pack)(const MiiMoePack&);
  int64_t (*moe_packed_bytes)(const MiiMoePack&);
  int32_t (*sample_rows)(const MiiSample&, int64_t rows);  // the first ones
  int32_t (*unpack)(const MiiUnpack&);
  void (*add_up)(const Addends&);
};

// The build defines MII_HAVE_<set> for every set that its compiler could do; `plain` is always there.
namespace plain { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512_bf16 { extern const Kernels kernels; }
namespace amx { extern const Kernels kernels; }

const Kernels& active_kernels();

}  // namespace mii::cpu
