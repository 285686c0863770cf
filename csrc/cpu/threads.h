// The library's own threads. An operation is cut into parts which all threads claim one by one, the caller included,
// and the caller waits only for parts that somebody claimed. So a thread that the system keeps from running (a busy
// machine) costs nothing but its help, where a fork-join runtime would wait for it at every operation, and handing out
// work takes well under a microsecond.
#pragma once
#include <stdint.h>

namespace mii::cpu {

// How many threads may work, the caller included: what torch.set_num_threads, OMP_NUM_THREADS or the CPU affinity say.
int max_threads();

// Calls body(context, part) once for each part in [0, parts), in any order, by up to max_threads() threads, and returns
// when all are done. Called from within a body, or while another thread is using the pool, it runs them all itself.
void run_parts(int64_t parts, void (*body)(void* context, int64_t part), void* context);

}  // namespace mii::cpu
