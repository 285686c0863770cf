// Functions of the driver by way of the runtime, so that nothing has to be linked with the driver.
#pragma once
#include <cuda_runtime.h>

namespace mii {

// The address of a function as of a driver version (12000 for 12.0); null: not there.
void* driver_function(const char* name, unsigned version);

}  // namespace mii
