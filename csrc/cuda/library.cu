// What libmii_cuda.so says about itself, and the helpers of launch.cuh that need a home.
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "launch.cuh"
#include "mii/abi.h"

namespace mii {
namespace {

thread_local char last_error[512] = "";

constexpr int kMaxDevices = 64;

Card read_card(int device) {
  Card card = {};
  cudaDeviceGetAttribute(&card.major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&card.minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&card.sms, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&card.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return card;
}

}  // namespace

int32_t fail(int32_t code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof(last_error), format, arguments);
  va_end(arguments);
  return code;
}

const Card& card() {
  static Card cards[kMaxDevices];
  static std::once_flag read[kMaxDevices];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device < 0 || device >= kMaxDevices) device = 0;
  std::call_once(read[device], [device] { cards[device] = read_card(device); });
  return cards[device];
}

bool overlap_allowed() {
  static const char* const off = std::getenv("MII_NO_PDL");
  static const bool allowed = off == nullptr || *off == '\0' || std::strcmp(off, "0") == 0;
  return allowed && card().major == 9;
}

}  // namespace mii

#define MII_TEXT_OF(...) #__VA_ARGS__
#define MII_TEXT(...) MII_TEXT_OF(__VA_ARGS__)

extern "C" {

const char* mii_last_error(void) { return mii::last_error; }

const char* mii_build_info(void) {
  return "CUDA " MII_TEXT(__CUDACC_VER_MAJOR__) "." MII_TEXT(__CUDACC_VER_MINOR__) ", architectures " MII_TEXT(
      __CUDA_ARCH_LIST__);
}

int64_t mii_struct_size(const char* name) {
  struct Entry {
    const char* name;
    int64_t size;
  };
  static const Entry entries[] = {
      {"MiiPrepare", sizeof(MiiPrepare)},     {"MiiEmbedding", sizeof(MiiEmbedding)},
      {"MiiNorm", sizeof(MiiNorm)},           {"MiiRopeKv", sizeof(MiiRopeKv)},
      {"MiiAttention", sizeof(MiiAttention)}, {"MiiActivation", sizeof(MiiActivation)},
      {"MiiGather", sizeof(MiiGather)},       {"MiiSample", sizeof(MiiSample)},
      {"MiiLinear", sizeof(MiiLinear)},       {"MiiLinearStreamed", sizeof(MiiLinearStreamed)},
      {"MiiProduct", sizeof(MiiProduct)},     {"MiiProductChoice", sizeof(MiiProductChoice)},
      {"MiiMoeRoute", sizeof(MiiMoeRoute)},   {"MiiMoeLinear", sizeof(MiiMoeLinear)},
      {"MiiMoeCombine", sizeof(MiiMoeCombine)}, {"MiiAllReduce", sizeof(MiiAllReduce)},
      {"MiiAllReduceNorm", sizeof(MiiAllReduceNorm)}, {"MiiAllGather", sizeof(MiiAllGather)},
      {"MiiCopiedSum", sizeof(MiiCopiedSum)}, {"MiiCopiedSumNorm", sizeof(MiiCopiedSumNorm)},
      {"MiiPeerMemory", sizeof(MiiPeerMemory)}, {"MiiEventWait", sizeof(MiiEventWait)},
      {"MiiSampleShard", sizeof(MiiSampleShard)}, {"MiiMoeStream", sizeof(MiiMoeStream)},
      {"MiiDecodeAttention", sizeof(MiiDecodeAttention)},
  };
  for (const Entry& entry : entries) {
    if (std::strcmp(entry.name, name) == 0) return entry.size;
  }
  return 0;
}

}  // extern "C"
