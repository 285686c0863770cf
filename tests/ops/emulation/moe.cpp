// Runs the kernels of the mixture of experts on the host against plain loops: routing, then both products by one kernel,
// twice: counters and partial sums have to be left so that the second run gives the same bits.
#include "mii/attention_mma.cuh"

#undef __shared__
#define __shared__ static thread_local  // the threads of a CTA share it, which all run in one of the host

#include "at_once.h"

#include "mii/moe_route.cuh"
#include "mii/moe_few.cuh"
#include "mii/moe_gather.cuh"
#include "mii/moe_mma.cuh"
#include "mii/moe_wide.cuh"

namespace {

using mii::Half;

enum Kernel { kSimple, kFew, kStream8, kStream16, kStream64, kMma, kWide, kMmaOfWide };
constexpr int kTileRows[] = {8, 8, 8, 16, 64, 128, mii::kMoeWideRows, mii::kMoeWideRows};
const char* const kNames[] = {"simple", "few", "stream 8", "stream 16", "stream 64", "mma", "wide", "mma of wide tiles"};

struct Case {
  Kernel kernel;
  int tokens, live, experts, top_k, hidden, width, ctas;
  bool crowded;
  int groups = 1, top_groups = 1;

  int pairs() const { return tokens * top_k; }
  int routed() const { return live * top_k; }
  bool renormalised() const { return groups == 1; }
};

std::vector<Half> random_halves(size_t count, float scale) {
  std::vector<Half> values(count);
  for (Half& value : values) value = mii::from_float<Half>(static_cast<int>(card::chance() % 2001 - 1000) / 500.0f * scale);
  return values;
}

void run_grid(int ctas, int threads, const std::function<void()>& kernel) {
  std::vector<int> order(ctas);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), card::chance);
  card::grid.x = ctas;
  for (const int cta : order) {
    card::block.x = cta;
    card::run_cta(threads, kernel);
  }
}

struct Tensors {
  std::vector<Half> logits, x, up, down, hidden, parts;
  std::vector<int> chosen, offsets, pairs, places, arrived = std::vector<int>(mii::kMoeMostCtas), counts = std::vector<int>(MII_COUNTS);
  std::vector<int4> tiles;
  std::vector<uint32_t> sizes;
  std::vector<float> weights;
  std::vector<float4> partial, words;
  uint32_t met = 0;
  std::vector<uint64_t> results;
  uint64_t launches = 0;

  explicit Tensors(const Case& c)
      : logits(random_halves(size_t(c.tokens) * c.experts, 1)),
        x(random_halves(size_t(c.tokens) * c.hidden, 1)),
        up(random_halves(size_t(c.experts) * 2 * c.width * c.hidden, 1 / std::sqrt(float(c.hidden)))),
        down(random_halves(size_t(c.experts) * c.width * c.hidden, 1 / std::sqrt(float(c.width)))),
        hidden(size_t(c.pairs()) * c.width, Half{0x7fff}),
        parts(size_t(c.pairs()) * c.hidden, Half{0x7fff}),
        chosen(c.pairs(), -1),
        offsets(c.experts + 1, -1),
        pairs(c.pairs(), -1),
        places(c.pairs(), -1),
        tiles(1 + min(c.experts, c.pairs()) + c.pairs() / kTileRows[c.kernel]),
        sizes((c.tokens + mii::kLeastChunk - 1) / mii::kLeastChunk * ((c.experts + 1) / 2), 0xffffffff),
        weights(c.pairs(), NAN),
        partial(size_t(c.ctas) * 2 * 8 * mii::kMoeThreads, {NAN, NAN, NAN, NAN}),
        words(size_t(c.ctas) * 2 * 2 * mii::kMoeThreads),
        results(size_t(c.pairs()) * c.width / 2) {
    counts[MII_NUM_TOKENS] = c.live;
    for (int t = 0; c.crowded && t < c.tokens; ++t) logits[t * c.experts + c.experts / 2] = mii::from_float<Half>(9);
  }
};

void wrong(const char* what) {
  std::printf("wrong: %s\n", what);
  std::exit(1);
}

