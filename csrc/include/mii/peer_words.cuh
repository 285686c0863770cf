// What ranks write into one another's memory: words of 8 bytes, each written and read as a whole. One that is never zero, in a
// place that held zero, says by itself that it is there: no fence, no flag that comes after, no order among words. Two words
// make one access of 16 bytes.
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
// Of this card's own memory, before the kernel ends.
__device__ __forceinline__ void clear_words(void* address) { store_words(address, 0, 0); }
__device__ __forceinline__ void clear_word(void* address) { store_word(address, 0); }
// For what kernels of one stream leave to one another, past the cache of the SM.
__device__ __forceinline__ uint32_t load_state(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
// A word that another rank's stream has written, and with it all that this stream had written before.
__device__ __forceinline__ uint32_t load_said(const void* address) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
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
