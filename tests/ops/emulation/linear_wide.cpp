// Runs csrc/include/mii/linear_wide.cuh on the host against a plain product.
#include "linear.h"
#include "mii/linear_wide.cuh"

namespace {

constexpr int kFetch = 8192;  // bytes that a CTA with tiles brings of what comes next

template <int Rows, int Columns, bool Gated>
mii::LinearWideArgs arguments(const Case& c, Tensors& t) {
  mii::LinearWideArgs args = {};
  args.x = mii::map_matrix(t.x.data(), c.rows, c.k, c.x_stride(), Rows, false);
  args.weight = mii::map_matrix(t.weight.data(), c.n, c.k, c.k, Columns / 2, true);
  args.out = t.out.data(), args.out_stride = c.out_stride();
  args.bias = c.bias ? t.bias.data() : nullptr;
  args.next = t.next.data(), args.next_bytes = static_cast<int64_t>(t.next.size()), args.next_fetch = kFetch * c.ctas;
  args.rows = c.rows, args.n = c.n, args.k = c.k, args.band = 16;
  args.row_tiles = (c.rows + Rows - 1) / Rows, args.column_tiles = (c.n + Columns - 1) / Columns;
  args.gate = {1.0f, 0.0f};
  return args;
}

template <int Rows, int Columns, bool Gated>
void launch(const Case& c, Tensors& t, const mii::LinearWideArgs& args, int busy) {
  const int threads = mii::WideShape<Rows, Columns>::kThreads;
  run_grid(c.ctas, threads, [&] { mii::linear_wide<Half, Rows, Columns, Gated>(args); }, args.shared);
  compare(c, t);
  if (card::fetched != kFetch * busy) card::refuse("fetched too much or too little of what comes next");
  say_right(c);
}

template <int Rows, int Columns, bool Gated>
void check(Case c, int band = 16) {
  c.gated = Gated;
  Tensors t(c);
  mii::LinearWideArgs args = arguments<Rows, Columns, Gated>(c, t);
  args.band = band;
  launch<Rows, Columns, Gated>(c, t, args, min(c.ctas, args.row_tiles * args.column_tiles));
}

template <int Rows, int Columns, bool Gated>
void check_shared(Case c) {
  c.gated = Gated;
  Tensors t(c);
  mii::LinearWideArgs args = arguments<Rows, Columns, Gated>(c, t);
  constexpr int kFours = mii::WideShape<Rows, Columns>::kSumBytes / 16;
  const float nan = std::nanf("");
  std::vector<float4> partial(size_t(c.ctas) * kFours, float4{nan, nan, nan, nan});
  std::vector<int> left(c.ctas);
  args.shared = true, args.partial = partial.data(), args.left = left.data();
  launch<Rows, Columns, Gated>(c, t, args, c.ctas);
  if (std::any_of(left.begin(), left.end(), [](int one) { return one != 0; })) card::refuse("a CTA's sums were not added");
}

}  // namespace

int main() {
  card::patience = 20000;
  check<64, 128, false>({37, 200, 136, 2, false, true});       // all is cut off
  check<64, 128, false>({64, 1160, 264, 3, false, false, 0});  // a ring that comes around between tiles
  check<64, 128, false>({1, 8, 8, 1, false, true});            // less than a step
  check<64, 128, false>({60, 128, 1304, 1, false, false});     // and within one
  check<64, 128, false>({5, 130, 72, 4, false, true});         // CTAs without a tile; columns that are not pairs of packs
  check<64, 128, true>({50, 1000, 136, 2, true, true, 0});
  check<64, 128, true>({64, 150, 328, 1, true, false});
  check<128, 128, false>({100, 712, 200, 2, false, true, 8});
  check<128, 128, false>({300, 392, 136, 2, false, false}, 2);  // bands of rows, the last one lower
  check<128, 128, true>({128, 776, 136, 3, true, true, 0});
  check<128, 256, true>({300, 1200, 136, 4, true, false, 0}, 2);
  check<128, 256, true>({70, 518, 72, 1, true, true});
  check_shared<64, 128, false>({37, 200, 1096, 3, false, true, 0});    // runs that end within a tile, and units within a run
  check_shared<64, 128, false>({64, 120, 1304, 5, false, false});      // one tile, most CTAs have neither its start nor its end
  check_shared<128, 128, true>({100, 700, 520, 4, true, true});        // whole tiles between two parts
  check_shared<128, 256, false>({200, 520, 776, 8, false, true, 0});   // two tiles of rows side by side
  check_shared<128, 256, true>({300, 1200, 328, 6, true, true, 0});    // three; units that are cut off
  check_shared<128, 256, true>({256, 512, 512, 4, true, false, 0});    // runs that are whole tiles
}
