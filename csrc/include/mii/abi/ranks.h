// What the ranks of one host add up and gather by themselves, in memory that all of them see.
#pragma once
#include "mii/abi/base.h"
#include "mii/abi/norm.h"

// The ranks and their memories: on GPUs each rank has one on its own card, which the others write into (mii_peer_memory);
// on CPUs they share pages. All ranks make the same calls in the same order. A rank that does not come within `patience`
// ends the group: every later call returns at once, and nothing that it leaves is right.
struct MiiRanks {
  void* const* memory;   // [size] by rank, as this process sees them; zeros before the first use
  int32_t* lost;         // CUDA: in page-locked host memory; becomes 1 + a rank that has not come
  const int32_t* alive;  // CPU: [size] process file descriptors of the ranks, or -1
  int64_t bytes;         // of each memory
  int64_t patience;      // nanoseconds
  int32_t rank, size;    // CUDA: at most 8
  int32_t ctas;          // CUDA: at most so many; 0: as many as a card holds at once, which is the most that may be
};

// x = x of rank 0 + x of rank 1 + ..., added in float in this order and rounded once: the same bits on every rank.
// One shot: each rank gets every other rank's x. Two shots: each rank adds up one part, and gets the other parts' sums.
struct MiiAllReduce {
  struct MiiRanks ranks;
  void* x;        // [count] contiguous
  int64_t count;  // CUDA: whole 16 bytes
  int32_t shots;  // CUDA: 1 or 2
  int32_t dtype;
};
MII_API int32_t mii_all_reduce(const struct MiiAllReduce* args, void* stream);
MII_API int64_t mii_all_reduce_bytes(const struct MiiAllReduce* args);  // of a memory, for this call

// mii_norm of the sum over the ranks of x, which is rounded first as mii_all_reduce would; x stays as it is. CUDA.
struct MiiAllReduceNorm {
  struct MiiRanks ranks;
  struct MiiNorm norm;  // with a residual, without an x_weight
  int32_t shots;
};
MII_API int32_t mii_all_reduce_norm(const struct MiiAllReduceNorm* args, void* stream);

// CUDA, two ranks: the sum in two parts, between which something else is computed while the copy engines carry the numbers.
// mii_send_copy, on a stream of its own that waits for what makes x, copies x to `place` in the other rank's memory and says
// so; mii_copied_sum then adds to x what came from there, once it is there: x is the sum of both, in float and rounded once,
// the same bits on both ranks. x must not change before this rank's copy has ended. Neither can be captured, since it is the
// host that counts rounds: 1, 2, 3, ... and on past 2^32 with 0. Four places in turn suffice where no round is sent before the
// second one before it has been added up: the other rank sent that one after it had added up the second one before that.
struct MiiCopiedSum {
  struct MiiRanks ranks;
  void* x;        // [count] contiguous, whole 16 bytes
  int64_t place;  // bytes from the beginning of a memory, past ranks.bytes, whole 16
  int64_t count;
  int32_t round, dtype;
};
MII_API int32_t mii_send_copy(const struct MiiCopiedSum* args, void* stream);
MII_API int32_t mii_copied_sum(const struct MiiCopiedSum* args, void* stream);

// mii_norm of what mii_copied_sum would give; x stays as it is.
struct MiiCopiedSumNorm {
  struct MiiRanks ranks;
  struct MiiNorm norm;  // with a residual, without an x_weight; x contiguous
  int64_t place;
  int32_t round;
};
MII_API int32_t mii_copied_sum_norm(const struct MiiCopiedSumNorm* args, void* stream);

// out = x of rank 0, x of rank 1, ...
struct MiiAllGather {
  struct MiiRanks ranks;
  void* out;       // [size * words] of 4 bytes
  const void* x;   // [words]
  int64_t words;
};
MII_API int32_t mii_all_gather(const struct MiiAllGather* args, void* stream);
MII_API int64_t mii_all_gather_bytes(const struct MiiAllGather* args);

// CUDA: memory of a card that other processes of the host can open. These calls allocate and wait, and none can be captured.
// A memory is freed after everybody has closed it.
enum MiiPeerAction { MII_PEER_ALLOCATE = 0, MII_PEER_OPEN = 1, MII_PEER_CLOSE = 2, MII_PEER_FREE = 3 };
struct MiiPeerMemory {
  void** memory;  // allocate, open: out; close, free: in
  void* handle;   // [64] allocate: out, for other processes; open: in
  int64_t bytes;
  int32_t device, action;
};
MII_API int32_t mii_peer_memory(const struct MiiPeerMemory* args, void* stream);

// CUDA: waits on the host for an event, or until a rank is lost: MII_DEVICE then.
struct MiiEventWait {
  void* event;  // a cudaEvent_t
  const int32_t* lost;
};
MII_API int32_t mii_event_wait(const struct MiiEventWait* args, void* stream);
