// Launchers of sums and gathers over the cards of one host: which code for how many ranks, and how many CTAs.
#include "mii/all_reduce.cuh"

#include "launch.cuh"
#include "mii/abi/ranks.h"
#include "norm_args.cuh"

namespace mii {
namespace {

int64_t half_bytes(const MiiRanks& ranks) { return (ranks.bytes - kPeerHeader) / 2 / kPackBytes * kPackBytes; }
int64_t memory_bytes(int64_t half) { return kPeerHeader + 2 * half; }

int32_t check(const char* name, const MiiRanks& ranks, int32_t shots, int64_t half) {
  MII_REQUIRE(ranks.size >= 2 && ranks.size <= kMostPeers && ranks.rank >= 0 && ranks.rank < ranks.size, MII_INVALID,
              "%s: rank %d of %d; 2 to %d ranks can see one another", name, ranks.rank, ranks.size, kMostPeers);
  MII_REQUIRE(shots == 1 || shots == 2, MII_INVALID, "%s: %d shots; 1 and 2 there are", name, shots);
  return half <= half_bytes(ranks) ? MII_OK
                                   : fail(MII_UNSUPPORTED, "%s: needs %lld bytes of each rank's memory, which has %lld", name,
                                          (long long)memory_bytes(half), (long long)ranks.bytes);
}

template <int Slots>
Peers<Slots> peers_of(const MiiRanks& ranks) {
  Peers<Slots> peers = {};
  for (int r = 0; r < ranks.size; ++r) peers.memory[r] = static_cast<char*>(ranks.memory[r]);
  peers.lost = ranks.lost;
  peers.half = half_bytes(ranks);
  peers.patience = static_cast<uint64_t>(ranks.patience);
  peers.rank = ranks.rank;
  peers.size = ranks.size;
  return peers;
}

template <int Slots>
using Number = std::integral_constant<int, Slots>;

// Calls body with the least number of slots that so many ranks fit in.
template <typename Body>
int32_t dispatch_slots(int size, Body&& body) {
  return size <= 2 ? body(Number<2>{}) : size <= 4 ? body(Number<4>{}) : body(Number<8>{});
}

// As many CTAs as `wanted`, and as are resident at once. The kernel alone decides the latter (and the card, of which a host
// has one kind).
template <typename Args>
int32_t launch_resident(const char* name, void (*kernel)(Args), int most, int64_t wanted, int threads, const MiiRanks& ranks,
                        void* stream, const Args& args) {
  MII_REQUIRE(most > 0, MII_DEVICE, "%s: a CTA of %d threads does not fit on an SM", name, threads);
  const int64_t limit = ranks.ctas > 0 && ranks.ctas < most ? ranks.ctas : most;
  const int64_t ctas = wanted < limit ? wanted : limit;
  return launch(name, kernel, Shape{dim3(static_cast<unsigned>(ctas)), dim3(threads)}, stream, args);
}

template <typename Args>
int resident(void (*kernel)(Args), int threads) {
  int each = 0;
  if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, 0) != cudaSuccess) cudaGetLastError();
  return each * card().sms;
}

// ---- sums -----------------------------------------------------------------------------------------------------------
struct Parts {
  int64_t packs, part, half;
};
Parts parts_of(const MiiAllReduce& a) {
  const int64_t packs = a.count * (a.dtype == MII_F32 ? 4 : 2) / 16;
  const int64_t part = a.shots == 2 ? ceil_div(packs, int64_t(a.ranks.size)) : packs;
  return {packs, part, a.shots * a.ranks.size * part * kPackBytes};
}

template <typename T, int Slots, bool Two>
int32_t all_reduce(const MiiAllReduce& a, const Parts& parts, void* stream) {
  const auto kernel = all_reduce_packs<T, Slots, Two>;
  static const int most = resident(kernel, kSumThreads);
  const SumArgs<T, Slots> args = {peers_of<Slots>(a.ranks), static_cast<T*>(a.x), parts.packs, parts.part};
  const int64_t wanted = ceil_div(parts.part, int64_t(kSumThreads));
  return launch_resident("mii_all_reduce", kernel, most, wanted, kSumThreads, a.ranks, stream, args);
}

// ---- sums with a norm -------------------------------------------------------------------------------------------------
template <typename T, int Slots, int Held, bool Two>
int32_t sum_norm(const MiiRanks& ranks, const NormArgs<T>& norm, int part, void* stream) {
  const auto kernel = all_reduce_norm_rows<T, Slots, Held, Two>;
  const int threads = ceil_div(part, kWarp) * kWarp;
  static const int most = resident(kernel, sum_norm_threads(Slots, Two));
  const SumNormArgs<T, Slots> args = {peers_of<Slots>(ranks), norm, part};
  return launch_resident("mii_all_reduce_norm", kernel, most, norm.rows, threads, ranks, stream, args);
}

