// Launchers of the mixture of experts.
#include <algorithm>

#include "launch.cuh"
#include "mii/moe_combine.cuh"
#include "mii/moe_few.cuh"
#include "mii/moe_gather.cuh"
#include "mii/moe_mma.cuh"
#include "mii/moe_route.cuh"
#include "mii/moe_stream.cuh"
#include "mii/moe_wide.cuh"
#include "shared_memory.cuh"
#include "tensor_map.cuh"
#include "wide_gate.cuh"

namespace mii {
namespace {

constexpr int kMostStreamedRows = 64;  // of a tile of the stream

// Partial sums of the stream: two places for each CTA.
int64_t moe_partial_sums(int tile_rows) { return int64_t(card().sms) * 2 * (tile_rows / 8) * kMoeThreads; }

// Tokens of a CTA: so few that every multiprocessor has some.
int route_chunk(int64_t tokens) {
  int chunk = kLeastChunk;
  while (chunk < kMostChunk && ceil_div(tokens, int64_t(chunk)) > card().sms) chunk *= 2;
  return chunk;
}

template <typename T, int N>
int32_t launch_route(const MiiMoeRoute& a, void* stream) {
  const int chunk = route_chunk(a.tokens);
  const MoeRouteArgs<T> args = {a.chosen,
                                a.weights,
                                a.offsets,
                                a.pairs,
                                a.places,
                                reinterpret_cast<int4*>(a.tiles),
                                static_cast<const T*>(a.logits),
                                a.bias,
                                a.counts,
                                static_cast<uint32_t*>(a.workspace),
                                a.logits_stride,
                                static_cast<int>(a.tokens),
                                chunk,
                                a.experts,
                                a.top_k,
                                a.scoring,
                                a.renormalise,
                                a.tile_rows,
                                a.groups,
                                a.top_groups,
                                a.scale};
  const Shape shape = {dim3(static_cast<unsigned>(ceil_div(a.tokens, int64_t(chunk)))), dim3(kRouteThreads)};
  const int32_t status = launch("mii_moe_route", moe_route<T, N>, shape, stream, args);
  if (status != MII_OK || shape.grid.x == 1) return status;
  return launch("mii_moe_route (place)", moe_place<T>, shape, stream, args);
}

template <typename T>
int32_t route(const MiiMoeRoute& a, void* stream) {
  if (a.experts <= 32) return launch_route<T, 1>(a, stream);
  if (a.experts <= 64) return launch_route<T, 2>(a, stream);
  if (a.experts <= 128) return launch_route<T, 4>(a, stream);
  if (a.experts <= 256) return launch_route<T, 8>(a, stream);
  return launch_route<T, 16>(a, stream);
}

template <typename T>
MoeArgs<T> moe_args(const MiiMoeLinear& a) {
  return {static_cast<T*>(a.out),
          static_cast<const T*>(a.x),
          static_cast<const T*>(a.weight),
          a.pair_weights,
          a.pairs,
          reinterpret_cast<const int4*>(a.tiles),
          a.x_stride,
          a.out_stride,
          static_cast<int>(a.out_features),
          static_cast<int>(a.in_features),
          a.top_k,
          a.activation};
}

template <typename T, bool Up>
int32_t launch_simple(const MiiMoeLinear& a, void* stream) {
  const Shape shape = {dim3(card().sms * 4), dim3(kSimpleThreads)};
  return launch("mii_moe (simple)", moe_simple<T, Up>, shape, stream, moe_args<T>(a));
}

template <typename T, bool Up>
int32_t launch_mma(const MiiMoeLinear& a, void* stream) {
  constexpr int kShared = MoeMmaShape::kSharedBytes;
  if (const int32_t status = grant_shared<moe_mma<T, Up>>("mii_moe", kShared); status != MII_OK) return status;
  const Shape shape = {dim3(card().sms * 2), dim3(MoeMmaShape::kThreads), kShared};
  MoeArgs<T> args = moe_args<T>(a);
  args.tile_parts = ceil_div(a.tile_rows, kMoeTileRows);
  return launch("mii_moe (mma)", moe_mma<T, Up>, shape, stream, args);
}

template <typename T, bool Up>
int32_t launch_wide(const MiiMoeLinear& a, WideGate gate, void* stream) {
  constexpr int kShared = MoeWideShape::kSharedBytes, kWeightRows = MoeWideShape::kHalf;
  if (const int32_t status = grant_shared<moe_wide<T, Up>>("mii_moe", kShared); status != MII_OK) return status;
  MoeWideArgs<T> args = {{}, {}, moe_args<T>(a), gate};
  const void* x = Up ? a.gathered : a.x;
  const int64_t rows = int64_t(a.experts) * (Up ? 2 : 1) * a.out_features, x_stride = Up ? a.gathered_stride : a.x_stride;
  const bool mapped = encode_matrix(&args.weight, a.dtype, a.weight, rows, a.in_features, a.in_features, kWeightRows) &&
                      encode_rows(&args.x, a.dtype, x, a.tokens * a.top_k, a.in_features, x_stride, args.kBoxRows);
  MII_REQUIRE(mapped, MII_UNSUPPORTED, "mii_moe: the driver makes no tensor map of this product");
  if constexpr (Up) {
    const Shape shape = {dim3(card().sms * kGatherCtas), dim3(kGatherThreads)};
    const MoeGatherArgs<T> gather = {static_cast<T*>(a.gathered), args.moe.x, a.places, args.moe.tiles, a.gathered_stride,
                                     a.x_stride, args.moe.k, a.top_k};
    const int32_t status = launch("mii_moe (gather)", moe_gather<T>, shape, stream, gather);
    if (status != MII_OK) return status;
  }
  const Shape shape = {dim3(card().sms), dim3(MoeWideShape::kThreads), kShared};
  return launch("mii_moe (wide)", moe_wide<T, Up>, shape, stream, args);
}

template <typename T, bool Up>
int32_t product_16_bit(const MiiMoeLinear& a, void* stream) {
  WideGate gate = {};
  const bool gathers = a.gathered != nullptr && a.top_k <= kMostChoices;
  const bool takes = !Up || (gathers && gate_of(a.activation, &gate));
  if (a.kernel == MII_MOE_WGMMA && takes) return launch_wide<T, Up>(a, gate, stream);
  return launch_mma<T, Up>(a, stream);
}

int32_t check_sizes(const char* name, int64_t pairs, int64_t out_features, int64_t in_features) {
  MII_REQUIRE(pairs < (int64_t(1) << 31) && in_features < (int64_t(1) << 30) && out_features < (int64_t(1) << 30),
              MII_UNSUPPORTED, "%s: %lld pairs of %lld x %lld are too many", name, static_cast<long long>(pairs),
              static_cast<long long>(out_features), static_cast<long long>(in_features));
  return MII_OK;
}

int32_t check_moe(const char* name, const MiiMoeLinear& a) {
  MII_REQUIRE(a.kernel == MII_MOE_SIMPLE || a.kernel == MII_MOE_MMA || a.kernel == MII_MOE_WGMMA, MII_UNSUPPORTED,
              "%s: kernel %d", name, a.kernel);
  const int32_t status = check_sizes(name, a.tokens * a.top_k, a.out_features, a.in_features);
  if (status != MII_OK) return status;
  if (a.kernel == MII_MOE_SIMPLE) return MII_OK;
  MII_REQUIRE(a.dtype == MII_BF16 || a.dtype == MII_F16, MII_UNSUPPORTED, "%s: tensor cores take 16-bit formats", name);
  const bool steps = a.in_features % 8 == 0 && a.x_stride % 8 == 0 && a.in_features > 0;
  MII_REQUIRE(steps && aligned(a.x, 16) && aligned(a.weight, 16), MII_UNSUPPORTED,
              "%s: rows of x and weight must be whole chunks of 16 bytes", name);
  MII_REQUIRE(a.gathered == nullptr || (a.gathered_stride % 8 == 0 && aligned(a.gathered, 16)), MII_INVALID,
              "%s: room for gathered rows must be whole chunks of 16 bytes", name);
  const int rows = a.kernel == MII_MOE_WGMMA ? kMoeWideRows : kMoeTileRows;
  MII_REQUIRE(a.tile_rows == rows, MII_INVALID, "%s: tiles of %d rows; kernel %d takes %d", name, a.tile_rows, a.kernel,
              rows);
  MII_REQUIRE(a.kernel != MII_MOE_WGMMA || (card().major == 9 && card().minor == 0), MII_UNSUPPORTED,
              "%s: warpgroup products are those of compute capability 9.0", name);
  return MII_OK;
}

// A workspace begins with this many ints, the counters of tiles, that of the grid and (two) that of launches; partial sums
// follow, and results of the first product.
constexpr int kMoeCounters = kMoeMostCtas + 4;

template <typename T, int Tokens, MoePart Part>
int32_t launch_stream(const MoeStreamArgs<T>& args, void* stream) {
  using Stream = MoeStreamShape<Tokens>;
  constexpr auto kernel = moe_stream<T, Tokens, Part>;
  const bool hopper = card().major == 9 && card().minor == 0;  // of another one this library holds the code of 8.0
  const int shared = Stream::stages(hopper ? kMoeRingBytes : kMoeSmallRingBytes) * Stream::kStageBytes;
  if (const int32_t status = grant_shared<kernel>("mii_moe_stream", shared); status != MII_OK) return status;
  const Shape shape = {dim3(card().sms), dim3(kMoeThreads), static_cast<size_t>(shared)};
  return launch("mii_moe_stream", kernel, shape, stream, args);
}

// Whether moe_few takes these products: by their sizes, and by what the driver makes of their weights.
template <typename T>
bool takes_few(const MiiMoeStream& a, MoeFewArgs<T>* args) {
  if (card().major != 9 || card().minor != 0 || a.width % kFewPanel != 0 || a.in_features % kFewPanel != 0) return false;
  if (a.tokens * a.top_k * a.width / 2 * int64_t(sizeof(uint64_t)) > kFewResultBytes) return false;
  const int64_t up_rows = 2 * a.experts * a.width, down_rows = a.experts * a.in_features;
  return encode_panels(&args->up_weight, a.dtype, a.up, up_rows, a.in_features, kFewTileRows / 2, kFewPanels) &&
         encode_panels(&args->down_weight, a.dtype, a.down, down_rows, a.width, kFewTileRows, kFewPanels);
}

template <typename T>
int32_t launch_few(const MoeFewArgs<T>& args, void* stream) {
  const int32_t status = grant_shared<moe_few<T>>("mii_moe_stream", FewShared::kBytes);
  if (status != MII_OK) return status;
  const Shape shape = {dim3(card().sms), dim3(kFewThreads), FewShared::kBytes};
  return launch("mii_moe_stream (few)", moe_few<T>, shape, stream, args);
}

template <typename T>
int32_t stream_products(const MiiMoeStream& a, void* stream) {
  int* counters = static_cast<int*>(a.workspace);
  const auto tiles = reinterpret_cast<const int4*>(a.tiles);
  const auto partial = reinterpret_cast<float4*>(counters + kMoeCounters);
  T* hidden = static_cast<T*>(a.hidden);
  const int width = static_cast<int>(a.width), features = static_cast<int>(a.in_features);
  const MoeStreamArgs<T> args = {
      {hidden, static_cast<const T*>(a.x), static_cast<const T*>(a.up), a.pair_weights, a.pairs, tiles, a.x_stride,
       a.hidden_stride, width, features, a.top_k, a.activation},
      {static_cast<T*>(a.out), hidden, static_cast<const T*>(a.down), a.pair_weights, a.pairs, tiles, a.hidden_stride,
       a.out_stride, features, width, a.top_k, a.activation},
      reinterpret_cast<uint32_t*>(counters + kMoeMostCtas),
      counters,
      partial,
      partial + moe_partial_sums(kMostStreamedRows)};
  const auto launches = reinterpret_cast<uint64_t*>(counters + kMoeMostCtas + 2);
  const auto results = reinterpret_cast<uint64_t*>(args.words + moe_partial_sums(kMoeMostTogether));
  switch (a.tile_rows) {
    case kFewRows: {
      const int listed = static_cast<int>(std::min(int64_t(kWarp), 1 + std::min(int64_t(a.experts), a.tokens * a.top_k)));
      MoeFewArgs<T> few = {{}, {}, args.up, args.down, results, launches, listed};
      return takes_few(a, &few) ? launch_few(few, stream) : launch_stream<T, 8, kMoeBoth>(args, stream);
    }
    case 16:
      return launch_stream<T, 16, kMoeBoth>(args, stream);
    case kMostStreamedRows: {
      const int32_t status = launch_stream<T, kMostStreamedRows, kMoeUp>(args, stream);
      return status == MII_OK ? launch_stream<T, kMostStreamedRows, kMoeDown>(args, stream) : status;
    }
    default:
      return fail(MII_INVALID, "mii_moe_stream: tiles of 8, 16 or 64 rows, not %d", a.tile_rows);
  }
}

template <bool Up>
int32_t expert_product(const char* name, const MiiMoeLinear& a, void* stream) {
  if (a.tokens == 0 || a.out_features == 0) return MII_OK;
  if (const int32_t status = check_moe(name, a); status != MII_OK) return status;
  return dispatch_dtype(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (sizeof(T) == 2) {
      if (a.kernel != MII_MOE_SIMPLE) return product_16_bit<T, Up>(a, stream);
    }
    return launch_simple<T, Up>(a, stream);
  });
}

template <typename T, int N>
int32_t combine(const MiiMoeCombine& a, void* stream) {
  const MoeCombineArgs<T> args = {static_cast<T*>(a.out),
                                  static_cast<const T*>(a.parts),
                                  static_cast<const T*>(a.shared),
                                  static_cast<const T*>(a.shared_gate),
                                  a.counts,
                                  a.out_stride,
                                  a.shared_stride,
                                  static_cast<int>(a.tokens),
                                  static_cast<int>(a.width / N),
                                  a.top_k};
  const dim3 grid(static_cast<unsigned>(ceil_div(a.tokens * args.packs, int64_t(256))));
  return launch("mii_moe_combine", moe_combine<T, N>, Shape{grid, dim3(256)}, stream, args);
}

}  // namespace
}  // namespace mii

