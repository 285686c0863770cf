// Attention with heads of 256 elements.
#include "attention_instance.cuh"

namespace mii {
template int32_t launch_tiled<256>(const AttentionParams&, Bounds, void*);
template int tiled_occupancy<256>();
}  // namespace mii
