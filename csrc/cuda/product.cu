// Products by cuBLASLt with the algorithm that is fastest for a shape, which need not be the one that it proposes first.
#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "cublas_lt.cuh"
#include "launch.cuh"
#include "mii/abi/linear.h"

namespace mii {
namespace {

constexpr int kMostProposals = 32;
constexpr int kFinalists = 3;  // besides the one that is proposed first
constexpr int kPasses = 3;
constexpr int kMostCalls = 64;  // of a pass

// What cuBLASLt knows of a product. It counts columns first, so its out^T is weight x^T, and all three lie by columns.
struct Described {
  LtObject weight = nullptr, x = nullptr, out = nullptr;
};

struct Device {
  LtHandle handle = nullptr;
  LtObject product = nullptr;
  std::map<std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int32_t>, Described> shapes;
};

std::mutex devices_lock;
Device devices[64];

bool describe(const CublasLt& lt, const MiiLinear& a, Described& d) {
  const int type = a.dtype == MII_BF16 ? kLtBf16 : kLtF16;
  return lt.create_layout(&d.weight, type, a.in_features, a.out_features, a.in_features) == 0 &&
         lt.create_layout(&d.x, type, a.in_features, a.rows, a.x_stride) == 0 &&
         lt.create_layout(&d.out, type, a.out_features, a.rows, a.out_stride) == 0;
}

// The current device with all that this product needs, or null.
Device* prepare(const CublasLt& lt, const MiiLinear& a, Described& described) {
  int index = 0;
  if (cudaGetDevice(&index) != cudaSuccess || index >= 64) return nullptr;
  Device& device = devices[index];
  const std::lock_guard<std::mutex> guard(devices_lock);
  if (device.handle == nullptr) {
    const int32_t transposed = kLtTransposed;
    if (lt.create_product(&device.product, kLtCompute32f, kLtF32) != 0 ||
        lt.set_product(device.product, kLtTransposeA, &transposed, sizeof transposed) != 0 || lt.create(&device.handle) != 0) {
      return nullptr;
    }
  }
  Described& known = device.shapes[{a.rows, a.in_features, a.out_features, a.x_stride, a.out_stride, a.dtype}];
  if (known.out == nullptr && !describe(lt, a, known)) return nullptr;
  described = known;
  return &device;
}

int32_t check(const MiiProduct& args) {
  const MiiLinear& a = args.product;
  MII_REQUIRE(a.rows >= 0 && a.in_features > 0 && a.out_features > 0 && a.bias == nullptr, MII_INVALID,
              "product: %lld rows of %lld features to %lld; it takes no bias", (long long)a.rows, (long long)a.in_features,
              (long long)a.out_features);
  const bool fits = (a.dtype == MII_BF16 || a.dtype == MII_F16) && a.rows > 0 && aligned(a.out, 256) && aligned(a.x, 256);
  return fits ? MII_OK
              : fail(MII_UNSUPPORTED, "product: dtype code %d, %lld rows, or addresses that are not whole 256 bytes", a.dtype,
                     (long long)a.rows);
}

int32_t multiply(const CublasLt& lt, const Device& device, const Described& d, const MiiProduct& args, const void* weight,
                 const LtAlgorithm& algorithm, cudaStream_t stream) {
  const float one = 1.0f, zero = 0.0f;
  const MiiLinear& a = args.product;
  return lt.multiply(device.handle, device.product, &one, weight, d.weight, a.x, d.x, &zero, a.out, d.out, a.out, d.out,
                     &algorithm, a.workspace, args.workspace_bytes, stream);
}

// What cuBLASLt proposes for this product with so much workspace, its first proposal first.
void propose(const CublasLt& lt, const Device& device, const Described& d, int64_t workspace, std::vector<LtAlgorithm>& all) {
  LtObject preference = nullptr;
  if (lt.create_preference(&preference) != 0) return;
  const size_t most = workspace;
  LtProposal found[kMostProposals] = {};
  int32_t count = 0;
  if (lt.set_preference(preference, kLtMostWorkspace, &most, sizeof most) == 0 &&
      lt.propose(device.handle, device.product, d.weight, d.x, d.out, d.out, preference, kMostProposals, found, &count) == 0) {
    for (int i = 0; i < count; ++i) {
      const auto same = [&](const LtAlgorithm& other) {
        return std::memcmp(&other, &found[i].algorithm, sizeof other) == 0;
      };
      if (found[i].status == 0 && std::none_of(all.begin(), all.end(), same)) all.push_back(found[i].algorithm);
    }
  }
  lt.destroy_preference(preference);
}

// Times calls between two events; nothing is waited for before the end of a round.
class Timer {
 public:
  explicit Timer(cudaStream_t stream) : stream_(stream) {}
  ~Timer() {
    for (const cudaEvent_t event : events_) cudaEventDestroy(event);
  }
  bool mark() {
    cudaEvent_t event = nullptr;
    if (cudaEventCreate(&event) != cudaSuccess) return false;
    events_.push_back(event);
    return cudaEventRecord(event, stream_) == cudaSuccess;
  }
  bool wait() { return !events_.empty() && cudaEventSynchronize(events_.back()) == cudaSuccess; }
  // Microseconds from one mark to the next.
  float after(size_t mark) const {
    float milliseconds = 0.0f;
    cudaEventElapsedTime(&milliseconds, events_[mark], events_[mark + 1]);
    return milliseconds * 1e3f;
  }

