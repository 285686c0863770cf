// Philox4x32-10: counter-based random numbers, the same on the CPU, in CUDA and in mii/ops/philox.py.
//
// Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
#pragma once
#include <stdint.h>

// A copy of its own for every translation unit: the CPU library compiles this header for several instruction sets.
#if defined(__CUDACC__)
#define MII_SHARED static __host__ __device__ __forceinline__
#else
#define MII_SHARED static inline __attribute__((always_inline))
#endif

namespace mii {

struct Philox {
  uint32_t word[4];
};

MII_SHARED Philox philox4x32(const Philox& counter, uint32_t key0, uint32_t key1) {
  Philox x = counter;
  for (int round = 0; round < 10; ++round) {
    const uint64_t even = 0xD2511F53ull * x.word[0], odd = 0xCD9E8D57ull * x.word[2];
    x = Philox{{static_cast<uint32_t>(odd >> 32) ^ x.word[1] ^ key0, static_cast<uint32_t>(odd),
                static_cast<uint32_t>(even >> 32) ^ x.word[3] ^ key1, static_cast<uint32_t>(even)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return x;
}

// The 62 random bits that decide the token at `position` of a request with `seed`.
MII_SHARED uint64_t random62(int64_t seed, int32_t position) {
  const uint64_t key = static_cast<uint64_t>(seed);
  const Philox x = philox4x32(Philox{{static_cast<uint32_t>(position), 0, 0, 0}}, static_cast<uint32_t>(key),
                              static_cast<uint32_t>(key >> 32));
  return static_cast<uint64_t>(x.word[0] >> 1) << 31 | x.word[1] >> 1;
}

}  // namespace mii
