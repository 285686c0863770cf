// Attention with heads of 192 elements.
#include "attention_instance.cuh"

namespace mii {
template int32_t launch_tiled<192>(const AttentionParams&, Bounds, void*);
template int tiled_occupancy<192>();
}  // namespace mii
