// What the C functions of all operations have in common: how they are exported, formats, return codes, a step's counts.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
#define MII_API extern "C" __attribute__((visibility("default")))
#else
#define MII_API __attribute__((visibility("default")))
#endif

enum MiiDtype { MII_F32 = 0, MII_F16 = 1, MII_BF16 = 2 };

enum MiiStatus {
  MII_OK = 0,
  MII_INVALID = 1,      // an argument that no body of this operation takes
  MII_UNSUPPORTED = 2,  // a valid argument that this library has no kernel for: the caller falls back to the reference
  MII_DEVICE = 3,       // the device reported an error
};

// What one step works on, all int32, written by the host into one pinned buffer and copied in one go.
enum MiiCounts { MII_NUM_SEQS = 0, MII_NUM_TOKENS = 1, MII_NUM_SAMPLES = 2, MII_NUM_UPDATES = 3, MII_COUNTS = 8 };