extern "C" int32_t mii_moe_route(const MiiMoeRoute* a, void* stream) {
  using namespace mii;
  MII_REQUIRE(a->experts <= kMostExperts && a->top_k <= kMostChoices, MII_UNSUPPORTED,
              "mii_moe_route: up to %d of %d experts", kMostChoices, kMostExperts);
  MII_REQUIRE(a->top_k >= 1 && a->top_k <= a->experts && a->tile_rows >= 1, MII_INVALID,
              "mii_moe_route: %d of %d experts, tiles of %d rows", a->top_k, a->experts, a->tile_rows);
  MII_REQUIRE(a->groups <= kMostGroups, MII_UNSUPPORTED, "mii_moe_route: up to %d groups", kMostGroups);
  MII_REQUIRE(a->groups >= 1 && a->experts % a->groups == 0 && a->top_groups >= 1 && a->top_groups <= a->groups &&
                  a->top_k <= a->experts / a->groups * a->top_groups,
              MII_INVALID, "mii_moe_route: %d of %d groups of %d experts, of which a token goes to %d", a->top_groups,
              a->groups, a->experts, a->top_k);
  MII_REQUIRE(a->tokens * a->top_k < (int64_t(1) << 30), MII_UNSUPPORTED, "mii_moe_route: too many tokens");
  MII_REQUIRE(a->workspace && aligned(a->tiles, 16), MII_INVALID, "mii_moe_route: a workspace and aligned tiles");
  if (a->tokens == 0) return MII_OK;
  return dispatch_dtype(a->dtype, [&](auto tag) { return route<decltype(tag)>(*a, stream); });
}

