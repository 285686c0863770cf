// What a library says about itself.
#pragma once
#include "mii/abi/base.h"

MII_API const char* mii_last_error(void);
MII_API const char* mii_build_info(void);         // compiler, targets, and on the CPU the instruction set in use
MII_API int64_t mii_struct_size(const char* name);  // sizeof by struct name, 0 if unknown: the binding checks itself with it
