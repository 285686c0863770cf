// What a thread does between two looks at something that another one is about to change.
#pragma once

namespace mii::cpu {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

}  // namespace mii::cpu