extern "C" int32_t mii_moe_up(const MiiMoeLinear* a, void* stream) {
  using namespace mii;
  MII_REQUIRE(a->activation >= MII_SILU && a->activation <= MII_RELU2, MII_INVALID, "mii_moe_up: activation %d",
              a->activation);
  return expert_product<true>("mii_moe_up", *a, stream);
}

extern "C" int32_t mii_moe_down(const MiiMoeLinear* a, void* stream) {
  return mii::expert_product<false>("mii_moe_down", *a, stream);
}

extern "C" int32_t mii_moe_stream(const MiiMoeStream* a, void* stream) {
  using namespace mii;
  MII_REQUIRE(a->activation >= MII_SILU && a->activation <= MII_RELU2, MII_INVALID, "mii_moe_stream: activation %d",
              a->activation);
  const int32_t status = check_sizes("mii_moe_stream", a->tokens * a->top_k, a->width, a->in_features);
  if (status != MII_OK) return status;
  MII_REQUIRE(a->dtype == MII_BF16 || a->dtype == MII_F16, MII_UNSUPPORTED, "mii_moe_stream: 16-bit formats");
  const bool chunks = a->in_features % 8 == 0 && a->width % 8 == 0 && a->x_stride % 8 == 0 && a->hidden_stride % 8 == 0;
  const bool starts = aligned(a->x, 16) && aligned(a->hidden, 16) && aligned(a->up, 16) && aligned(a->down, 16) &&
                      aligned(a->workspace, 16);
  MII_REQUIRE(chunks && starts && a->in_features > 0 && a->width > 0, MII_UNSUPPORTED,
              "mii_moe_stream: rows of x, hidden and the weights must be whole chunks of 16 bytes");
  if (a->tokens == 0) return MII_OK;
  return a->dtype == MII_BF16 ? stream_products<__nv_bfloat16>(*a, stream) : stream_products<__half>(*a, stream);
}

