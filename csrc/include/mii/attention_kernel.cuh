// The attention kernel: one launch for a step's prompts, chunks and single tokens, as many CTAs as fit on the card.
#pragma once
#include "mii/attention_decode.cuh"
#include "mii/attention_prefill.cuh"

namespace mii {

// Shared memory of a CTA without SharedNotes such that two fit on a multiprocessor: 228 KiB for sm_90, 164 KiB for
// sm_80.
constexpr int kNotesBytes = 1024;
constexpr int kLargeBudget = 228 * 1024 / 2 - 1024 - kNotesBytes;
constexpr int kSmallBudget = 164 * 1024 / 2 - 1024 - kNotesBytes;
static_assert(sizeof(SharedNotes) <= kNotesBytes);

template <int D, int kBudget>
constexpr int attention_shared() {
  constexpr int kDecode = DecodeShape<D, kBudget>::kShared, kPrefill = PrefillShape<D, kBudget>::kShared;
  return (kDecode > kPrefill ? kDecode : kPrefill) + kNotesBytes;
}

template <typename T, int D, bool kExtras, int kBudget>
MII_DEVICE void attend(const AttentionParams& p, unsigned char* shared) {
  SharedNotes* notes = reinterpret_cast<SharedNotes*>(shared + attention_shared<D, kBudget>() - kNotesBytes);
  start_next();
  if (load_planned(p.work.header).items > 0) wait_for_previous();
  if (threadIdx.x == 0) Queue::enter(p, notes);
  for (__syncthreads(); notes->kind >= 0; __syncthreads()) {
    const int thread = thread_in_cta();
    if (notes->kind == Queue::kPrefill) {
      prefill_item<T, D, kExtras, kBudget>(p, notes->number, thread, shared, notes);
    } else {
      decode_chunks<T, D, kExtras, kBudget>(p, notes->number, thread, shared, notes, StoredTokens());
    }
    __syncthreads();  // the shared memory of this work is free
    if (threadIdx.x == 0) Queue::next(p, notes);
  }
  wait_for_previous();  // of those who had nothing to do
}

// A step in which every sequence has one query token or none, taken as their product left it (attention_new.cuh).
template <typename T, int D, int kBudget>
MII_DEVICE void attend_new(const DecodeAttentionParams& n, unsigned char* shared) {
  SharedNotes* notes = reinterpret_cast<SharedNotes*>(shared + attention_shared<D, kBudget>() - kNotesBytes);
  decode_chunks<T, D, false, kBudget>(n.p, blockIdx.x, threadIdx.x, shared, notes, NewTokens<T, D>(n));
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kDeviceBudget = kSmallBudget;
#else
constexpr int kDeviceBudget = kLargeBudget;
#endif

template <typename T, int D, bool kExtras>
__global__ void __launch_bounds__(kAttentionThreads, 2) attention_kernel(const __grid_constant__ AttentionParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  attend<T, D, kExtras, kDeviceBudget>(p, shared);
}

template <typename T, int D>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    decode_attention_kernel(const __grid_constant__ DecodeAttentionParams n) {
  extern __shared__ __align__(128) unsigned char shared[];
  attend_new<T, D, kDeviceBudget>(n, shared);
}

}  // namespace mii
