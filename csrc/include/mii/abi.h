// The C interface of mii's kernels: one argument struct and one function per operation.
//
// libmii_cpu.so and libmii_cuda.so export the same names with the same structs, so the Python side (mii/ops/abi.py) binds
// both with one table and the model code never knows which one runs.
//
// Each operation has a header of its own in abi/, which its code includes; this one is for what serves them all.
//
// Rules that hold for every function:
//   * it returns 0, or a code above 0 whose reason mii_last_error() gives (per thread);
//   * every buffer belongs to the caller; nothing is allocated and nothing is synchronised, so every call can be captured
//     in a CUDA graph;
//   * `stream` is a cudaStream_t (ignored on the CPU);
//   * quantities that change from step to step (how many sequences, how long) are read from memory on the device, never
//     from the struct; `rows`, `tokens` and the like in a struct are upper bounds (the bucket's size);
//   * strides count elements, not bytes; the innermost dimension is contiguous.
#pragma once
#include "mii/abi/activation.h"
#include "mii/abi/attention.h"
#include "mii/abi/base.h"
#include "mii/abi/gguf.h"
#include "mii/abi/library.h"
#include "mii/abi/linear.h"
#include "mii/abi/moe.h"
#include "mii/abi/norm.h"
#include "mii/abi/prepare.h"
#include "mii/abi/ranks.h"
#include "mii/abi/recording.h"
#include "mii/abi/rope_kv.h"
#include "mii/abi/rows.h"
#include "mii/abi/sample.h"