void check_routing(const Case& c, const Tensors& t) {
  std::vector<std::vector<int>> rows(c.experts);
  for (int token = 0; token < c.live; ++token) {
    std::vector<int> order(c.experts);
    std::iota(order.begin(), order.end(), 0);
    const auto logit = [&](int e) { return mii::to_float(t.logits[token * c.experts + e]); };
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logit(a) > logit(b); });
    std::vector<int> best;  // groups, in the order of their best experts
    const auto group = [&](int e) { return e / (c.experts / c.groups); };
    for (const int e : order) {
      if (std::count(best.begin(), best.end(), group(e)) == 0) best.push_back(group(e));
    }
    best.resize(c.top_groups);
    const auto none = [&](int e) { return std::count(best.begin(), best.end(), group(e)) == 0; };
    std::vector<int> kept;
    for (const int e : order) {
      if (!none(e)) kept.push_back(e);
    }
    order = kept;
    double all = 0;
    for (int e = 0; e < c.experts; ++e) all += std::exp(logit(e));
    double total = c.renormalised() ? 0 : all;
    for (int j = 0; j < c.top_k && c.renormalised(); ++j) total += std::exp(logit(order[j]));
    for (int j = 0; j < c.top_k; ++j) {
      const int pair = token * c.top_k + j;
      if (t.chosen[pair] != order[j]) wrong("choice");
      if (!(std::fabs(t.weights[pair] - 1.5 * std::exp(logit(order[j])) / total) < 1e-5)) wrong("weight");
      rows[order[j]].push_back(pair);
    }
  }
  int row = 0, tile = 0;
  for (int e = 0; e < c.experts; ++e) {
    if (t.offsets[e] != row) wrong("offset");
    const int count = static_cast<int>(rows[e].size()), most = kTileRows[c.kernel];
    for (int first = 0; first < count; first += most) {
      const int4 got = t.tiles[++tile];
      if (got.x != e || got.y != row + first || got.z != min(most, count - first)) wrong("tile");
    }
    for (const int pair : rows[e]) {
      if (t.places[pair] != row) wrong("place of a pair");
      if (t.pairs[row++] != pair) wrong("order of the pairs");
    }
  }
  if (t.offsets[c.experts] != row || t.tiles[0].x != tile) wrong("totals");
}

bool near(Half got, double expected) { return std::fabs(mii::to_float(got) - expected) <= 0.01 * (1 + std::fabs(expected)); }

void check_up(const Case& c, const Tensors& t) {
  for (size_t i = size_t(c.routed()) * c.width; i < t.hidden.size(); ++i) {
    if (t.hidden[i].bits != 0x7fff) wrong("wrote past the last row");
  }
  for (int row = 0; row < c.routed(); ++row) {
    const int token = t.pairs[row] / c.top_k, expert = t.chosen[t.pairs[row]];
    for (int n = 0; n < c.width; ++n) {
      double gate = 0, up = 0;
      const Half* weight = t.up.data() + (size_t(expert) * 2 * c.width + n) * c.hidden;
      for (int k = 0; k < c.hidden; ++k) {
        const double x = mii::to_float(t.x[token * c.hidden + k]);
        gate += x * mii::to_float(weight[k]);
        up += x * mii::to_float(weight[size_t(c.width) * c.hidden + k]);
      }
      if (!near(t.hidden[size_t(row) * c.width + n], gate / (1 + std::exp(-gate)) * up)) wrong("moe_up");
    }
  }
}

void check_down(const Case& c, const Tensors& t) {
  for (int row = 0; row < c.routed(); ++row) {
    const int pair = t.pairs[row], expert = t.chosen[pair];
    for (int n = 0; n < c.hidden; ++n) {
      double sum = 0;
      for (int k = 0; k < c.width; ++k) {
        const double x = mii::to_float(t.hidden[size_t(row) * c.width + k]);
        sum += x * mii::to_float(t.down[(size_t(expert) * c.hidden + n) * c.width + k]);
      }
      if (!near(t.parts[size_t(pair) * c.hidden + n], t.weights[pair] * sum)) wrong("moe_down");
    }
  }
}

template <bool Up>
mii::MoeWideArgs<Half> wide_args(const Case& c, const mii::MoeArgs<Half>& args, const Half* rows) {
  constexpr int kBoxRows = mii::MoeWideShape::kHalf;
  const auto weight = mii::map_matrix(args.weight, c.experts * (Up ? 2 : 1) * args.n, args.k, args.k, kBoxRows, true);
  return {mii::map_matrix(rows, c.pairs(), args.k, args.k, mii::MoeWideArgs<Half>::kBoxRows, false), weight, args, {Up ? 1.0f : 0.0f, 0.0f}};
}

