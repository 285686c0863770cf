// Launcher of the rotary embedding and KV write: chooses the pack size that heads, pairs and pointers allow.
#include <algorithm>

#include "launch.cuh"
#include "mii/rope_kv.cuh"

namespace mii {
namespace {

// Whether every access can be made in packs of n elements, and a head fits the lanes of one warp (two packs a lane).
template <typename T>
bool packs_fit(const RopeKvArgs<T>& a, int n) {
  const size_t bytes = n * sizeof(T);
  const bool pointers = aligned(a.qkv, bytes) && aligned(a.k_cache, bytes) && aligned(a.v_cache, bytes) &&
                        aligned(a.q_norm, bytes) && aligned(a.k_norm, bytes) && aligned(a.cos_sin, 16);
  const bool pairs = a.rotary_dim % (a.interleaved ? n : 2 * n) == 0;
  return pointers && pairs && a.head_dim % n == 0 && a.qkv_stride % n == 0 && a.head_dim / n <= 2 * kWarp;
}

template <typename T, int N>
int32_t launch_packs(RopeKvArgs<T> args, int64_t tokens, void* stream) {
  const int lanes = ceil_div(args.head_dim / N, 2);
  while ((1 << args.group_bits) < lanes) ++args.group_bits;
  const int64_t wanted = int64_t(args.heads) << args.group_bits;
  const int64_t trips = ceil_div(wanted, int64_t(kRopeThreads));
  const int64_t threads = ceil_div(ceil_div(wanted, trips), int64_t(kWarp)) * kWarp;
  const Shape shape = {dim3(tokens), dim3(threads)};
  if (args.interleaved) return launch("mii_rope_kv", rope_kv_packs<T, N, true>, shape, stream, args);
  return launch("mii_rope_kv", rope_kv_packs<T, N, false>, shape, stream, args);
}

template <typename T>
int32_t rope_kv(const MiiRopeKv& a, void* stream) {
  const bool cached = a.k_cache != nullptr;
  const RopeKvArgs<T> args = {static_cast<T*>(a.qkv),
                              static_cast<T*>(a.k_cache),
                              static_cast<T*>(a.v_cache),
                              a.cos_sin,
                              a.positions,
                              a.kv_slots,
                              static_cast<const T*>(a.q_norm),
                              static_cast<const T*>(a.k_norm),
                              a.qkv_stride,
                              static_cast<int>(a.max_positions),
                              a.q_heads,
                              a.kv_heads,
                              a.head_dim,
                              a.cos_sin == nullptr ? 0 : a.rotary_dim,
                              a.block_size,
                              a.q_heads + (cached ? 2 : 1) * a.kv_heads,
                              0,
                              a.interleaved != 0,
                              1.0f / static_cast<float>(a.head_dim),
                              a.norm_eps,
                              a.norm_kind == MII_RMS_PLUS1 ? 1.0f : 0.0f};
  if (packs_fit(args, kPack<T>)) return launch_packs<T, kPack<T>>(args, a.tokens, stream);
  if (packs_fit(args, 2)) return launch_packs<T, 2>(args, a.tokens, stream);
  const int threads = std::min(256, args.heads * kWarp);
  return launch("mii_rope_kv", rope_kv_any<T>, Shape{dim3(a.tokens), dim3(threads)}, stream, args);
}

int32_t check(const MiiRopeKv& a) {
  MII_REQUIRE(a.tokens >= 0 && a.tokens <= INT32_MAX, MII_INVALID, "rope_kv: %lld tokens", (long long)a.tokens);
  MII_REQUIRE(a.q_heads > 0 && a.kv_heads >= 0 && a.head_dim > 0, MII_INVALID,
              "rope_kv: %d query and %d KV heads of %d", a.q_heads, a.kv_heads, a.head_dim);
  const bool rotates = a.cos_sin != nullptr;
  MII_REQUIRE(!rotates || (a.rotary_dim > 0 && a.rotary_dim % 2 == 0 && a.rotary_dim <= a.head_dim), MII_INVALID,
              "rope_kv: rotary dimension %d of a head of %d", a.rotary_dim, a.head_dim);
  MII_REQUIRE(!rotates || (a.positions != nullptr && a.max_positions > 0 && a.max_positions <= INT32_MAX), MII_INVALID,
              "rope_kv: a rotation needs positions and a table of at least one row");
  MII_REQUIRE(int64_t(a.q_heads + 2 * int64_t(a.kv_heads)) * a.head_dim <= INT32_MAX, MII_UNSUPPORTED,
              "rope_kv: %d query and %d KV heads of %d", a.q_heads, a.kv_heads, a.head_dim);
  MII_REQUIRE((a.k_cache == nullptr) == (a.v_cache == nullptr), MII_INVALID,
              "rope_kv: one of the two caches is missing");
  MII_REQUIRE(a.k_cache == nullptr || (a.kv_slots != nullptr && a.block_size > 0), MII_INVALID,
              "rope_kv: a cache needs kv_slots and a block size above 0, given %d", a.block_size);
  MII_REQUIRE(a.norm_kind == MII_RMS || a.norm_kind == MII_RMS_PLUS1, MII_INVALID, "rope_kv: norm kind %d",
              a.norm_kind);
  return MII_OK;
}

}  // namespace
}  // namespace mii

extern "C" int32_t mii_rope_kv(const MiiRopeKv* a, void* stream) {
  using namespace mii;
  if (a->tokens == 0) return MII_OK;  // the tensors of no tokens may have null addresses
  if (const int32_t code = check(*a); code != MII_OK) return code;
  return dispatch_dtype(a->dtype, [&](auto tag) { return rope_kv<decltype(tag)>(*a, stream); });
}
