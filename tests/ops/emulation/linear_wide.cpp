// Runs csrc/include/mii/linear_wide.cuh on the host against a plain product.
#include "linear.h"
#include "mii/linear_wide.cuh"

namespace {

constexpr int kFetch = 8192;  // bytes that a CTA with tiles brings of what comes next

// Sums the parts that were left into t.out, as what follows a product does.
void add_up(const Case& c, Tensors& t, const std::vector<float>& parts, int count) {
  for (int row = 0; row < c.rows; ++row) {
    for (int column = 0; column < c.n; ++column) {
      float sum = 0.0f;
      for (int part = 0; part < count; ++part) sum += parts[(size_t(part) * c.rows + row) * c.n + column];
      t.out[size_t(row) * c.out_stride() + column] = mii::from_float<Half>(sum);
    }
  }
}

template <int Rows, mii::WideEnd End>
void check(Case c, int num_parts = 1) {
  constexpr int kColumns = mii::kWideColumns;
  c.gated = End == mii::kWideGated;
  Tensors t(c);
  std::vector<float> parts(End == mii::kWideParts ? size_t(num_parts) * c.rows * c.n : 0, NAN);
  mii::LinearWideArgs args = {};
  args.x = mii::map_matrix(t.x.data(), c.rows, c.k, c.x_stride(), Rows, false);
  args.weight = mii::map_matrix(t.weight.data(), c.n, c.k, c.k, c.gated ? kColumns / 2 : kColumns, true);
  args.parts = num_parts;
  args.out = parts.empty() ? static_cast<void*>(t.out.data()) : parts.data(), args.out_stride = c.out_stride();
  args.bias = c.bias ? t.bias.data() : nullptr;
  args.next = t.next.data(), args.next_bytes = static_cast<int64_t>(t.next.size()), args.next_fetch = kFetch * c.ctas;
  args.rows = c.rows, args.n = c.n, args.k = c.k, args.tiles = (c.n + kColumns - 1) / kColumns;
  args.gate = {1.0f, 0.0f};
  const int threads = mii::WideShape<Rows, kColumns>::kThreads;
  run_grid(c.ctas, threads, [&] { mii::linear_wide<Half, Rows, End>(args); });
  if (!parts.empty()) add_up(c, t, parts, num_parts);
  compare(c, t);
  if (card::fetched != kFetch * min(c.ctas, args.tiles * num_parts)) card::refuse("fetched too much or too little of what comes next");
  say_right(c);
}

}  // namespace

int main() {
  card::patience = 20000;
  check<64, mii::kWidePlain>({37, 200, 136, 2, false, true});       // all is cut off
  check<64, mii::kWidePlain>({64, 1160, 264, 3, false, false, 0});  // a ring that comes around between tiles
  check<64, mii::kWidePlain>({1, 8, 8, 1, false, true});            // less than a step
  check<64, mii::kWidePlain>({60, 128, 1304, 1, false, false});     // and within one
  check<64, mii::kWidePlain>({5, 130, 72, 4, false, true});         // CTAs without a tile; columns that are not pairs of packs
  check<64, mii::kWideGated>({50, 1000, 136, 2, true, true, 0});
  check<64, mii::kWideGated>({64, 150, 328, 1, true, false});
  check<64, mii::kWideParts>({37, 200, 136, 6, false, true}, 3);      // a CTA for each, and one step of k for each
  check<64, mii::kWideParts>({64, 256, 1304, 2, false, false, 0}, 4); // several to a CTA, of steps that do not come out even
  check<64, mii::kWideParts>({20, 130, 520, 5, false, true}, 1);      // one that is whole
  check<128, mii::kWidePlain>({100, 712, 200, 2, false, true, 8});
  check<128, mii::kWidePlain>({128, 392, 136, 2, false, false});
  check<128, mii::kWideGated>({128, 776, 136, 3, true, true, 0});
  check<128, mii::kWideGated>({70, 518, 72, 1, true, true});
}
