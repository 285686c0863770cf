// What a kernel does for the one after it once its own memory traffic is done.
#pragma once
#include "mii/bulk_copy.cuh"

namespace mii {

// Brings this CTA's share of what comes next into the L2 cache, about `a.next_fetch` of `a.next_bytes` over all CTAs, in pieces
// of 4 KB that `Threads` threads deal out. Once all of the CTA's own has landed: before, it would be in its way.
template <int Threads, typename Args>
MII_DEVICE void prefetch_next(const Args& a, unsigned thread) {
  const int64_t start = a.next_bytes / 16 * blockIdx.x / gridDim.x * 16;
  const int64_t stop = min(a.next_bytes / 16 * 16, start + a.next_fetch / gridDim.x / 4096 * 4096);
  for (int64_t at = start + thread * 4096; at < stop; at += Threads * 4096) {
    bulk_prefetch(a.next + at, static_cast<int>(min(int64_t(4096), stop - at)));
  }
}

}  // namespace mii