template <typename T, int Slots>
int32_t sum_norm_rows(const MiiAllReduceNorm& a, void* stream) {
  const MiiNorm& n = a.norm;
  const int count = static_cast<int>(n.width / kPack<T>);
  const bool two = a.shots == 2;
  const int most = sum_norm_threads(Slots, two), held = two ? a.ranks.size : count <= most ? 1 : count <= 2 * most ? 2 : 4;
  const int part = ceil_div(count, held);
  if (part > most) return fail(MII_UNSUPPORTED, "all_reduce_norm: rows of %lld elements", (long long)n.width);
  const int32_t code = check("all_reduce_norm", a.ranks, a.shots, a.shots * a.ranks.size * n.rows * part * kPackBytes *
                                                                      (two ? 1 : held));
  if (code != MII_OK || n.rows == 0) return code;
  const NormArgs<T> norm = norm_args<T>(n);
  if (two) return sum_norm<T, Slots, Slots, true>(a.ranks, norm, part, stream);
  return held == 1   ? sum_norm<T, Slots, 1, false>(a.ranks, norm, part, stream)
         : held == 2 ? sum_norm<T, Slots, 2, false>(a.ranks, norm, part, stream)
                     : sum_norm<T, Slots, 4, false>(a.ranks, norm, part, stream);
}

int32_t check_norm(const MiiNorm& n) {
  MII_REQUIRE(n.dtype == MII_BF16 || n.dtype == MII_F16, MII_UNSUPPORTED,
              "all_reduce_norm: dtype code %d; but of 16-bit formats the sum and the norm are two kernels", n.dtype);
  MII_REQUIRE(n.rows >= 0 && n.rows <= INT32_MAX && n.width > 0, MII_INVALID, "all_reduce_norm: %lld rows of %lld elements",
              (long long)n.rows, (long long)n.width);
  MII_REQUIRE(n.kind >= MII_RMS && n.kind <= MII_LAYER, MII_INVALID, "all_reduce_norm: kind %d", n.kind);
  MII_REQUIRE(n.residual != nullptr && n.x_weight == nullptr && n.parts == nullptr, MII_INVALID,
              "all_reduce_norm: it takes x, a residual and no x_weight");
  constexpr int kPackWidth = 8;
  // Of shapes, which are the same on every rank; what differs between ranks must not decide.
  if (n.width % kPackWidth != 0 || n.x_stride % kPackWidth != 0 || n.out_stride % kPackWidth != 0 || n.width > (1 << 20)) {
    return fail(MII_UNSUPPORTED, "all_reduce_norm: rows of %lld elements", (long long)n.width);
  }
  const bool all = aligned(n.out, 16) && aligned(n.x, 16) && aligned(n.residual, 16) && aligned(n.weight, 16) &&
                   aligned(n.bias, 16);
  return all ? MII_OK : fail(MII_INVALID, "all_reduce_norm: its tensors must begin at whole 16 bytes");
}

}  // namespace
}  // namespace mii

extern "C" int64_t mii_all_reduce_bytes(const MiiAllReduce* a) { return mii::memory_bytes(mii::parts_of(*a).half); }

extern "C" int32_t mii_all_reduce(const MiiAllReduce* a, void* stream) {
  using namespace mii;
  const Parts parts = parts_of(*a);
  if (const int32_t code = check("all_reduce", a->ranks, a->shots, parts.half); code != MII_OK) return code;
  if (a->count * (a->dtype == MII_F32 ? 4 : 2) % 16 != 0) {
    return fail(MII_UNSUPPORTED, "all_reduce: %lld elements are not whole 16 bytes", (long long)a->count);
  }
  MII_REQUIRE(aligned(a->x, 16), MII_INVALID, "all_reduce: x must begin at whole 16 bytes");
  if (a->count == 0) return MII_OK;
  return dispatch_dtype(a->dtype, [&](auto tag) {
    return dispatch_slots(a->ranks.size, [&](auto slots) {
      using T = decltype(tag);
      return a->shots == 2 ? all_reduce<T, slots(), true>(*a, parts, stream)
                           : all_reduce<T, slots(), false>(*a, parts, stream);
    });
  });
}

extern "C" int32_t mii_all_reduce_norm(const MiiAllReduceNorm* a, void* stream) {
  using namespace mii;
  if (const int32_t code = check_norm(a->norm); code != MII_OK) return code;
  if (const int32_t code = check("all_reduce_norm", a->ranks, a->shots, 0); code != MII_OK) return code;
  return dispatch_slots(a->ranks.size, [&](auto slots) {
    return a->norm.dtype == MII_BF16 ? sum_norm_rows<__nv_bfloat16, slots()>(*a, stream)
                                     : sum_norm_rows<__half, slots()>(*a, stream);
  });
}

extern "C" int64_t mii_all_gather_bytes(const MiiAllGather* a) {
  return mii::memory_bytes(mii::ceil_div(a->ranks.size * a->words * 8, int64_t(mii::kPackBytes)) * mii::kPackBytes);
}

extern "C" int32_t mii_all_gather(const MiiAllGather* a, void* stream) {
  using namespace mii;
  const int64_t half = a->ranks.size * a->words * 8;
  if (const int32_t code = check("all_gather", a->ranks, 1, half); code != MII_OK) return code;
  MII_REQUIRE(aligned(a->x, 4) && aligned(a->out, 4), MII_INVALID, "all_gather: x and out must begin at whole 4 bytes");
  if (a->words == 0) return MII_OK;
  return dispatch_slots(a->ranks.size, [&](auto slots) {
    const auto kernel = all_gather_words<slots()>;
    static const int most = resident(kernel, kSumThreads);
    const GatherArgs<slots()> args = {peers_of<slots()>(a->ranks), static_cast<uint32_t*>(a->out),
                                      static_cast<const uint32_t*>(a->x), a->words};
    const int64_t wanted = ceil_div(a->words, int64_t(kSumThreads));
    return launch_resident("mii_all_gather", kernel, most, wanted, kSumThreads, a->ranks, stream, args);
  });
}
