// Launchers of sums whose numbers the copy engines carry, and of the copies.
#include "mii/copied_sum.cuh"

#include <cuda.h>

#include "driver.cuh"
#include "launch.cuh"
#include "mii/abi/ranks.h"
#include "norm_args.cuh"

namespace mii {
namespace {

int32_t check(const char* name, const MiiRanks& ranks, int64_t place, int64_t bytes) {
  MII_REQUIRE(ranks.size == 2 && (ranks.rank == 0 || ranks.rank == 1), MII_INVALID, "%s: rank %d of %d; it takes two ranks",
              name, ranks.rank, ranks.size);
  MII_REQUIRE(place >= ranks.bytes && place % kPackBytes == 0, MII_INVALID,
              "%s: %lld bytes into a memory of which %lld are not for copies", name, (long long)place, (long long)ranks.bytes);
  return bytes % kPackBytes == 0 ? MII_OK : fail(MII_UNSUPPORTED, "%s: %lld bytes are not whole 16", name, (long long)bytes);
}

int32_t check(const char* name, const MiiCopiedSum& a) {
  MII_REQUIRE(aligned(a.x, kPackBytes), MII_INVALID, "%s: x must begin at whole 16 bytes", name);
  return check(name, a.ranks, a.place, a.count * (a.dtype == MII_F32 ? 4 : 2));
}

template <typename T>
Copied<T> copied_of(const MiiRanks& ranks, int64_t place, int32_t round) {
  char* memory = static_cast<char*>(ranks.memory[ranks.rank]);
  return {reinterpret_cast<const T*>(memory + place),    memory, ranks.lost, static_cast<uint64_t>(ranks.patience),
          static_cast<uint32_t>(round), 1 - ranks.rank};
}

template <typename T, int Packs>
int32_t sum_norm(const MiiCopiedSumNorm& a, void* stream) {
  const int count = static_cast<int>(a.norm.width / kPack<T>);
  const Shape shape = {dim3(a.norm.rows), dim3(ceil_div(ceil_div(count, Packs), kWarp) * kWarp)};
  return launch("mii_copied_sum_norm", copied_sum_norm_rows<T, Packs>, shape, stream,
                copied_of<T>(a.ranks, a.place, a.round), norm_args<T>(a.norm));
}

template <typename T>
int32_t sum_norm(const MiiCopiedSumNorm& a, void* stream) {
  const int64_t count = a.norm.width / kPack<T>;
  return count <= 1024 ? sum_norm<T, 2>(a, stream) : sum_norm<T, 4>(a, stream);
}

int32_t check_norm(const MiiNorm& n) {
  MII_REQUIRE(n.rows >= 0 && n.rows <= INT32_MAX && n.width > 0, MII_INVALID, "copied_sum_norm: %lld rows of %lld elements",
              (long long)n.rows, (long long)n.width);
  MII_REQUIRE(n.kind >= MII_RMS && n.kind <= MII_LAYER, MII_INVALID, "copied_sum_norm: kind %d", n.kind);
  MII_REQUIRE(n.residual != nullptr && n.x_weight == nullptr && n.parts == nullptr && n.x_stride == n.width, MII_INVALID,
              "copied_sum_norm: it takes contiguous rows, a residual and no x_weight");
  const bool fits = n.dtype != MII_F32 && n.width % 8 == 0 && n.width / 8 <= 4 * norm_threads(4, false);
  const bool all = n.out_stride % 8 == 0 && aligned(n.out, 16) && aligned(n.x, 16) && aligned(n.residual, 16) &&
                   aligned(n.weight, 16) && aligned(n.bias, 16);
  return fits && all ? MII_OK
                     : fail(MII_UNSUPPORTED, "copied_sum_norm: dtype code %d, rows of %lld elements", n.dtype,
                            (long long)n.width);
}

decltype(&cuStreamWriteValue32) word_writer() {
  static const auto found = reinterpret_cast<decltype(&cuStreamWriteValue32)>(driver_function("cuStreamWriteValue32", 12000));
  return found;
}

}  // namespace
}  // namespace mii

extern "C" int32_t mii_send_copy(const MiiCopiedSum* a, void* stream) {
  using namespace mii;
  if (const int32_t code = check("send_copy", *a); code != MII_OK) return code;
  const auto write_word = word_writer();
  if (write_word == nullptr) return fail(MII_UNSUPPORTED, "send_copy: the driver cannot write words in a stream's order");
  char* theirs = static_cast<char*>(a->ranks.memory[1 - a->ranks.rank]);
  const size_t bytes = a->count * (a->dtype == MII_F32 ? 4 : 2);
  const auto copies = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaMemcpyAsync(theirs + a->place, a->x, bytes, cudaMemcpyDefault, copies);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return fail(MII_DEVICE, "send_copy: CUDA error %d (%s)", static_cast<int>(error), cudaGetErrorString(error));
  }
  // With the barrier that is its default: the copy is there before the word.
  const CUresult result = write_word(copies, reinterpret_cast<CUdeviceptr>(theirs + kCopiedAt), a->round,
                                     CU_STREAM_WRITE_VALUE_DEFAULT);
  return result == CUDA_SUCCESS ? MII_OK : fail(MII_DEVICE, "send_copy: cuStreamWriteValue32: error %d", result);
}

extern "C" int32_t mii_copied_sum(const MiiCopiedSum* a, void* stream) {
  using namespace mii;
  if (const int32_t code = check("copied_sum", *a); code != MII_OK) return code;
  return dispatch_dtype(a->dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t packs = a->count / kPack<T>;
    const Shape shape = {dim3(ceil_div(packs, int64_t(kCopiedSumThreads))), dim3(kCopiedSumThreads)};
    return launch("mii_copied_sum", copied_sum_packs<T>, shape, stream, copied_of<T>(a->ranks, a->place, a->round),
                  static_cast<T*>(a->x), packs);
  });
}

extern "C" int32_t mii_copied_sum_norm(const MiiCopiedSumNorm* a, void* stream) {
  using namespace mii;
  if (const int32_t code = check_norm(a->norm); code != MII_OK) return code;
  if (const int32_t code = check("copied_sum_norm", a->ranks, a->place, 0); code != MII_OK) return code;
  return a->norm.dtype == MII_BF16 ? sum_norm<__nv_bfloat16>(*a, stream) : sum_norm<__half>(*a, stream);
}
