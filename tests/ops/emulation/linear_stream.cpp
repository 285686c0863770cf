// Runs csrc/include/mii/linear_stream.cuh on the host against a plain product, each case twice: counters and partial sums
// have to be left so that the second run gives the same bits. Memory is exactly as large as it has to be, so that a
// sanitizer sees what is read beside it.
#include "mii/attention_mma.cuh"

namespace mii {
unsigned char stream_memory[card::kSharedBytes] __attribute__((aligned(128)));
}

#include "mii/linear_stream.cuh"

namespace {

using mii::Half;

constexpr Half kUntouched = {0x7fff};  // NaN

struct Case {
  int rows, n, k, ctas;
  bool gated, bias;

  int width() const { return gated ? n / 2 : n; }
  int x_stride() const { return k + 8; }
  int out_stride() const { return width() + 3; }
};

std::vector<Half> random_halves(size_t count) {
  std::vector<Half> values(count);
  for (Half& value : values) value = mii::from_float<Half>(static_cast<int>(card::chance() % 2001 - 1000) / 500.0f);
  return values;
}

struct Tensors {
  std::vector<Half> weight, x, bias, out;
  std::vector<char> next = std::vector<char>(1 << 16);
  std::vector<int> arrived = std::vector<int>(mii::kStreamMaxTiles);
  std::vector<float4> partial;

  static Tensors make(const Case& c) {
    Tensors t;
    t.weight = random_halves(size_t(c.n) * c.k);
    t.x = random_halves(size_t(c.rows) * c.x_stride() - 8);
    t.bias = random_halves(c.n);
    t.out.resize(size_t(c.rows) * c.out_stride());
    t.partial.resize(size_t(c.ctas) * 2 * mii::kStreamConsumers, make_float4(NAN, NAN, NAN, NAN));
    return t;
  }
};

void run_grid(const Case& c, Tensors& t) {
  std::fill(t.out.begin(), t.out.end(), kUntouched);
  mii::LinearStreamArgs<Half> args = {};
  args.out = t.out.data(), args.x = t.x.data(), args.weight = t.weight.data();
  args.bias = c.bias ? t.bias.data() : nullptr;
  args.next = t.next.data(), args.next_bytes = static_cast<int64_t>(t.next.size()), args.next_fetch = 40000 * c.ctas;
  args.arrived = t.arrived.data(), args.partial = t.partial.data();
  args.x_stride = c.x_stride(), args.out_stride = c.out_stride();
  args.rows = c.rows, args.n = c.n, args.k = c.k;
  args.activation = c.gated ? int(MII_SILU) : mii::kPlain;
  std::vector<int> order(c.ctas);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), card::chance);
  card::grid = {c.ctas};
  for (const int cta : order) {
    card::block = {cta};
    card::run_cta(mii::kStreamThreads, [&] { mii::linear_stream<Half>(args); });
  }
  for (const int count : t.arrived) {
    if (count != 0) card::refuse("a counter was not reset");
  }
}

double product(const Case& c, const Tensors& t, int row, int n) {
  double sum = c.bias ? mii::to_float(t.bias[n]) : 0.0;
  for (int i = 0; i < c.k; ++i) {
    sum += double(mii::to_float(t.weight[size_t(n) * c.k + i])) * mii::to_float(t.x[size_t(row) * c.x_stride() + i]);
  }
  return sum;
}

double expected(const Case& c, const Tensors& t, int row, int column) {
  const double value = product(c, t, row, column);
  if (!c.gated) return value;
  const double gate = mii::rounded<Half>(static_cast<float>(value));
  return gate / (1.0 + std::exp(-gate)) * mii::rounded<Half>(static_cast<float>(product(c, t, row, c.n / 2 + column)));
}

void compare(const Case& c, const Tensors& t) {
  for (int row = 0; row < c.rows; ++row) {
    for (int column = 0; column < c.out_stride(); ++column) {
      const Half found = t.out[size_t(row) * c.out_stride() + column];
      if (column >= c.width()) {
        if (found.bits != kUntouched.bits) card::refuse("wrote outside of its rows");
        continue;
      }
      const double want = expected(c, t, row, column);
      if (std::abs(mii::to_float(found) - want) <= 0.01 * (std::abs(want) + 2.0)) continue;
      std::printf("row %d, column %d is %f and should be %f\n", row, column, mii::to_float(found), want);
      std::exit(1);
    }
  }
}

void check(const Case& c) {
  Tensors t = Tensors::make(c);
  mii::fetch_begin = t.next.data(), mii::fetch_bytes = static_cast<int64_t>(t.next.size()), mii::fetched = 0;
  run_grid(c, t);
  if (mii::fetched == 0) card::refuse("fetched nothing of what comes next");
  compare(c, t);
  const std::vector<Half> first = t.out;
  run_grid(c, t);
  if (std::memcmp(first.data(), t.out.data(), first.size() * sizeof(Half)) != 0) card::refuse("a second run differs");
  std::printf("%d rows, %d x %d, %d CTAs%s%s: right\n", c.rows, c.n, c.k, c.ctas, c.gated ? ", gated" : "",
              c.bias ? ", bias" : "");
}

}  // namespace

int main() {
  card::shared = mii::stream_memory;
  check({1, 64, 1024, 3, false, false});   // runs that end inside tiles
  check({8, 200, 1040, 7, false, true});   // tiles and steps that are cut off
  check({3, 8, 16, 1, false, true});       // less than a unit
  check({5, 320, 528, 4, true, true});
  check({2, 64, 2992, 9, true, false});    // one tile of many CTAs
  check({7, 640, 256, 3, false, false});   // many tiles a CTA
  check({4, 100, 272, 2, true, false});
  check({6, 1300, 1520, 5, false, true});  // a ring that comes around several times
  check({8, 72, 4112, 1, true, true});
}
