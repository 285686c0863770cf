// mii_sample and mii_sample_shard of libmii_cuda.so.
#include "launch.cuh"
#include "mii/shard_sampler.cuh"

namespace mii::sampler {
namespace {

// CTAs for a row: few rows are spread wide, many rows keep about 16 thousand tokens for each CTA. Cards newer than
// Hopper run the code of sm_80, which knows no clusters.
int cluster_size_for(int64_t rows, int64_t vocab) {
  if (card().major != 9) return 1;
  const int64_t share = rows <= 16 ? 4096 : 16384;
  int size = 1;
  while (size < kMaxCluster && size * share < vocab) size *= 2;
  return size;
}

// A cluster of the kernel for each row.
template <typename Args>
int32_t launch_rows(const char* name, void (*kernel)(Args), const Args& args, int64_t rows, int64_t vocab, void* stream) {
  const int size = cluster_size_for(rows, vocab);
  Shape shape = {dim3(static_cast<unsigned>(rows * size)), dim3(kThreads)};
  shape.cluster = size;
  return launch(name, kernel, shape, stream, args);
}

int32_t check(const char* name, int64_t vocab) {
  MII_REQUIRE(vocab >= 1 && vocab <= kMaxVocab, MII_INVALID, "%s takes a vocabulary of 1 to %lld, not %lld", name,
              static_cast<long long>(kMaxVocab), static_cast<long long>(vocab));
  return MII_OK;
}

}  // namespace
}  // namespace mii::sampler

extern "C" {

int32_t mii_sample(const MiiSample* args, void* stream) {
  using namespace mii::sampler;
  const MiiSample& a = *args;
  if (const int32_t code = check("sample", a.vocab); code != MII_OK) return code;
  if (a.rows == 0) return MII_OK;
  return mii::dispatch_dtype(a.dtype, [&](auto tag) {
    return launch_rows("sample", sample_kernel<decltype(tag)>, a, a.rows, a.vocab, stream);
  });
}

int32_t mii_sample_shard(const MiiSampleShard* args, void* stream) {
  using namespace mii::sampler;
  const MiiSampleShard& a = *args;
  if (const int32_t code = check("sample_shard", a.sample.vocab); code != MII_OK) return code;
  if (const int32_t code = check("sample_shard", a.whole); code != MII_OK) return code;
  const bool valid = a.gives >= MII_SHARD_BEST && a.gives <= MII_SHARD_TOKEN && a.takes >= 0 && a.takes < a.gives;
  MII_REQUIRE(valid && a.sample.logprobs == nullptr, MII_INVALID, "sample_shard: stage %d cannot follow %d", a.gives, a.takes);
  if (a.rows == 0) return MII_OK;
  if (a.gives == MII_SHARD_TOKEN) {
    const mii::Shape shape = {dim3(static_cast<unsigned>(mii::ceil_div(a.rows, int64_t(mii::kWarp)))), dim3(mii::kWarp)};
    return mii::launch("sample_shard", shard_tokens, shape, stream, a);
  }
  return mii::dispatch_dtype(a.sample.dtype, [&](auto tag) {
    return launch_rows("sample_shard", shard_kernel<decltype(tag)>, a, a.rows, a.sample.vocab, stream);
  });
}

int64_t mii_sample_workspace_bytes(const MiiSample*) { return 0; }

}  // extern "C"
