// Attention with heads of 80 elements.
#include "attention_instance.cuh"

namespace mii {
template int32_t launch_tiled<80>(const AttentionParams&, Bounds, void*);
template int32_t launch_decode<80>(const DecodeAttentionParams&, Bounds, void*);
template int tiled_occupancy<80>();
}  // namespace mii
