// csrc/include/mii/wide_tile.cuh itself, without the fences that it spells in PTX.
#pragma once
#include "mii/activation.cuh"
#include "mii/wgmma.cuh"

#define asm
#define volatile(...)
#include_next "mii/wide_tile.cuh"
#undef asm
#undef volatile
