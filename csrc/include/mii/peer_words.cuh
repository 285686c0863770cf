// What ranks write into one another's memory: 8 bytes at a time, 4 of data and 4 that say which round they belong to. Such
// a word is written and read as a whole, so whoever finds the round's number has the data too: no fence, no flag that
// comes after, no order among words. Two words make one access of 16 bytes.
#pragma once
#include <stdint.h>

namespace mii {

__device__ __forceinline__ void store_words(void* address, uint64_t first, uint64_t second) {
  asm volatile("st.relaxed.sys.global.v2.b64 [%0], {%1, %2};" ::"l"(address), "l"(first), "l"(second) : "memory");
}
__device__ __forceinline__ void load_words(const void* address, uint64_t& first, uint64_t& second) {
  asm volatile("ld.relaxed.sys.global.v2.b64 {%0, %1}, [%2];" : "=l"(first), "=l"(second) : "l"(address) : "memory");
}
__device__ __forceinline__ void store_word(void* address, uint64_t word) {
  asm volatile("st.relaxed.sys.global.b64 [%0], %1;" ::"l"(address), "l"(word) : "memory");
}
__device__ __forceinline__ uint64_t load_word(const void* address) {
  uint64_t word;
  asm volatile("ld.relaxed.sys.global.b64 %0, [%1];" : "=l"(word) : "l"(address) : "memory");
  return word;
}
// For what kernels of one stream leave to one another, past the cache of the SM.
__device__ __forceinline__ uint32_t load_state(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
__device__ __forceinline__ void store_host(int32_t* address, int32_t value) {
  asm volatile("st.relaxed.sys.global.s32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

}  // namespace mii
