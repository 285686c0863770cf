// Runs csrc/include/mii/all_reduce.cuh and copied_sum.cuh on the host: all ranks at once, every CTA in a thread of its own, with
// words that overtake one another on their way between ranks. Rounds of every kind follow one another in the same memory.
#include "card.h"

#include <climits>
#include <memory>
#include <thread>

#undef __shared__
#define __shared__ static thread_local  // a CTA is a thread of the host
#define __grid_constant__
#define blockDim (card::Index{static_cast<int>(card::threads.size())})

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

#include "mii/all_reduce.cuh"
#include "mii/copied_sum.cuh"

namespace {

using mii::kPack;

constexpr int kHalf = 1 << 18, kPlaces = 4, kPlace = 1 << 13;
constexpr uint64_t kSecond = 1000000000;

// The memories of all ranks.
struct World {
  struct alignas(32) Memory {
    char bytes[mii::kPeerHeader + 2 * kHalf + 64];  // the last 64 belong to nobody
    alignas(32) char copies[kPlaces * kPlace];
  };
  int size;
  std::vector<std::unique_ptr<Memory>> memory;
  std::vector<int32_t> lost;
  uint64_t patience = 100 * kSecond;

  World(int size, uint32_t round) : size(size), lost(size) {
    for (int r = 0; r < size; ++r) {
      memory.push_back(std::make_unique<Memory>());
      std::memset(memory[r].get(), 0, sizeof(Memory));
      state(r).round = round;
    }
  }
  mii::PeerState& state(int r) { return *reinterpret_cast<mii::PeerState*>(memory[r]->bytes); }
  mii::Peers<8> peers(int rank) {
    mii::Peers<8> peers = {};
    for (int r = 0; r < size; ++r) peers.memory[r] = memory[r]->bytes;
    peers.lost = &lost[rank], peers.half = kHalf, peers.patience = patience, peers.rank = rank, peers.size = size;
    return peers;
  }
};

template <int Slots>
mii::Peers<Slots> narrowed(const mii::Peers<8>& peers) {
  mii::Peers<Slots> result = {};
  std::copy(peers.memory, peers.memory + Slots, result.memory);
  result.lost = peers.lost, result.half = peers.half, result.patience = peers.patience;
  result.rank = peers.rank, result.size = peers.size;
  return result;
}

// One kernel of one rank: its CTAs at once.
void run(int seed, int ctas, int threads, const std::function<void()>& kernel) {
  std::vector<std::thread> all;
  for (int cta = 0; cta < ctas; ++cta) {
    all.emplace_back([=] {
      card::chance.seed(1000 * seed + cta);
      card::block = {cta}, card::grid = {ctas};
      card::run_cta(threads, [&] { card::threads[card::current].waited = true, kernel(); });
    });
  }
  for (std::thread& each : all) each.join();
}

template <typename T>
std::vector<T> random(size_t count, int seed) {
  std::mt19937 chance(seed);
  std::vector<T> values(count);
  for (T& value : values) value = mii::from_float<T>(static_cast<int>(chance() % 2001 - 1000) / 300.0f);
  // Packs without a bit: of all ranks, of one, and zeros of either sign.
  for (size_t i = 0; i < count; ++i) {
    if (i / 8 % 5 == 1) values[i] = mii::from_float<T>(0.0f);
    if (i / 8 % 5 == 2 && (seed + i / 40) % 3 == 0) values[i] = mii::from_float<T>(i % 2 ? 0.0f : -0.0f);
  }
  return values;
}

template <typename T>
bool same(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

// ---- what one rank does in a round, and what must come of it ----------------------------------------------------------
enum Kind { kSum, kSumTwo, kNorm, kNormTwo, kGather };

struct Call {
  Kind kind;
  int rows, width, ctas;  // width in packs
};

template <typename T>
struct Tensors {
  std::vector<T> x, residual, weight, out;
};

template <typename T>
Tensors<T> tensors(const Call& c, int size, int rank, int round) {
  const size_t count = size_t(c.rows) * c.width * kPack<T>;
  const int seed = 100 * round;
  return {random<T>(count, seed + rank + 1), random<T>(count, seed + 50), random<T>(c.width * kPack<T>, seed + 51),
          std::vector<T>(c.kind == kGather ? count * size : count)};
}

template <typename T>
std::vector<T> sums(const std::vector<Tensors<T>>& all) {
  std::vector<T> result(all[0].x.size());
  for (size_t i = 0; i < result.size(); ++i) {
    float sum = mii::to_float(all[0].x[i]);
    for (size_t r = 1; r < all.size(); ++r) sum += mii::to_float(all[r].x[i]);
    result[i] = mii::from_float<T>(sum);
  }
  return result;
}

template <typename T, int Slots>
void launch(const Call& c, Tensors<T>& t, const mii::Peers<8>& wide, int seed) {
  const auto peers = narrowed<Slots>(wide);
  const int64_t packs = int64_t(c.rows) * c.width;
  if (c.kind == kSum || c.kind == kSumTwo) {
    const int64_t part = c.kind == kSum ? packs : (packs + peers.size - 1) / peers.size;
    const mii::SumArgs<T, Slots> args = {peers, t.x.data(), packs, part};
    if (c.kind == kSum) run(seed, c.ctas, mii::kSumThreads, [=] { mii::all_reduce_packs<T, Slots, false>(args); });
    else run(seed, c.ctas, mii::kSumThreads, [=] { mii::all_reduce_packs<T, Slots, true>(args); });
    return;
  }
  if (c.kind == kGather) {
    const int64_t words = packs * 4;
    const mii::GatherArgs<Slots> args = {peers, reinterpret_cast<uint32_t*>(t.out.data()),
                                         reinterpret_cast<const uint32_t*>(t.x.data()), words};
    return run(seed, c.ctas, mii::kSumThreads, [=] { mii::all_gather_words<Slots>(args); });
  }
  mii::NormArgs<T> norm = {};
  norm.out = t.out.data(), norm.x = t.x.data(), norm.residual = t.residual.data(), norm.weight = t.weight.data();
  norm.rows = c.rows, norm.width = c.width * kPack<T>, norm.x_stride = norm.out_stride = norm.width, norm.kind = MII_RMS;
  norm.inverse_width = 1.0f / norm.width, norm.eps = 1e-5f;
  const int part = (c.width + (c.kind == kNorm ? 2 : peers.size) - 1) / (c.kind == kNorm ? 2 : peers.size);
  const mii::SumNormArgs<T, Slots> args = {peers, norm, part};
  const int threads = (part + 31) / 32 * 32;
  if (c.kind == kNorm) run(seed, c.ctas, threads, [=] { mii::all_reduce_norm_rows<T, Slots, 2, false>(args); });
  else run(seed, c.ctas, threads, [=] { mii::all_reduce_norm_rows<T, Slots, Slots, true>(args); });
}

template <typename T>
void check_norm(const Call& c, const std::vector<T>& sum, const Tensors<T>& before, const Tensors<T>& after, int rank) {
  const int width = c.width * kPack<T>;
  for (int row = 0; row < c.rows; ++row) {
    double squares = 0.0;
    for (int i = row * width; i < (row + 1) * width; ++i) {
      const T want = mii::from_float<T>(mii::to_float(before.residual[i]) + mii::to_float(sum[i]));
      const bool zeros = mii::to_float(after.residual[i]) == 0.0f && mii::to_float(want) == 0.0f;
      if (!same(after.residual[i], want) && !zeros) card::refuse("a residual is wrong");
      squares += double(mii::to_float(want)) * mii::to_float(want);
    }
    const double scale = 1.0 / std::sqrt(squares / width + 1e-5);
    for (int i = 0; i < width; ++i) {
      const float normed = mii::rounded<T>(static_cast<float>(mii::to_float(after.residual[row * width + i]) * scale));
      const float want = mii::rounded<T>(normed * mii::to_float(before.weight[i]));
      const float unit = sizeof(T) == 4 ? 1e-5f : 1.0f / 64;
      if (std::abs(mii::to_float(after.out[row * width + i]) - want) > unit * (std::abs(want) + 1.0f)) {
        std::printf("rank %d, row %d, element %d: ", rank, row, i), card::refuse("a norm is wrong");
      }
    }
  }
}

template <typename T>
void check(const Call& c, const std::vector<Tensors<T>>& before, const std::vector<Tensors<T>>& after) {
  const std::vector<T> sum = sums(before);
  for (size_t r = 0; r < after.size(); ++r) {
    if (c.kind == kSum || c.kind == kSumTwo) {
      for (size_t i = 0; i < sum.size(); ++i) {
        const bool zeros = mii::to_float(after[r].x[i]) == 0.0f && mii::to_float(sum[i]) == 0.0f;
        if (!same(after[r].x[i], sum[i]) && !zeros) card::refuse("a sum is wrong");
        if (!same(after[r].x[i], after[0].x[i])) card::refuse("ranks differ");
      }
    } else if (c.kind == kGather) {
      for (size_t i = 0; i < after[r].out.size(); ++i) {
        if (!same(after[r].out[i], before[i / sum.size()].x[i % sum.size()])) card::refuse("a gather is wrong");
      }
    } else {
      if (std::memcmp(after[r].x.data(), before[r].x.data(), sum.size() * sizeof(T))) card::refuse("x was changed");
      check_norm(c, sum, before[r], after[r], static_cast<int>(r));
      if (std::memcmp(after[r].out.data(), after[0].out.data(), sum.size() * sizeof(T))) card::refuse("ranks differ");
    }
  }
}

// All ranks make these calls, each at its own pace.
template <typename T, int Slots>
void check_calls(int size, const std::vector<Call>& calls, uint32_t first_round, const char* name) {
  World world(size, first_round);
  std::vector<std::vector<Tensors<T>>> before, after;
  for (size_t i = 0; i < calls.size(); ++i) {
    before.emplace_back();
    for (int r = 0; r < size; ++r) before[i].push_back(tensors<T>(calls[i], size, r, static_cast<int>(i)));
  }
  after = before;
  std::vector<std::thread> ranks;
  for (int r = 0; r < size; ++r) {
    ranks.emplace_back([&, r] {
      for (size_t i = 0; i < calls.size(); ++i) {
        launch<T, Slots>(calls[i], after[i][r], world.peers(r), static_cast<int>(10 * i) + r);
      }
    });
  }
  for (std::thread& each : ranks) each.join();
  uint32_t round = first_round;
  for (size_t i = 0; i < calls.size(); ++i) round = mii::round_after(round), check(calls[i], before[i], after[i]);
  if (!card::flights.empty()) card::refuse("a word is on its way that nobody waited for");
  for (int r = 0; r < size; ++r) {
    if (world.state(r).round != round || world.state(r).arrived || world.lost[r]) card::refuse("the state is wrong");
    for (int i = 0; i < 2 * kHalf + 64; ++i) {
      if (world.memory[r]->bytes[mii::kPeerHeader + i] == 0) continue;
      card::refuse(i < 2 * kHalf ? "something was left" : "wrote past the end");
    }
  }
  std::printf("%d ranks, %zu rounds of %s: right\n", size, calls.size(), name);
}

// A rank that never comes is given up by all others, also by one that begins when another has given it up long ago, and is not
// waited for again.
void check_lost() {
  World world(3, 6);
  std::vector<std::thread> ranks;
  for (const int r : {0, 2}) {
    ranks.emplace_back([&, r] {
      if (r == 2) std::this_thread::sleep_for(std::chrono::milliseconds(700));
      for (int i = 0; i < 3; ++i) {
        const Call call = {i == 1 ? kSumTwo : i == 2 ? kGather : kSum, 1, 40, 1};
        Tensors<float> mine = tensors<float>(call, 3, r, i);
        mii::Peers<8> peers = world.peers(r);
        peers.patience = i == 0 ? kSecond / 10 : 1000 * kSecond;
        launch<float, 4>(call, mine, peers, 10 * i + r);
      }
    });
  }
  for (std::thread& each : ranks) each.join();
  for (const int r : {0, 2}) {
    if (world.lost[r] != 2 || world.state(r).lost != 2 || world.state(r).round != 9) card::refuse("rank 1 is not missed");
  }
  std::puts("3 ranks, one of which is gone: right");
  card::flights.clear(), card::targets.clear();
}

// ---- sums that copy engines carry -----------------------------------------------------------------------------------
// One rank's end: what it sends is copied by a thread of its own, some time later, and then said.
struct CopyEngine {
  World& world;
  int rank;
  std::vector<std::thread> copies;

  void send(const void* x, size_t bytes, uint32_t round) {
    std::thread* before = copies.empty() ? nullptr : &copies.back();
    const std::chrono::microseconds late(card::chance() % 3000);
    char* theirs = world.memory[1 - rank]->bytes;
    char* place = world.memory[1 - rank]->copies + round % kPlaces * kPlace;
    auto previous = before == nullptr ? std::thread() : std::move(*before);
    copies.emplace_back([=, previous = std::move(previous)]() mutable {
      if (previous.joinable()) previous.join();
      std::this_thread::sleep_for(late);
      std::memcpy(place, x, bytes);
      const std::lock_guard lock(card::wires);
      std::memcpy(theirs + mii::kCopiedAt, &round, sizeof round);
    });
  }
  void wait() {
    if (!copies.empty() && copies.back().joinable()) copies.back().join();
  }
};

template <typename T>
void take(const Call& c, Tensors<T>& t, World& world, int rank, uint32_t round, int seed) {
  char* memory = world.memory[rank]->bytes;
  const char* place = world.memory[rank]->copies + round % kPlaces * kPlace;
  const mii::Copied<T> copied = {reinterpret_cast<const T*>(place), memory, &world.lost[rank], world.patience, round, 1 - rank};
  const int64_t packs = int64_t(c.rows) * c.width;
  if (c.kind == kSum) {
    const int ctas = static_cast<int>((packs + mii::kCopiedSumThreads - 1) / mii::kCopiedSumThreads);
    T* x = t.x.data();
    return run(seed, ctas, mii::kCopiedSumThreads, [=] { mii::copied_sum_packs<T>(copied, x, packs); });
  }
  mii::NormArgs<T> norm = {};
  norm.out = t.out.data(), norm.x = t.x.data(), norm.residual = t.residual.data(), norm.weight = t.weight.data();
  norm.rows = c.rows, norm.width = c.width * kPack<T>, norm.x_stride = norm.out_stride = norm.width, norm.kind = MII_RMS;
  norm.inverse_width = 1.0f / norm.width, norm.eps = 1e-5f;
  run(seed, c.rows, (c.width / 2 + 31) / 32 * 32, [=] { mii::copied_sum_norm_rows<T, 2>(copied, norm); });
}

// Two sums are under way at a time, and four places take turns.
template <typename T>
void check_copies(const std::vector<Call>& calls, uint32_t first_round, const char* name) {
  World world(2, 0);
  for (int r = 0; r < 2; ++r) std::memcpy(world.memory[r]->bytes + mii::kCopiedAt, &first_round, sizeof first_round);
  std::vector<std::vector<Tensors<T>>> before;
  for (size_t i = 0; i < calls.size(); ++i) {
    before.emplace_back();
    for (int r = 0; r < 2; ++r) before[i].push_back(tensors<T>(calls[i], 2, r, static_cast<int>(i)));
  }
  std::vector<std::vector<Tensors<T>>> after = before;
  std::vector<std::thread> ranks;
  for (int r = 0; r < 2; ++r) {
    ranks.emplace_back([&, r] {
      CopyEngine engine{world, r};
      const auto send = [&](size_t i) {
        card::chance.seed(10 * i + r);
        engine.send(before[i][r].x.data(), before[i][r].x.size() * sizeof(T), first_round + 1 + static_cast<uint32_t>(i));
      };
      send(0);
      for (size_t i = 0; i < calls.size(); ++i) {
        if (i + 1 < calls.size()) send(i + 1);
        take(calls[i], after[i][r], world, r, first_round + 1 + static_cast<uint32_t>(i), static_cast<int>(10 * i) + r);
      }
      engine.wait();
    });
  }
  for (std::thread& each : ranks) each.join();
  for (size_t i = 0; i < calls.size(); ++i) check(calls[i], before[i], after[i]);
  if (world.lost[0] || world.lost[1]) card::refuse("a rank was given up");
  std::printf("2 ranks, %zu copied sums of %s: right\n", calls.size(), name);
}

// A copy that never comes is given up, and the next one is not waited for.
void check_lost_copy() {
  World world(2, 0);
  for (const uint32_t round : {1u, 2u}) {
    world.patience = round == 1 ? kSecond / 10 : 1000 * kSecond;
    const Call call = {kSum, 1, 40, 1};
    Tensors<float> mine = tensors<float>(call, 2, 0, 1);
    take(call, mine, world, 0, round, 1);
  }
  if (world.lost[0] != 2 || world.state(0).lost != 2) card::refuse("rank 1 is not missed");
  std::puts("2 ranks, one of which sends no copy: right");
}

const std::vector<Call> kCopied = {
    {kSum, 1, 1, 1}, {kNorm, 3, 40, 1}, {kNorm, 2, 64, 1}, {kSum, 1, 300, 1}, {kSum, 1, 256, 1},
    {kNorm, 1, 9, 1}, {kSum, 1, 257, 1}, {kNorm, 4, 41, 1}, {kSum, 1, 5, 1},   {kNorm, 2, 100, 1},
};

const std::vector<Call> kMixed = {
    {kSum, 1, 1, 1},   {kSumTwo, 1, 1, 2}, {kSum, 1, 129, 2},  {kSumTwo, 1, 300, 1}, {kNorm, 3, 40, 2}, {kSumTwo, 1, 5, 1},
    {kGather, 1, 3, 1}, {kNormTwo, 3, 41, 2}, {kSum, 1, 260, 1}, {kNorm, 2, 7, 1},     {kGather, 1, 70, 2}, {kNormTwo, 2, 2, 1},
};

}  // namespace

int main() {
  card::patience = INT_MAX;
  check_calls<float, 2>(2, kMixed, 0, "float32");
  check_calls<__nv_bfloat16, 2>(2, kMixed, 1, "bfloat16");
  check_calls<__half, 4>(3, kMixed, 0xfffffff9u, "float16, across the end of their numbers");
  check_calls<__nv_bfloat16, 4>(4, kMixed, 0xfffffffau, "bfloat16, across the end of their numbers");
  check_calls<float, 8>(5, kMixed, 0, "float32");
  check_lost();
  check_copies<__nv_bfloat16>(kCopied, 0, "bfloat16");
  check_copies<__half>(kCopied, 0xfffffffau, "float16, across the end of their numbers");
  check_lost_copy();
}
