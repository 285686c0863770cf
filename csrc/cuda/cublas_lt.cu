// See cublas_lt.cuh.
#include "cublas_lt.cuh"

#include <dlfcn.h>

namespace mii {
namespace {

void* loaded_library() {
  for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"}) {
    if (void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD)) return library;
  }
  return nullptr;
}

template <typename Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

const CublasLt* find_all() {
  static CublasLt lt;
  void* library = loaded_library();
  const bool found = library != nullptr && find(library, "cublasLtCreate", lt.create) &&
                     find(library, "cublasLtMatmulDescCreate", lt.create_product) &&
                     find(library, "cublasLtMatmulDescSetAttribute", lt.set_product) &&
                     find(library, "cublasLtMatrixLayoutCreate", lt.create_layout) &&
                     find(library, "cublasLtMatmulPreferenceCreate", lt.create_preference) &&
                     find(library, "cublasLtMatmulPreferenceSetAttribute", lt.set_preference) &&
                     find(library, "cublasLtMatmulPreferenceDestroy", lt.destroy_preference) &&
                     find(library, "cublasLtMatmulAlgoGetHeuristic", lt.propose) &&
                     find(library, "cublasLtMatmul", lt.multiply);
  return found ? &lt : nullptr;
}

}  // namespace

const CublasLt* cublas_lt() {
  static const CublasLt* const found = find_all();
  return found;
}

}  // namespace mii
