// Sums and gathers of ranks that are processes of one host, in pages that all of them have mapped.
//
// Each rank writes what it has into its own memory, all meet, and each reads the others'. A memory has two halves, which
// take turns from meeting to meeting: who writes into a half again has been at the meeting after the one for which it was
// last written, and nobody came to that before it had read.
//
// Who waits spins for a moment if every rank can have a core to itself, and else sleeps: the one it waits for may need
// this core. It looks now and then whether the others are alive.
#include "ranks.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>

#include "mii/abi/ranks.h"
#include "pause.h"

namespace mii::cpu {
namespace {

constexpr int kSpins = 2000;                // some 50 us
constexpr int64_t kLookNanoseconds = 50000000;  // between looks at who is alive
constexpr int64_t kTwoShots = 8192;         // elements from which ranks share the additions

// At the beginning of each rank's memory. Rank 0's has the place where all meet.
struct Header {
  std::atomic<uint32_t> came;                  // the last meeting that this rank came to
  alignas(64) std::atomic<uint32_t> meetings;  // that are over
  std::atomic<uint32_t> here, sleepers, lost;  // ranks that have come to the next one; 1 + a rank that never will
};
constexpr int64_t kHeader = 192;
static_assert(sizeof(Header) <= kHeader && std::atomic<uint32_t>::is_always_lock_free);

int64_t nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * int64_t{1000000000} + now.tv_nsec;
}

int cores() {
  cpu_set_t cpus;
  return sched_getaffinity(0, sizeof cpus, &cpus) == 0 ? CPU_COUNT(&cpus) : 1;
}

long futex(std::atomic<uint32_t>& word, int operation, uint32_t value, const timespec* timeout) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), operation, value, timeout, nullptr, 0);
}

class Ranks {
 public:
  explicit Ranks(const MiiRanks& a) : a_(a), hall_(header(0)) {}

  int64_t half_bytes() const { return (a_.bytes - kHeader) / 2 / 64 * 64; }
  // The half of rank r for the meeting after `ahead` others.
  char* half(int r, uint32_t ahead = 0) const {
    const uint32_t turn = hall_.meetings.load(std::memory_order_relaxed) + ahead;
    return static_cast<char*>(a_.memory[r]) + kHeader + turn % 2 * half_bytes();
  }

  // Returns once all ranks have called it, or one is lost.
  int32_t meet() {
    if (hall_.lost.load() != 0) return give_up();
    const uint32_t meeting = hall_.meetings.load();
    header(a_.rank).came.store(meeting + 1);
    if (hall_.here.fetch_add(1) + 1 < static_cast<uint32_t>(a_.size)) return wait(meeting);
    hall_.here.store(0);
    hall_.meetings.store(meeting + 1);
    if (hall_.sleepers.load() > 0) futex(hall_.meetings, FUTEX_WAKE, INT_MAX, nullptr);
    return MII_OK;
  }

 private:
  Header& header(int r) const { return *static_cast<Header*>(a_.memory[r]); }
  bool over(uint32_t meeting) const { return hall_.meetings.load(std::memory_order_acquire) != meeting; }

  int32_t wait(uint32_t meeting) {
    static const int own_cores = cores();
    for (int spin = a_.size <= own_cores ? 0 : kSpins; spin < kSpins; ++spin) {
      if (over(meeting)) return MII_OK;
      pause();
    }
    const int64_t deadline = nanoseconds() + a_.patience;
    while (!over(meeting)) {
      const timespec look = {0, kLookNanoseconds};
      hall_.sleepers.fetch_add(1);
      const bool timed_out = futex(hall_.meetings, FUTEX_WAIT, meeting, &look) != 0 && errno == ETIMEDOUT;
      hall_.sleepers.fetch_sub(1);
      if (hall_.lost.load() != 0) return give_up();
      if (timed_out && !over(meeting)) look_for_lost(meeting + 1, nanoseconds() > deadline);
    }
    return MII_OK;
  }

  // Notes a rank that has not come and never will, or is late.
  void look_for_lost(uint32_t meeting, bool late) {
    for (int r = 0; r < a_.size; ++r) {
      if (header(r).came.load() == meeting || !(late || ended(r))) continue;
      uint32_t nobody = 0;
      hall_.lost.compare_exchange_strong(nobody, r + 1);
      futex(hall_.meetings, FUTEX_WAKE, INT_MAX, nullptr);
      return;
    }
  }

  bool ended(int r) const {
    if (a_.alive == nullptr || a_.alive[r] < 0) return false;
    pollfd process = {a_.alive[r], POLLIN, 0};
    return poll(&process, 1, 0) > 0;
  }

