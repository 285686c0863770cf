// Attention with heads of 128 elements.
#include "attention_instance.cuh"

namespace mii {
template int32_t launch_tiled<128>(const AttentionParams&, Bounds, void*);
template int32_t launch_decode<128>(const DecodeAttentionParams&, Bounds, void*);
template int tiled_occupancy<128>();
}  // namespace mii
