// Runs csrc/include/mii/norm.cuh on the host: norms with a residual whose addend is normed by itself first or comes in parts, and without,
// against the formulas in double, in each of the ways that a row is held.
#include "card.h"

#undef __shared__
#define __shared__ static  // one CTA at a time
#define blockDim (card::Index{static_cast<int>(card::threads.size())})

namespace card {
float mailbox[32][32];
}  // namespace card

inline float __shfl_xor_sync(unsigned, float value, int offset) {
  float* box = card::mailbox[card::warp()];
  box[card::lane()] = value;
  __syncwarp();
  const float theirs = box[card::lane() ^ offset];
  __syncwarp();
  return theirs;
}
template <typename T>
T __ldg(const T* address) {
  return *address;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

#include "mii/norm.cuh"

namespace {

struct Case {
  int width, kind;
  bool residual, x_weight, out;
  int num_parts = 0;  // of x; 0: x is whole
  bool floats = true;  // the parts, and all rows of one together; else T, and all parts of a row
};

template <typename T>
std::vector<T> random(size_t count, float centre = 0.0f) {
  std::vector<T> values(count);
  for (T& value : values) value = mii::from_float<T>(centre + static_cast<int>(card::chance() % 2001 - 1000) / 500.0f);
  return values;
}

constexpr int kRows = 5;
constexpr float kEps = 1e-5f;

template <typename T>
struct Tensors {
  int x_stride, out_stride;
  std::vector<T> x, residual, weight, x_weight, out;
  std::vector<float> parts;
  std::vector<T> own_parts;

  explicit Tensors(const Case& c)
      : x_stride(c.width + 8), out_stride(c.width + 16), x(random<T>(size_t(kRows) * x_stride)),
        residual(random<T>(size_t(kRows) * c.width)), weight(random<T>(c.width, 1.0f)), x_weight(random<T>(c.width, 1.0f)),
        out(size_t(kRows) * out_stride, mii::from_float<T>(NAN)),
        parts(random<float>(size_t(c.num_parts) * kRows * c.width)), own_parts(random<T>(parts.size())) {}
};

// The norm of a row as abi/norm.h has it, every rounding where it says.
template <typename T>
std::vector<float> normed(const std::vector<float>& v, const std::vector<T>& weight, int kind) {
  double mean = 0.0, squares = 0.0;
  if (kind == MII_LAYER) mean = std::accumulate(v.begin(), v.end(), 0.0) / v.size();
  for (const float value : v) squares += (value - mean) * (value - mean);
  const double scale = 1.0 / std::sqrt(squares / v.size() + kEps);
  std::vector<float> result(v.size());
  for (size_t i = 0; i < v.size(); ++i) {
    float value = static_cast<float>((v[i] - mean) * scale);
    if (kind == MII_RMS) value = mii::rounded<T>(value);
    result[i] = mii::rounded<T>(value * (mii::to_float(weight[i]) + (kind == MII_RMS_PLUS1 ? 1.0f : 0.0f)));
  }
  return result;
}

template <typename T>
void near(float found, float want, int row, int i, const char* what) {
  const float unit = sizeof(T) == 4 ? 1e-5f : std::is_same_v<T, __half> ? 1.0f / 512 : 1.0f / 64;
  if (std::abs(found - want) <= 2 * unit * (std::abs(want) + 1.0f)) return;
  std::printf("%s of row %d, element %d is %f and should be %f\n", what, row, i, found, want);
  std::exit(1);
}

template <typename T>
void compare(const Case& c, const Tensors<T>& before, const Tensors<T>& after) {
  for (int row = 0; row < kRows; ++row) {
    std::vector<float> v(c.width);
    for (int i = 0; i < c.width; ++i) {
      float sum = 0.0f;
      for (int part = 0; part < c.num_parts; ++part) {
        sum += c.floats ? before.parts[(part * kRows + row) * c.width + i]
                        : mii::to_float(before.own_parts[(row * c.num_parts + part) * c.width + i]);
      }
      v[i] = c.num_parts ? mii::rounded<T>(sum) : mii::to_float(before.x[row * before.x_stride + i]);
    }
    if (c.x_weight) v = normed(v, before.x_weight, c.kind);
    for (int i = 0; c.residual && i < c.width; ++i) {
      v[i] = mii::rounded<T>(v[i] + mii::to_float(before.residual[row * c.width + i]));
      const float found = mii::to_float(after.residual[row * c.width + i]);
      near<T>(found, v[i], row, i, "the residual");
      v[i] = found;  // what is normed is what was written
    }
    const std::vector<float> want = normed(v, before.weight, c.kind);
    for (int i = 0; i < before.out_stride; ++i) {
      const float found = mii::to_float(after.out[row * before.out_stride + i]);
      if (i >= c.width || !c.out) {
        if (!std::isnan(found)) card::refuse("wrote what it must not");
      } else {
        near<T>(found, want[i], row, i, "the result");
      }
    }
  }
}

template <typename T, typename Kernel>
void check(const Case& c, int ctas, int threads, const Kernel& kernel) {
  const Tensors<T> before(c);
  Tensors<T> after = before;
  mii::NormArgs<T> args = {};
  args.out = c.out ? after.out.data() : nullptr, args.x = after.x.data();
  args.residual = c.residual ? after.residual.data() : nullptr, args.weight = after.weight.data();
  if (c.num_parts) {
    args.parts = c.floats ? static_cast<const void*>(after.parts.data()) : after.own_parts.data();
    args.num_parts = c.num_parts, args.x = nullptr;
    args.part_stride = c.floats ? kRows * c.width : c.width, args.part_row_stride = c.floats ? c.width : c.num_parts * c.width;
  }
  args.x_weight = c.x_weight ? after.x_weight.data() : nullptr;
  args.rows = kRows, args.x_stride = after.x_stride, args.out_stride = after.out_stride;
  args.width = c.width, args.kind = c.kind, args.inverse_width = 1.0f / c.width, args.eps = kEps;
  for (int cta = 0; cta < ctas; ++cta) {
    card::block = {cta};
    card::run_cta(threads, [&] { card::threads[card::current].waited = true, kernel(args); });
  }
  compare<T>(c, before, after);
  std::printf("width %d, kind %d, %d parts%s%s%s: right\n", c.width, c.kind, c.num_parts, c.residual ? ", residual" : "",
              c.x_weight ? ", normed before" : "", c.out ? "" : ", no result");
}

template <typename T, mii::NormSource kSource>
void check_all(const Case& c) {
  using mii::NormArgs;
  const int packs = c.width / mii::kPack<T>;
  if (packs <= 32) check<T>(c, 2, 128, [](NormArgs<T> a) { mii::norm_rows<T, 1, true, kSource>(a); });
  if (packs <= 64) check<T>(c, 2, 128, [](NormArgs<T> a) { mii::norm_rows<T, 2, true, kSource>(a); });
  check<T>(c, kRows, 96, [](NormArgs<T> a) { mii::norm_rows<T, 2, false, kSource>(a); });
  if (!c.num_parts) check<T>(c, kRows, 64, [](NormArgs<T> a) { mii::norm_rows_any<T>(a); });
}

template <typename T>
void check_type() {
  for (const int kind : {int(MII_RMS), int(MII_RMS_PLUS1)}) {
    for (const int width : {192, 256}) {
      check_all<T, mii::kNormNormedX>({width, kind, true, true, true});
      check_all<T, mii::kNormNormedX>({width, kind, true, true, false});
      check_all<T, mii::kNormX>({width, kind, true, false, true});
    }
  }
  check_all<T, mii::kNormX>({192, MII_LAYER, false, false, true});
  for (const int num_parts : {1, 3, 8}) check_all<T, mii::kNormFloats>({256, MII_RMS, true, false, true, num_parts});
  check_all<T, mii::kNormFloats>({192, MII_LAYER, true, false, true, 4});
  if constexpr (sizeof(T) == 2) {
    for (const int num_parts : {2, 8}) check_all<T, mii::kNormParts>({256, MII_RMS, true, false, true, num_parts, false});
  }
}

}  // namespace

int main() {
  check_type<float>();
  check_type<__half>();
  check_type<__nv_bfloat16>();
}
