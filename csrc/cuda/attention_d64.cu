// Attention with heads of 64 elements.
#include "attention_instance.cuh"

namespace mii {
template int32_t launch_tiled<64>(const AttentionParams&, Bounds, void*);
template int32_t launch_decode<64>(const DecodeAttentionParams&, Bounds, void*);
template int tiled_occupancy<64>();
}  // namespace mii