template <bool Up>
mii::MoeArgs<Half> product_args(const Case& c, Tensors& t) {
  const int n = Up ? c.width : c.hidden, k = Up ? c.hidden : c.width;
  return {(Up ? t.hidden : t.parts).data(), (Up ? t.x : t.hidden).data(), (Up ? t.up : t.down).data(), t.weights.data(),
          t.pairs.data(), t.tiles.data(), k, n, n, k, c.top_k, MII_SILU};
}

template <bool Up>
void run_product(const Case& c, Tensors& t) {
  mii::MoeArgs<Half> args = product_args<Up>(c, t);
  args.tile_parts = c.kernel == kMmaOfWide ? 2 : 1;
  const auto run = [&](auto kernel, int threads) { run_grid(c.ctas, threads, [&] { kernel(args); }); };
  if (c.kernel == kSimple) return run(mii::moe_simple<Half, Up>, mii::kSimpleThreads);
  if (c.kernel == kMma || c.kernel == kMmaOfWide) return run(mii::moe_mma<Half, Up>, mii::MoeMmaShape::kThreads);
  const mii::MoeGatherArgs<Half> gather = {t.parts.data(), args.x, t.places.data(), args.tiles, args.k, args.x_stride, args.k, c.top_k};
  if (Up) run_grid(c.ctas, mii::kGatherThreads, [&] { mii::moe_gather<Half>(gather); });
  const auto wide = wide_args<Up>(c, args, Up ? t.parts.data() : args.x);
  run_grid(c.ctas, mii::MoeWideShape::kThreads, [&] { mii::moe_wide<Half, Up>(wide); });
}

void run_products(const Case& c, Tensors& t) {
  const mii::MoeStreamArgs<Half> args = {product_args<true>(c, t), product_args<false>(c, t), &t.met, t.arrived.data(), t.partial.data(), t.words.data()};
  switch (c.kernel) {
    case kFew: {
      const mii::MoeFewArgs<Half> few = {
          mii::map_panels(t.up.data(), c.experts * 2 * c.width, c.hidden, mii::kFewTileRows / 2, mii::kFewPanels, true),
          mii::map_panels(t.down.data(), c.experts * c.hidden, c.width, mii::kFewTileRows, mii::kFewPanels, true),
          args.up, args.down, t.results.data(), &t.launches, min(mii::kWarp, static_cast<int>(t.tiles.size()))};
      return run_at_once(c.ctas, mii::kFewThreads, [&] { mii::moe_few<Half>(few); });
    }
    case kStream8:
      return run_at_once(c.ctas, mii::kMoeThreads, [&] { mii::moe_stream<Half, 8, mii::kMoeBoth>(args); });
    case kStream16:
      return run_at_once(c.ctas, mii::kMoeThreads, [&] { mii::moe_stream<Half, 16, mii::kMoeBoth>(args); });
    case kStream64:
      run_grid(c.ctas, mii::kMoeThreads, [&] { mii::moe_stream<Half, 64, mii::kMoeUp>(args); });
      return run_grid(c.ctas, mii::kMoeThreads, [&] { mii::moe_stream<Half, 64, mii::kMoeDown>(args); });
    default:
      run_product<true>(c, t);
      run_product<false>(c, t);
  }
}

void multiply(const Case& c, Tensors& t) {
  run_products(c, t);
  const auto bits = [&] {
    std::string all;
    for (const auto* values : {&t.hidden, &t.parts}) all.append(reinterpret_cast<const char*>(values->data()), 2 * values->size());
    return all;
  };
  const std::string first = bits();
  run_products(c, t);
  if (bits() != first) wrong("a second run gives other bits");
  for (const int counter : t.arrived) {
    if (counter != 0) wrong("a counter was left");
  }
  must_be_empty(t.words);
  if (t.tiles[0].y != 0 || t.tiles[0].z != 0) wrong("tiles stayed counted");
}

