// What the programs of matrix products share: cases, their tensors, a grid of CTAs, and the plain product to compare with.
// Memory is exactly as large as it has to be, so that a sanitizer sees what is read beside it.
#pragma once
#include "mii/attention_mma.cuh"

using mii::Half;

constexpr Half kUntouched = {0x7fff};  // NaN

struct Case {
  int rows, n, k, ctas;
  bool gated, bias;
  int beside = 3;  // elements of out between a row and the next

  int width() const { return gated ? n / 2 : n; }
  int x_stride() const { return k + 8; }
  int out_stride() const { return width() + beside; }
};

inline std::vector<Half> random_halves(size_t count) {
  std::vector<Half> values(count);
  for (Half& value : values) value = mii::from_float<Half>(static_cast<int>(card::chance() % 2001 - 1000) / 500.0f);
  return values;
}

struct Tensors {
  std::vector<Half> weight, x, bias, out;
  std::vector<char> next = std::vector<char>(1 << 16);

  explicit Tensors(const Case& c)
      : weight(random_halves(size_t(c.n) * c.k)),
        x(random_halves(size_t(c.rows) * c.x_stride() - 8)),
        bias(random_halves(c.n)),
        out(size_t(c.rows) * c.out_stride(), kUntouched) {
    card::fetch_begin = next.data(), card::fetch_size = static_cast<int64_t>(next.size()), card::fetched = 0;
  }
};

inline void run_grid(int ctas, int threads, const std::function<void()>& kernel) {
  std::vector<int> order(ctas);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), card::chance);
  card::grid = {ctas};
  for (const int cta : order) {
    card::block = {cta};
    card::run_cta(threads, kernel);
  }
}

inline double product(const Case& c, const Tensors& t, int row, int n) {
  double sum = c.bias ? mii::to_float(t.bias[n]) : 0.0;
  for (int i = 0; i < c.k; ++i) {
    sum += double(mii::to_float(t.weight[size_t(n) * c.k + i])) * mii::to_float(t.x[size_t(row) * c.x_stride() + i]);
  }
  return sum;
}

inline double expected(const Case& c, const Tensors& t, int row, int column) {
  const double value = product(c, t, row, column);
  if (!c.gated) return value;
  const double gate = mii::rounded<Half>(static_cast<float>(value));
  return gate / (1.0 + std::exp(-gate)) * mii::rounded<Half>(static_cast<float>(product(c, t, row, c.n / 2 + column)));
}

inline void compare(const Case& c, const Tensors& t) {
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

inline void say_right(const Case& c) {
  std::printf("%d rows, %d x %d, %d CTAs%s%s: right\n", c.rows, c.n, c.k, c.ctas, c.gated ? ", gated" : "",
              c.bias ? ", bias" : "");
}
