// Adds up what several ranks have computed of the same numbers.
#include "../ranks.h"

#include "simd.h"

namespace mii::cpu::MII_ISA {
namespace {

template <class T>
void add_range(const Addends& a, int64_t begin, int64_t end) {
  T* out = static_cast<T*>(a.out);
  const auto sum = [&](int64_t i, auto read) {
    V total = read(static_cast<const T*>(a.parts[0]) + i);
    for (int32_t r = 1; r < a.count; ++r) total = total + read(static_cast<const T*>(a.parts[r]) + i);
    return total;
  };
  int64_t i = begin;
  for (; i + W <= end; i += W) store(out + i, sum(i, [](const T* from) { return load(from); }));
  if (const int n = static_cast<int>(end - i); n > 0)
    store_n(out + i, sum(i, [n](const T* from) { return load_n(from, n); }), n);
}

}  // namespace

void add_up(const Addends& a) {
  with_dtype(a.dtype, [&](auto tag) {
    parallel(a.elements, a.count, [&](int64_t begin, int64_t end) { add_range<decltype(tag)>(a, begin, end); });
  });
}

}  // namespace mii::cpu::MII_ISA