void route(const Case& c, int chunk, Tensors& t) {
  const mii::MoeRouteArgs<Half> args = {t.chosen.data(), t.weights.data(), t.offsets.data(), t.pairs.data(), t.places.data(), t.tiles.data(), t.logits.data(), nullptr,
                                        t.counts.data(), t.sizes.data(), c.experts, c.tokens, chunk, c.experts, c.top_k, MII_MOE_SOFTMAX,
                                        c.renormalised(), kTileRows[c.kernel], c.groups, c.top_groups, 1.5f};
  const int chunks = (c.tokens + chunk - 1) / chunk;
  run_grid(chunks, mii::kRouteThreads, [&] {
    c.experts <= 32 ? mii::moe_route<Half, 1>(args) : c.experts <= 128 ? mii::moe_route<Half, 4>(args) : mii::moe_route<Half, 16>(args);
  });
  if (chunks > 1) run_grid(chunks, mii::kRouteThreads, [&] { mii::moe_place<Half>(args); });
  check_routing(c, t);
}

void run_routing(const Case& c, int chunk) {
  Tensors t(c);
  route(c, chunk, t);
  std::printf("%d of %d tokens in chunks of %d, %d of %d experts, %d of %d groups: right\n", c.live, c.tokens, chunk, c.top_k, c.experts,
              c.top_groups, c.groups);
}

void run_case(const Case& c) {
  Tensors t(c);
  route(c, c.tokens <= 16 ? 16 : c.tokens <= 100 ? 32 : 64, t);
  multiply(c, t);
  check_up(c, t);
  check_down(c, t);
  std::printf("%s, %d of %d tokens, %d of %d experts, %d x %d, %d CTAs: right\n", kNames[c.kernel], c.live, c.tokens, c.top_k,
              c.experts, c.hidden, c.width, c.ctas);
}

}  // namespace

int main() {
  card::patience = 1000000;
  const Case cases[] = {
      {kSimple, 9, 7, 5, 3, 17, 9, 3, true},      {kStream8, 1, 1, 16, 4, 192, 128, 5, false},
      {kStream8, 7, 5, 40, 2, 136, 72, 3, false}, {kStream8, 3, 0, 8, 2, 64, 64, 4, false},
      {kStream8, 2, 2, 3, 1, 64, 8, 9, false},    {kStream8, 3, 3, 6, 2, 520, 264, 3, false},
      {kFew, 1, 1, 16, 4, 192, 128, 5, false},    {kFew, 7, 5, 40, 2, 128, 64, 3, false},
      {kFew, 3, 0, 8, 2, 64, 64, 4, false},       {kFew, 2, 2, 3, 1, 64, 64, 9, false},
      {kFew, 3, 3, 6, 2, 576, 320, 3, false},     {kFew, 8, 8, 4, 3, 1088, 448, 7, true},
      {kFew, 20, 20, 24, 4, 1024, 192, 9, false},
      {kStream16, 16, 16, 8, 2, 200, 136, 7, true},
      {kStream64, 30, 30, 4, 2, 136, 72, 4, false}, {kStream64, 100, 90, 3, 2, 72, 64, 2, true},
      {kMma, 150, 140, 3, 2, 136, 72, 3, true},   {kMma, 5, 0, 20, 2, 64, 200, 5, false},
      {kMmaOfWide, 400, 390, 2, 1, 136, 72, 3, true},
      {kWide, 150, 140, 3, 2, 136, 72, 3, true},  {kWide, 5, 0, 20, 2, 64, 200, 5, false},
      {kWide, 40, 40, 6, 2, 72, 136, 2, false},   {kWide, 190, 180, 2, 1, 328, 264, 2, true}, {kWide, 420, 420, 2, 1, 64, 520, 3, true},
  };
  for (const Case& c : cases) {
    card::lazy_warps = c.kernel == kFew;
    run_case(c);
  }
  card::lazy_warps = false;
  run_routing({kStream8, 16, 16, 128, 8, 1, 1, 1, false}, 16);
  run_routing({kStream8, 50, 33, 128, 8, 1, 1, 1, true}, 16);
  run_routing({kStream16, 100, 0, 7, 3, 1, 1, 1, false}, 16);
  run_routing({kMma, 300, 299, 33, 6, 1, 1, 1, true}, 64);
  run_routing({kStream64, 70, 70, 301, 20, 1, 1, 1, false}, 32);
  run_routing({kStream8, 40, 37, 24, 3, 1, 1, 1, false, 4, 2}, 16);
  run_routing({kStream8, 9, 9, 160, 6, 1, 1, 1, false, 8, 3}, 16);
}
