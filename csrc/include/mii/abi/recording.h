// Recorded steps (CPU library; on the GPU a CUDA graph serves).
#pragma once
#include "mii/abi/base.h"

// Runs calls one after another, as they were recorded with their structs, and stops at the first that fails. One call
// from Python in place of hundreds.
struct MiiCall {
  int32_t (*function)(const void* args, void* stream);
  const void* args;
};
struct MiiRun {
  const struct MiiCall* calls;  // [count]
  int64_t count;
};
MII_API int32_t mii_run(const struct MiiRun* args, void* stream);
