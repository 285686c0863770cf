// Runs csrc/include/mii/linear_stream.cuh on the host against a plain product, each case twice: places of partial sums have
// to be left so that the second run gives the same bits.
#include "at_once.h"
#include "linear.h"
#include "mii/linear_stream.cuh"

namespace {

template <int Tokens>
void run(const Case& c, Tensors& t, std::vector<float4>& partial) {
  std::fill(t.out.begin(), t.out.end(), kUntouched);
  mii::LinearStreamArgs<Half> args = {};
  args.out = t.out.data(), args.x = t.x.data(), args.weight = t.weight.data();
  args.bias = c.bias ? t.bias.data() : nullptr;
  args.next = t.next.data(), args.next_bytes = static_cast<int64_t>(t.next.size()), args.next_fetch = 40000 * c.ctas;
  args.partial = partial.data();
  args.x_stride = c.x_stride(), args.out_stride = c.out_stride();
  args.rows = c.rows, args.n = c.n, args.k = c.k;
  args.activation = c.gated ? int(MII_SILU) : mii::kPlain;
  run_at_once(c.ctas, mii::kStreamThreads, [&] { mii::linear_stream<Half, Tokens>(args); });
  must_be_empty(partial);
}

template <int Tokens = 8>
void check(const Case& c) {
  Tensors t(c);
  std::vector<float4> partial(size_t(c.ctas) * mii::StreamShape<Tokens>::kGroups * mii::kStreamConsumers);
  run<Tokens>(c, t, partial);
  if (card::fetched == 0) card::refuse("fetched nothing of what comes next");
  compare(c, t);
  const std::vector<Half> first = t.out;
  run<Tokens>(c, t, partial);
  if (std::memcmp(first.data(), t.out.data(), first.size() * sizeof(Half)) != 0) card::refuse("a second run differs");
  say_right(c);
}

}  // namespace

int main() {
  check({1, 64, 1024, 3, false, false});   // runs that end inside tiles
  check({8, 200, 1040, 7, false, true});   // tiles and steps that are cut off
  check({3, 8, 16, 1, false, true});       // less than a unit
  check({5, 320, 528, 4, true, true});
  check({2, 64, 2992, 9, true, false});    // one tile of many CTAs
  check({7, 640, 256, 3, false, false});   // many tiles a CTA
  check({4, 100, 272, 2, true, false});
  check({6, 1300, 1520, 5, false, true});  // a ring that comes around several times
  check({8, 72, 4112, 1, true, true});
  check<16>({16, 200, 1040, 7, false, true});  // two groups of tokens
  check<16>({9, 320, 2064, 4, true, true});
  check<16>({5, 130, 1296, 3, false, true});  // of which one is empty
}
