// The host side of attention: what its files (plan, one per head size, generic, dispatch) know of each other.
#pragma once
#include "launch.cuh"
#include "mii/attention_work.cuh"

namespace mii {

// Fills a.work on the device. `may_part`: launch_hopper goes before launch_tiled, for prompts that the list gives it.
int32_t launch_plan(const MiiAttention& a, Bounds bounds, bool may_part, void* stream);

// The tensor-core kernel, for D in 64, 80, 96, 128, 192 and 256, in attention_d<D>.cu.
template <int D>
int32_t launch_tiled(const AttentionParams& p, Bounds bounds, void* stream);
// The one for a step's own tokens as their product left them, up to heads of kAloneHead.
template <int D>
int32_t launch_decode(const DecodeAttentionParams& n, Bounds bounds, void* stream);
// How many CTAs of the first a multiprocessor of the current device holds; 0 if the device cannot run it.
template <int D>
int tiled_occupancy();

// The prompts of a step by Hopper's warpgroup products, in attention_hopper.cu, where the work list says so.
// `hopper_serves` answers from what plan and layers of a step have in common.
bool hopper_serves(const MiiAttention& a);
int32_t launch_hopper(const AttentionParams& p, void* stream);

// One warp for each query row and head: any dtype, head size up to 512, any alignment.
int32_t launch_generic(const MiiAttention& a, void* stream);

}  // namespace mii