 private:
  cudaStream_t stream_;
  std::vector<cudaEvent_t> events_;
};

struct Candidate {
  LtAlgorithm algorithm;
  int number;  // in the order in which they are proposed
  float time;  // microseconds
};

// Runs each candidate `calls(candidate)` times, `passes` times over, and notes the median time of a call.
template <typename Calls, typename Run>
bool time_all(std::vector<Candidate>& candidates, int passes, cudaStream_t stream, Calls calls, Run run) {
  Timer timer(stream);
  bool right = timer.mark();
  for (int pass = 0; pass < passes; ++pass) {
    for (const Candidate& candidate : candidates) {
      for (int call = calls(candidate); call > 0; --call) right = run(candidate.algorithm) && right;
      right = timer.mark() && right;
    }
  }
  if (!timer.wait() || !right) return false;
  for (size_t i = 0; i < candidates.size(); ++i) {
    std::vector<float> times;
    for (int pass = 0; pass < passes; ++pass) times.push_back(timer.after(pass * candidates.size() + i) / calls(candidates[i]));
    std::nth_element(times.begin(), times.begin() + passes / 2, times.end());
    candidates[i].time = times[passes / 2];
  }
  return true;
}

}  // namespace
}  // namespace mii

extern "C" int32_t mii_product(const MiiProduct* args, void* stream) {
  using namespace mii;
  if (const int32_t code = check(*args); code != MII_OK) return code;
  const CublasLt* lt = cublas_lt();
  Described d;
  const Device* device = lt == nullptr ? nullptr : prepare(*lt, args->product, d);
  if (device == nullptr) return fail(MII_UNSUPPORTED, "product: there is no cuBLASLt");
  const auto& algorithm = *static_cast<const LtAlgorithm*>(args->algorithm);
  const int32_t status = multiply(*lt, *device, d, *args, args->product.weight, algorithm, static_cast<cudaStream_t>(stream));
  return status == 0 ? MII_OK : fail(MII_UNSUPPORTED, "product: cuBLASLt: status %d", status);
}

extern "C" int32_t mii_product_choose(const MiiProductChoice* a, void* stream) {
  using namespace mii;
  if (const int32_t code = check(a->product); code != MII_OK) return code;
  MII_REQUIRE(a->num_weights > 0, MII_INVALID, "product_choose: no weights");
  const CublasLt* lt = cublas_lt();
  Described d;
  const Device* device = lt == nullptr ? nullptr : prepare(*lt, a->product.product, d);
  if (device == nullptr) return fail(MII_UNSUPPORTED, "product_choose: there is no cuBLASLt");
  const auto on = static_cast<cudaStream_t>(stream);
  int64_t turn = 0;
  const auto run = [&](const LtAlgorithm& algorithm) {
    return multiply(*lt, *device, d, a->product, a->weights[turn++ % a->num_weights], algorithm, on) == 0;
  };

  std::vector<LtAlgorithm> proposed;
  propose(*lt, *device, d, a->product.workspace_bytes, proposed);
  propose(*lt, *device, d, 0, proposed);
  std::vector<Candidate> candidates;
  for (const LtAlgorithm& algorithm : proposed) {  // the first run of each loads its code
    if (run(algorithm)) candidates.push_back({algorithm, static_cast<int>(candidates.size()), 0.0f});
  }
  if (candidates.empty()) return fail(MII_UNSUPPORTED, "product_choose: cuBLASLt proposes nothing");
  constexpr int kTries = 2;
  if (!time_all(candidates, 1, on, [](const Candidate&) { return kTries; }, run)) {
    cudaGetLastError();
    return fail(MII_DEVICE, "product_choose: an algorithm failed");
  }
  const auto faster = [](const Candidate& x, const Candidate& y) { return x.time < y.time; };
  std::sort(candidates.begin() + 1, candidates.end(), faster);
  if (candidates.size() > kFinalists + 1) candidates.resize(kFinalists + 1);
  std::vector<int> calls(kMostProposals * 2);
  for (const Candidate& candidate : candidates) {
    calls[candidate.number] = std::clamp(static_cast<int>(a->patience * 1e-3f / std::max(candidate.time, 1.0f)), 3, kMostCalls);
  }
  if (!time_all(candidates, kPasses, on, [&](const Candidate& c) { return calls[c.number]; }, run)) {
    cudaGetLastError();
    return fail(MII_DEVICE, "product_choose: an algorithm failed");
  }
  const Candidate& best = *std::min_element(candidates.begin(), candidates.end(), faster);
  std::memcpy(a->product.algorithm, &best.algorithm, sizeof best.algorithm);
  a->times[0] = candidates[0].time;
  a->times[1] = best.time;
  return MII_OK;
}
