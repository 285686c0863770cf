// Attention with heads of 96 elements.
#include "attention_instance.cuh"

namespace mii {
template int32_t launch_tiled<96>(const AttentionParams&, Bounds, void*);
template int32_t launch_decode<96>(const DecodeAttentionParams&, Bounds, void*);
template int tiled_occupancy<96>();
}  // namespace mii
