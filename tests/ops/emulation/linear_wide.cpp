// Runs csrc/include/mii/linear_wide.cuh on the host against a plain product.
#include "linear.h"
#include "mii/linear_wide.cuh"

namespace {

constexpr int kFetch = 8192;  // bytes that a CTA with tiles brings of what comes next

template <int Rows, bool Gated>
void check(Case c) {
  constexpr int kColumns = mii::kWideColumns;
  c.gated = Gated;
  Tensors t(c);
  mii::LinearWideArgs args = {};
  args.x = mii::map_matrix(t.x.data(), c.rows, c.k, c.x_stride(), Rows, false);
  args.weight = mii::map_matrix(t.weight.data(), c.n, c.k, c.k, kColumns / 2, true);
  args.out = t.out.data(), args.out_stride = c.out_stride();
  args.bias = c.bias ? t.bias.data() : nullptr;
  args.next = t.next.data(), args.next_bytes = static_cast<int64_t>(t.next.size()), args.next_fetch = kFetch * c.ctas;
  args.rows = c.rows, args.n = c.n, args.k = c.k, args.tiles = (c.n + kColumns - 1) / kColumns;
  args.gate = {1.0f, 0.0f};
  const int threads = mii::WideShape<Rows, kColumns>::kThreads;
  run_grid(c.ctas, threads, [&] { mii::linear_wide<Half, Rows, Gated>(args); });
  compare(c, t);
  if (card::fetched != kFetch * min(c.ctas, args.tiles)) card::refuse("fetched too much or too little of what comes next");
  say_right(c);
}

}  // namespace

int main() {
  card::patience = 20000;
  check<64, false>({37, 200, 136, 2, false, true});       // all is cut off
  check<64, false>({64, 1160, 264, 3, false, false, 0});  // a ring that comes around between tiles
  check<64, false>({1, 8, 8, 1, false, true});            // less than a step
  check<64, false>({60, 128, 1304, 1, false, false});     // and within one
  check<64, false>({5, 130, 72, 4, false, true});         // CTAs without a tile; columns that are not pairs of packs
  check<64, true>({50, 1000, 136, 2, true, true, 0});
  check<64, true>({64, 150, 328, 1, true, false});
  check<128, false>({100, 712, 200, 2, false, true, 8});
  check<128, false>({128, 392, 136, 2, false, false});
  check<128, true>({128, 776, 136, 3, true, true, 0});
  check<128, true>({70, 518, 72, 1, true, true});
}
