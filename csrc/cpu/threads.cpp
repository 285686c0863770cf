#include "threads.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>

#include "pause.h"

// torch's OpenMP runtime, where mii.ops.native has made it visible: torch.set_num_threads speaks to it.
extern "C" __attribute__((weak)) int omp_get_max_threads(void);

namespace mii::cpu {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kSpins = 4000;  // about 100 us: longer than the gap between two operations of a step

struct Pool {
  // What there is to do. `open` is (job number << 32 | parts that nobody claimed yet). A thread claims a part by
  // counting it down; once that succeeded the job cannot end before the thread is done, so only then it reads the other
  // fields.
  alignas(64) std::atomic<uint64_t> open{0};
  void (*body)(void*, int64_t) = nullptr;
  void* context = nullptr;
  alignas(64) std::atomic<int64_t> done{0};
  alignas(64) std::atomic<uint32_t> ticket{0};  // changes with every job; sleepers wait on it
  std::atomic<int> sleepers{0};
  alignas(64) std::atomic<bool> busy{false};  // a caller owns the pool
  int workers = 0;                            // guarded by busy
};

Pool pool;

long futex(int operation, uint32_t value) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(&pool.ticket), operation | FUTEX_PRIVATE_FLAG, value, nullptr,
                 nullptr, 0);
}

void work() {
  uint64_t open = pool.open.load(std::memory_order_acquire);
  while (static_cast<uint32_t>(open) != 0) {
    if (!pool.open.compare_exchange_weak(open, open - 1, std::memory_order_acq_rel, std::memory_order_acquire))
      continue;
    pool.body(pool.context, static_cast<uint32_t>(open) - 1);
    pool.done.fetch_add(1, std::memory_order_acq_rel);
    open = pool.open.load(std::memory_order_acquire);
  }
}

void* worker(void*) {
  uint32_t seen = pool.ticket.load();
  for (;;) {
    work();
    for (int spin = 0; spin < kSpins && pool.ticket.load(std::memory_order_relaxed) == seen; ++spin) pause();
    if (pool.ticket.load() == seen) {
      pool.sleepers.fetch_add(1);
      futex(FUTEX_WAIT, seen);
      pool.sleepers.fetch_sub(1);
    }
    seen = pool.ticket.load();
  }
  return nullptr;
}

// A child of fork() has none of the threads: it starts with an empty pool.
void forget_workers() {
  pool.workers = 0;
  pool.open.store(0);
  pool.sleepers.store(0);
  pool.busy.store(false);
}

void start_workers(int wanted) {
  static const bool registered = pthread_atfork(nullptr, nullptr, forget_workers) == 0;
  (void)registered;
  sigset_t all, before;  // signals belong to the threads of the program
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  for (; pool.workers < wanted; ++pool.workers) {
    pthread_t thread;
    if (pthread_create(&thread, nullptr, worker, nullptr) != 0) break;  // fewer threads then
    pthread_detach(thread);
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

int threads_of_environment() {
  const char* wish = getenv("OMP_NUM_THREADS");
  if (wish != nullptr && atoi(wish) > 0) return atoi(wish);
  cpu_set_t cpus;
  return sched_getaffinity(0, sizeof cpus, &cpus) == 0 ? CPU_COUNT(&cpus) : 1;
}

}  // namespace

int max_threads() {
  static const int fallback = threads_of_environment();
  const int wish = omp_get_max_threads != nullptr ? omp_get_max_threads() : fallback;
  return wish < 1 ? 1 : (wish < kMaxThreads ? wish : kMaxThreads);
}

void run_parts(int64_t parts, void (*body)(void*, int64_t), void* context) {
  const int64_t threads = parts < max_threads() ? parts : max_threads();
  if (threads <= 1 || pool.busy.exchange(true, std::memory_order_acquire)) {
    for (int64_t part = 0; part < parts; ++part) body(context, part);
    return;
  }
  if (pool.workers < threads - 1) start_workers(static_cast<int>(threads) - 1);
  pool.body = body;
  pool.context = context;
  pool.done.store(0, std::memory_order_relaxed);
  const uint64_t job = (pool.open.load(std::memory_order_relaxed) >> 32) + 1;
  pool.open.store(job << 32 | static_cast<uint64_t>(parts), std::memory_order_release);
  pool.ticket.fetch_add(1);
  if (pool.sleepers.load() > 0) futex(FUTEX_WAKE, static_cast<uint32_t>(threads) - 1);
  work();
  for (int spin = 0; pool.done.load(std::memory_order_acquire) < parts; ++spin)
    spin < kSpins ? pause() : (void)sched_yield();
  pool.busy.store(false, std::memory_order_release);
}

}  // namespace mii::cpu