extern "C" int64_t mii_moe_workspace_bytes(const MiiMoeStream*) {
  using namespace mii;
  const int64_t sums = moe_partial_sums(kMostStreamedRows) + moe_partial_sums(kMoeMostTogether);
  return kMoeCounters * int64_t(sizeof(int)) + sums * int64_t(sizeof(float4)) + kFewResultBytes;
}

extern "C" int32_t mii_moe_combine(const MiiMoeCombine* a, void* stream) {
  using namespace mii;
  MII_REQUIRE(a->width > 0 && a->width < INT32_MAX && a->tokens * a->width < (int64_t(1) << 38), MII_UNSUPPORTED,
              "mii_moe_combine: %lld rows of %lld", static_cast<long long>(a->tokens), static_cast<long long>(a->width));
  if (a->tokens == 0) return MII_OK;
  return dispatch_dtype(a->dtype, [&](auto tag) {
    using T = decltype(tag);
    constexpr int kN = kPack<T>;
    const bool packs = a->width % kN == 0 && a->out_stride % kN == 0 && a->shared_stride % kN == 0 && aligned(a->out, 16) &&
                       aligned(a->parts, 16) && aligned(a->shared, 16);
    return packs ? combine<T, kN>(*a, stream) : combine<T, 1>(*a, stream);
  });
}
