// The exported C functions of libmii_cpu.so: argument checks, then the kernel table of the chosen instruction set.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "cpu.h"
#include "mii/abi.h"

namespace mii::cpu {
namespace {

thread_local char last_error[512] = "";

struct Memory {
  void* data = nullptr;
  size_t size = 0;
  ~Memory() { free(data); }
};
thread_local Memory thread_memory[2];

bool known_dtype(int32_t dtype) { return dtype == MII_F32 || dtype == MII_F16 || dtype == MII_BF16; }

int32_t bad_dtype(const char* operation, int32_t dtype) {
  return fail(MII_INVALID, "%s takes dtype codes 0 (float32), 1 (float16) and 2 (bfloat16), not %d", operation, dtype);
}

int32_t check_pack(const MiiLinearPack& a) {
  if (!known_dtype(a.dtype)) return bad_dtype("linear_pack", a.dtype);
  if (a.in_features <= 0 || a.out_features <= 0)
    return fail(MII_INVALID, "linear_pack needs positive sizes; got in_features %lld, out_features %lld",
                static_cast<long long>(a.in_features), static_cast<long long>(a.out_features));
  return MII_OK;
}

}  // namespace

int32_t check_attention(const MiiAttention& a) {
  if (!known_dtype(a.dtype)) return bad_dtype("attention", a.dtype);
  if (a.head_dim <= 0 || a.kv_heads <= 0 || a.q_heads <= 0 || a.q_heads % a.kv_heads != 0)
    return fail(MII_INVALID,
                "attention needs q_heads to be a multiple of kv_heads and a head_dim above 0; got %d, %d, %d",
                a.q_heads, a.kv_heads, a.head_dim);
  if (a.block_size <= 0 || (a.block_size & (a.block_size - 1)) != 0)
    return fail(MII_INVALID, "attention needs a block_size that is a power of two, not %d", a.block_size);
  return MII_OK;
}

int32_t fail(int32_t status, const char* format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(last_error, sizeof last_error, format, values);
  va_end(values);
  return status;
}

void* scratch(size_t bytes, Scratch purpose) {
  Memory& own = thread_memory[static_cast<int>(purpose)];
  if (own.size < bytes) {
    free(own.data);
    const size_t page = bytes < (1 << 20) ? 4096 : 2 << 20;
    own.size = (bytes + page - 1) / page * page;
    own.data = aligned_alloc(page, own.size);
    if (own.data == nullptr) abort();  // a few MiB at most: nothing sensible is left to do without them
    if (page > 4096) madvise(own.data, own.size, MADV_HUGEPAGE);
  }
  return own.data;
}

}  // namespace mii::cpu

using namespace mii::cpu;

