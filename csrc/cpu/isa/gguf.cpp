// Unpacks the quantised blocks of GGUF files. The formats are ggml's, and so is the order of float operations: results
// equal the reference bit for bit. Therefore no product may be fused with the sum that follows it.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif
#include "mii/abi/gguf.h"
#include "simd.h"

namespace mii::cpu::MII_ISA {
namespace {

using Byte = uint8_t;

MII_INLINE float half(const Byte* at) {
  f16 value;
  memcpy(&value, at, 2);
  return to_float(value);
}

// Every format: its number in the file, how many numbers a block holds in how many bytes, and how it is unpacked. Loops
// have constant bounds, so the compiler turns them into a few vector instructions.
struct Q4_0 {
  static constexpr int kType = 2, kNumbers = 32, kBytes = 18;
  MII_INLINE void unpack(const Byte* b, float* y) {
    const float d = half(b);
    for (int i = 0; i < 16; ++i) y[i] = d * static_cast<float>((b[2 + i] & 15) - 8);
    for (int i = 0; i < 16; ++i) y[16 + i] = d * static_cast<float>((b[2 + i] >> 4) - 8);
  }
};

struct Q4_1 {
  static constexpr int kType = 3, kNumbers = 32, kBytes = 20;
  MII_INLINE void unpack(const Byte* b, float* y) {
    const float d = half(b), m = half(b + 2);
    for (int i = 0; i < 16; ++i) y[i] = d * static_cast<float>(b[4 + i] & 15) + m;
    for (int i = 0; i < 16; ++i) y[16 + i] = d * static_cast<float>(b[4 + i] >> 4) + m;
  }
};

// Five bits: four in `low`, the fifth of number i is bit i of the word at `high`.
MII_INLINE void five_bits(const Byte* high, const Byte* low, int* q) {
  uint32_t bits;
  memcpy(&bits, high, 4);
  for (int i = 0; i < 16; ++i) q[i] = (low[i] & 15) | ((bits >> i & 1) << 4);
  for (int i = 0; i < 16; ++i) q[16 + i] = (low[i] >> 4) | ((bits >> (16 + i) & 1) << 4);
}

struct Q5_0 {
  static constexpr int kType = 6, kNumbers = 32, kBytes = 22;
  MII_INLINE void unpack(const Byte* b, float* y) {
    const float d = half(b);
    int q[32];
    five_bits(b + 2, b + 6, q);
    for (int i = 0; i < 32; ++i) y[i] = d * static_cast<float>(q[i] - 16);
  }
};

struct Q5_1 {
  static constexpr int kType = 7, kNumbers = 32, kBytes = 24;
  MII_INLINE void unpack(const Byte* b, float* y) {
    const float d = half(b), m = half(b + 2);
    int q[32];
    five_bits(b + 4, b + 8, q);
    for (int i = 0; i < 32; ++i) y[i] = d * static_cast<float>(q[i]) + m;
  }
};

struct Q8_0 {
  static constexpr int kType = 8, kNumbers = 32, kBytes = 34;
  MII_INLINE void unpack(const Byte* b, float* y) {
    const float d = half(b);
    for (int i = 0; i < 32; ++i) y[i] = d * static_cast<float>(static_cast<int8_t>(b[2 + i]));
  }
};

struct Q2_K {
  static constexpr int kType = 10, kNumbers = 256, kBytes = 84;
  MII_INLINE void unpack(const Byte* b, float* y) {
    const float d = half(b + 80), dmin = half(b + 82);
    for (int group = 0; group < 16; ++group) {  // of 16 numbers
      const Byte* q = b + 16 + group / 8 * 32 + group % 2 * 16;
      const int shift = group / 2 % 4 * 2;
      const float scale = d * static_cast<float>(b[group] & 15), offset = dmin * static_cast<float>(b[group] >> 4);
      for (int i = 0; i < 16; ++i) y[16 * group + i] = scale * static_cast<float>(q[i] >> shift & 3) - offset;
    }
  }
};

struct Q3_K {
  static constexpr int kType = 11, kNumbers = 256, kBytes = 110;
  MII_INLINE void unpack(const Byte* b, float* y) {
    const Byte* packed = b + 96;  // 16 scales of six bits: four in bytes 0 to 7, two in bytes 8 to 11
    const float d = half(b + 108);
    for (int group = 0; group < 16; ++group) {
      const int low = packed[group % 8] >> (group / 8 * 4) & 15, high = packed[8 + group % 4] >> (group / 4 * 2) & 3;
      const float scale = d * static_cast<float>((low | high << 4) - 32);
      const Byte *q = b + 32 + group / 8 * 32 + group % 2 * 16, *mask = b + group % 2 * 16;
      const int shift = group / 2 % 4 * 2, bit = group / 2;
      for (int i = 0; i < 16; ++i) {
        const int number = (q[i] >> shift & 3) | (mask[i] >> bit & 1) << 2;
        y[16 * group + i] = scale * static_cast<float>(number - 4);
      }
    }
  }
};

// Scale and offset of group j out of the twelve bytes that Q4_K and Q5_K share: six bits each.
MII_INLINE void six_bits(const Byte* s, int j, int& scale, int& offset) {
  if (j < 4) {
    scale = s[j] & 63;
    offset = s[j + 4] & 63;
  } else {
    scale = (s[j + 4] & 15) | s[j - 4] >> 6 << 4;
    offset = s[j + 4] >> 4 | s[j] >> 6 << 4;
  }
}

struct Q4_K {
  static constexpr int kType = 12, kNumbers = 256, kBytes = 144;
  MII_INLINE void unpack(const Byte* b, float* y) {
    const float d = half(b), dmin = half(b + 2);
    for (int group = 0; group < 8; ++group) {  // of 32 numbers
      int scale, offset;
      six_bits(b + 4, group, scale, offset);
      const float ds = d * static_cast<float>(scale), mo = dmin * static_cast<float>(offset);
      const Byte* q = b + 16 + group / 2 * 32;
      const int shift = group % 2 * 4;
      for (int i = 0; i < 32; ++i) y[32 * group + i] = ds * static_cast<float>(q[i] >> shift & 15) - mo;
    }
  }
};

struct Q5_K {
  static constexpr int kType = 13, kNumbers = 256, kBytes = 176;
  MII_INLINE void unpack(const Byte* b, float* y) {
    const float d = half(b), dmin = half(b + 2);
    for (int group = 0; group < 8; ++group) {
      int scale, offset;
      six_bits(b + 4, group, scale, offset);
      const float ds = d * static_cast<float>(scale), mo = dmin * static_cast<float>(offset);
      const Byte *high = b + 16, *q = b + 48 + group / 2 * 32;
      const int shift = group % 2 * 4;
      for (int i = 0; i < 32; ++i) {
        const int number = (q[i] >> shift & 15) | (high[i] >> group & 1) << 4;
        y[32 * group + i] = ds * static_cast<float>(number) - mo;
      }
    }
  }
};

struct Q6_K {
  static constexpr int kType = 14, kNumbers = 256, kBytes = 210;
  MII_INLINE void unpack(const Byte* b, float* y) {
    const float d = half(b + 208);
    for (int group = 0; group < 16; ++group) {
      const int part = group / 2;  // of 32 numbers: two bits of `high` each, four bits of `low`
      const Byte *low = b + part / 4 * 64 + part % 2 * 32 + group % 2 * 16, *high = b + 128 + part / 4 * 32 + group % 2 * 16;
      const int low_shift = part / 2 % 2 * 4, high_shift = part % 4 * 2;
      const float scale = d * static_cast<float>(static_cast<int8_t>(b[192 + group]));
      for (int i = 0; i < 16; ++i) {
        const int number = (low[i] >> low_shift & 15) | (high[i] >> high_shift & 3) << 4;
        y[16 * group + i] = scale * static_cast<float>(number - 32);
      }
    }
  }
};

constexpr int8_t kNonLinear[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

struct IQ4_NL {
  static constexpr int kType = 20, kNumbers = 32, kBytes = 18;
  MII_INLINE void unpack(const Byte* b, float* y) {
    const float d = half(b);
    for (int i = 0; i < 16; ++i) y[i] = d * static_cast<float>(kNonLinear[b[2 + i] & 15]);
    for (int i = 0; i < 16; ++i) y[16 + i] = d * static_cast<float>(kNonLinear[b[2 + i] >> 4]);
  }
};

struct IQ4_XS {
  static constexpr int kType = 23, kNumbers = 256, kBytes = 136;
  MII_INLINE void unpack(const Byte* b, float* y) {
    const float d = half(b);
    for (int group = 0; group < 8; ++group) {
      const int high = b[2 + group / 4] >> (group % 4 * 2) & 3, low = b[4 + group / 2] >> (group % 2 * 4) & 15;
      const float scale = d * static_cast<float>((low | high << 4) - 32);
      const Byte* q = b + 8 + 16 * group;
      float* out = y + 32 * group;
      for (int i = 0; i < 16; ++i) out[i] = scale * static_cast<float>(kNonLinear[q[i] & 15]);
      for (int i = 0; i < 16; ++i) out[16 + i] = scale * static_cast<float>(kNonLinear[q[i] >> 4]);
    }
  }
};

template <class Format, class T> void unpack_range(const MiiUnpack& a, int64_t begin, int64_t end) {
  const Byte* from = static_cast<const Byte*>(a.blocks) + begin * Format::kBytes;
  T* out = static_cast<T*>(a.out) + begin * Format::kNumbers;
  for (int64_t block = begin; block < end; ++block, from += Format::kBytes, out += Format::kNumbers) {
    alignas(64) float numbers[Format::kNumbers];
    Format::unpack(from, numbers);
    for (int i = 0; i < Format::kNumbers; i += W) store(out + i, load(numbers + i));
  }
}

template <class Format> int32_t unpack_all(const MiiUnpack& a) {
  with_dtype(a.dtype, [&](auto tag) {
    parallel(a.count, Format::kNumbers,
             [&](int64_t begin, int64_t end) { unpack_range<Format, decltype(tag)>(a, begin, end); });
  });
  return MII_OK;
}

// The first of the formats whose number it is.
template <class... Formats> int32_t dispatch(const MiiUnpack& a) {
  int32_t status = MII_UNSUPPORTED;
  const bool known = ((a.type == Formats::kType && (status = unpack_all<Formats>(a), true)) || ...);
  return known ? status : MII_UNSUPPORTED;
}

}  // namespace

int32_t unpack(const MiiUnpack& a) {
  return dispatch<Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS>(a);
}

}  // namespace mii::cpu::MII_ISA