  int32_t give_up() const {
    const int r = static_cast<int>(hall_.lost.load()) - 1;
    if (ended(r)) return fail(MII_DEVICE, "rank %d of %d has ended", r, a_.size);
    return fail(MII_DEVICE, "rank %d of %d has not come to add up for %g seconds", r, a_.size, a_.patience / 1e9);
  }

  const MiiRanks& a_;
  Header& hall_;
};

int32_t check(const char* name, const MiiRanks& a) {
  if (a.size < 1 || a.rank < 0 || a.rank >= a.size || a.bytes < kHeader + 2 * 64 || a.size > 1024)
    return fail(MII_INVALID, "%s takes ranks 0 to size - 1, up to 1024, with at least %lld bytes each; got %d of %d, %lld",
                name, static_cast<long long>(kHeader + 2 * 64), a.rank, a.size, static_cast<long long>(a.bytes));
  return MII_OK;
}

// One piece of a sum, which fits into a half.
struct Piece {
  const MiiRanks& ranks;
  char* x;
  int64_t elements, size;  // of an element
  int32_t dtype;

  // Where rank r's share of the additions begins; r = ranks: the end.
  int64_t share(int r) const { return r == ranks.size ? elements : elements * r / ranks.size / 16 * 16; }

  void add(char* out, char* const* halves, int64_t begin, int64_t end) const {
    const void* parts[1024];
    for (int r = 0; r < ranks.size; ++r) parts[r] = halves[r] + begin * size;
    active_kernels().add_up({out, parts, end - begin, ranks.size, dtype});
  }

  int32_t sum() const {
    Ranks all(ranks);
    char* halves[1024];
    for (int r = 0; r < ranks.size; ++r) halves[r] = all.half(r);
    memcpy(halves[ranks.rank], x, elements * size);
    if (ranks.size > 2 && elements >= kTwoShots) return sum_shares(all, halves);
    if (const int32_t code = all.meet(); code != MII_OK) return code;
    add(x, halves, 0, elements);
    return MII_OK;
  }

  // Each rank adds up its share and leaves the sums to the others in its other half.
  int32_t sum_shares(Ranks& all, char* const* halves) const {
    const int64_t begin = share(ranks.rank), end = share(ranks.rank + 1);
    if (const int32_t code = all.meet(); code != MII_OK) return code;
    add(all.half(ranks.rank) + begin * size, halves, begin, end);
    const char* sums[1024];
    for (int r = 0; r < ranks.size; ++r) sums[r] = all.half(r);
    if (const int32_t code = all.meet(); code != MII_OK) return code;
    for (int r = 0; r < ranks.size; ++r)
      memcpy(x + share(r) * size, sums[r] + share(r) * size, (share(r + 1) - share(r)) * size);
    return MII_OK;
  }
};

}  // namespace
}  // namespace mii::cpu

extern "C" int32_t mii_all_reduce(const MiiAllReduce* args, void*) {
  using namespace mii::cpu;
  const MiiAllReduce& a = *args;
  if (a.dtype != MII_F32 && a.dtype != MII_F16 && a.dtype != MII_BF16)
    return fail(MII_INVALID, "all_reduce takes dtype codes 0 (float32), 1 (float16) and 2 (bfloat16), not %d", a.dtype);
  if (const int32_t code = check("all_reduce", a.ranks); code != MII_OK) return code;
  const int64_t size = item_size(a.dtype), most = Ranks(a.ranks).half_bytes() / size;
  for (int64_t done = 0; done < a.count; done += most) {
    const int64_t elements = a.count - done < most ? a.count - done : most;
    const Piece piece = {a.ranks, static_cast<char*>(a.x) + done * size, elements, size, a.dtype};
    if (const int32_t code = piece.sum(); code != MII_OK) return code;
  }
  return MII_OK;
}

extern "C" int32_t mii_all_gather(const MiiAllGather* args, void*) {
  using namespace mii::cpu;
  const MiiAllGather& a = *args;
  if (const int32_t code = check("all_gather", a.ranks); code != MII_OK) return code;
  Ranks all(a.ranks);
  const int64_t bytes = 4 * a.words, most = all.half_bytes();
  for (int64_t done = 0; done < bytes; done += most) {
    const int64_t some = bytes - done < most ? bytes - done : most;
    const char* halves[1024];
    for (int r = 0; r < a.ranks.size; ++r) halves[r] = all.half(r);
    memcpy(all.half(a.ranks.rank), static_cast<const char*>(a.x) + done, some);
    if (const int32_t code = all.meet(); code != MII_OK) return code;
    for (int r = 0; r < a.ranks.size; ++r) memcpy(static_cast<char*>(a.out) + r * bytes + done, halves[r], some);
  }
  return MII_OK;
}