extern "C" {

int32_t mii_prepare(const MiiPrepare* args, void*) {
  const MiiPrepare& a = *args;
  const int32_t seqs = a.counts[MII_NUM_SEQS], tokens = a.counts[MII_NUM_TOKENS], samples = a.counts[MII_NUM_SAMPLES];
  if (a.block_size <= 0) return fail(MII_INVALID, "prepare needs a positive block_size, not %d", a.block_size);
  for (int32_t u = 0; u < a.counts[MII_NUM_UPDATES]; ++u) {
    const int32_t* triple = a.table_updates + 3 * u;
    a.block_table[triple[0] * a.max_blocks + triple[1]] = triple[2];
  }
  for (int32_t s = 0; s < seqs; ++s) {
    const int32_t slot = a.seq_slot[s], first = a.q_start[s], last = a.q_start[s + 1];
    const int32_t* table = a.block_table + slot * a.max_blocks;
    for (int32_t t = first; t < last; ++t) {
      const int32_t position = a.kv_len[s] - (last - t);
      a.ids[t] = a.host_ids[t] >= 0 ? a.host_ids[t] : a.last_token[slot];
      a.positions[t] = position;
      if (a.rope_shift != nullptr) a.rope_rows[t] = position + a.rope_shift[s];
      a.kv_slots[t] = table[position / a.block_size] * a.block_size + position % a.block_size;
    }
  }
  for (int64_t t = tokens; t < a.max_tokens; ++t) a.ids[t] = a.positions[t] = 0, a.kv_slots[t] = -1;
  if (a.rope_shift != nullptr)
    for (int64_t t = tokens; t < a.max_tokens; ++t) a.rope_rows[t] = 0;
  for (int32_t i = 0; i < samples; ++i) {
    const int32_t s = a.sample_seq[i];
    a.sample_rows[i] = a.q_start[s + 1] - 1;
    a.sample_slots[i] = a.seq_slot[s];
    a.sample_positions[i] = a.kv_len[s];
  }
  for (int64_t i = samples; i < a.max_seqs; ++i) a.sample_rows[i] = a.sample_positions[i] = 0, a.sample_slots[i] = -1;
  return MII_OK;
}

int32_t mii_embedding(const MiiEmbedding* args, void*) {
  if (!known_dtype(args->dtype)) return bad_dtype("embedding", args->dtype);
  return active_kernels().embedding(*args);
}

int32_t mii_norm(const MiiNorm* args, void*) {
  if (!known_dtype(args->dtype)) return bad_dtype("norm", args->dtype);
  if (args->kind < MII_RMS || args->kind > MII_LAYER)
    return fail(MII_INVALID, "norm takes kind 0 (RMS), 1 (RMS with 1 + weight) or 2 (layer), not %d", args->kind);
  if (args->x_weight != nullptr && (args->residual == nullptr || args->kind == MII_LAYER))
    return fail(MII_INVALID, "norm takes an x_weight with a residual and an RMS kind only");
  if (args->parts != nullptr) return fail(MII_UNSUPPORTED, "norm takes x whole here, not in parts");
  return active_kernels().norm(*args);
}

int32_t mii_rope_kv(const MiiRopeKv* args, void*) {
  if (!known_dtype(args->dtype)) return bad_dtype("rope_kv", args->dtype);
  if (args->rotary_dim % 2 != 0 || args->rotary_dim > args->head_dim)
    return fail(MII_INVALID, "rope_kv needs an even rotary_dim of at most head_dim (%d), not %d", args->head_dim,
                args->rotary_dim);
  return active_kernels().rope_kv(*args);
}

int32_t mii_attention(const MiiAttention* args, void*) {
  const int32_t status = check_attention(*args);
  return status != MII_OK ? status : active_kernels().attention(*args);
}

int32_t mii_activation(const MiiActivation* args, void*) {
  if (!known_dtype(args->dtype)) return bad_dtype("activation", args->dtype);
  if (args->kind < MII_SILU || args->kind > MII_SOFTCAP)
    return fail(MII_INVALID, "activation takes kinds 0 to %d, not %d", MII_SOFTCAP, args->kind);
  return active_kernels().activation(*args);
}

int32_t mii_gather(const MiiGather* args, void*) {
  if (!known_dtype(args->dtype)) return bad_dtype("gather", args->dtype);
  return active_kernels().gather(*args);
}

int32_t mii_linear(const MiiLinear* args, void*) {
  if (!known_dtype(args->dtype)) return bad_dtype("linear", args->dtype);
  return active_kernels().linear(*args);
}

int32_t mii_linear_pack(const MiiLinearPack* args, void*) {
  const int32_t status = check_pack(*args);
  return status != MII_OK ? status : active_kernels().linear_pack(*args);
}

int64_t mii_linear_packed_bytes(const MiiLinearPack* args) { return active_kernels().linear_packed_bytes(*args); }

int32_t mii_run(const MiiRun* args, void* stream) {
  for (int64_t i = 0; i < args->count; ++i)
    if (const int32_t status = args->calls[i].function(args->calls[i].args, stream); status != MII_OK) return status;
  return MII_OK;
}

const char* mii_last_error(void) { return last_error; }

const char* mii_build_info(void) {
  static const char* const names[] = {"plain", "avx2", "avx512", "avx512_bf16", "amx"};
  thread_local char text[128];
  const char* built =
      "plain"
#if defined(MII_HAVE_AVX2)
      " avx2"
#endif
#if defined(MII_HAVE_AVX512)
      " avx512"
#endif
#if defined(MII_HAVE_AVX512_BF16)
      " avx512_bf16"
#endif
#if defined(MII_HAVE_AMX)
      " amx"
#endif
      ;
  snprintf(text, sizeof text, "cpu; gcc %s; built for %s; using %s", __VERSION__, built,
           names[static_cast<int>(active_isa())]);
  return text;
}

int64_t mii_struct_size(const char* name) {
#define MII_SIZE(type) \
  if (strcmp(name, #type) == 0) return sizeof(type)
  MII_SIZE(MiiPrepare);
  MII_SIZE(MiiEmbedding);
  MII_SIZE(MiiNorm);
  MII_SIZE(MiiRopeKv);
  MII_SIZE(MiiAttention);
  MII_SIZE(MiiActivation);
  MII_SIZE(MiiGather);
  MII_SIZE(MiiSample);
  MII_SIZE(MiiLinear);
  MII_SIZE(MiiLinearPack);
  MII_SIZE(MiiMoeRoute);
  MII_SIZE(MiiMoeLinear);
  MII_SIZE(MiiMoeCombine);
  MII_SIZE(MiiMoePack);
  MII_SIZE(MiiUnpack);
  MII_SIZE(MiiAllReduce);
  MII_SIZE(MiiAllGather);
  MII_SIZE(MiiCall);
  MII_SIZE(MiiRun);
#undef MII_SIZE
  return 0;
}

}  // extern "C"
