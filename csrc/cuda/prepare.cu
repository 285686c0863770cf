// Launcher of the step preparation: one CTA, as many threads as there is work.
#include <algorithm>

#include "launch.cuh"
#include "mii/prepare.cuh"

extern "C" int32_t mii_prepare(const MiiPrepare* a, void* stream) {
  using namespace mii;
  const bool sizes = a->max_seqs > 0 && a->max_tokens >= 0 && a->max_updates >= 0 && a->max_blocks > 0 &&
                     a->max_seqs < (1 << 28) && a->max_tokens < (1 << 28) && a->max_updates < (1 << 28);
  MII_REQUIRE(sizes, MII_INVALID, "prepare: %lld sequences, %lld tokens, %lld updates, %lld blocks",
              (long long)a->max_seqs, (long long)a->max_tokens, (long long)a->max_updates, (long long)a->max_blocks);
  MII_REQUIRE(a->block_size > 0, MII_INVALID, "prepare: block size %d", a->block_size);
  const int64_t work = std::max({a->max_tokens, a->max_seqs, std::min<int64_t>(a->max_updates, 256)});
  const int threads = static_cast<int>(std::min<int64_t>(1024, ceil_div(work, int64_t(kWarp)) * kWarp));
  const size_t shared = sizeof(int32_t) * (3 * a->max_seqs + 1);
  if (shared > 48 * 1024) return launch("mii_prepare", prepare_step<false>, Shape{1, dim3(threads)}, stream, *a);
  return launch("mii_prepare", prepare_step<true>, Shape{1, dim3(threads), shared}, stream, *a);
}
