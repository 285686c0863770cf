// How the cards of one host tell one another what they have computed, by writing into each other's memory.
//
// A call in which they do is a round, and rounds are counted on the device, so a captured graph can be replayed any number
// of times. A rank's memory is
//     state   PeerState, read and written by its own card only
//     halves  two of them, which take turns: round e has the half e % 2. A half is divided into boxes of packs (16 bytes);
//             who writes which box is a matter of the call.
// A half holds zeros until something comes, which is never zero: a pack of numbers has a -0 in place of a +0 where 8 bytes of it
// would be (`present`), a single word comes with the number of the round. So whoever finds 8 bytes that are not zero has them
// all, with no fence and no flag, and puts zeros back for the next round.
// Two halves are enough, and no rank has to say that it has read: nobody writes into the half of round e again before
// round e + 2, and a rank begins that only after round e + 1, for which it needed words that each other rank wrote, itself
// or through a third one, after its round e had ended. So all has been read and is zeros again, and nothing of round e is still
// on its way.
//
// Every CTA of a round must be resident, since those of one rank wait for those of another. All ranks go through the packs
// in the same order, so whoever handles the first one that is not complete never waits for a later one.
#pragma once
#include "mii/common.cuh"
#include "mii/peer_words.cuh"

namespace mii {

constexpr int kMostPeers = 8;
constexpr int kPackBytes = 16;

struct PeerState {
  uint32_t round, arrived;  // the last round; CTAs of this one that are done
  uint32_t lost;            // 1 + a rank that has not come: nobody is waited for any more
};
constexpr int64_t kPeerHeader = 256;
constexpr int64_t kCopiedAt = 128;  // within the header, and written by another rank: see copied_sum.cuh

// Waits for other ranks, though not without end.
class Patience {
 public:
  // `host`: the host's copy of state->lost.
  __device__ __forceinline__ Patience(PeerState* state, int32_t* host, uint64_t nanoseconds)
      : state_(state), host_(host), nanoseconds_(nanoseconds), lost_(load_state(&state->lost) != 0) {}

  // Whether a rank was given up, before or now.
  __device__ __forceinline__ bool lost() const { return lost_; }

  // Whether to try once more for the ranks in `missing`. Looks at the clock now and then.
  __device__ __forceinline__ bool more(unsigned tries, unsigned missing) {
    if (lost_) return false;
    if (tries % 64 != 0) return true;
    const uint64_t now = nanoseconds();
    if (tries == 64) deadline_ = now + nanoseconds_;
    if (now <= deadline_) return true;
    lost_ = true;
    const int first = __ffs(missing);
    state_->lost = first;
    store_host(host_, first);
    return false;
  }

 private:
  PeerState* state_;
  int32_t* host_;
  uint64_t nanoseconds_, deadline_ = 0;
  bool lost_;
};

// Slots: the most ranks that the code is made for.
template <int Slots>
struct Peers {
  char* memory[Slots];  // by rank
  int32_t* lost;        // the host's copy
  int64_t half;         // bytes
  uint64_t patience;    // nanoseconds
  int rank, size;
};

// The number of the round after `round`. 0 is what memory holds that was never written; halves take turns across it too.
__device__ __forceinline__ uint32_t round_after(uint32_t round) { return round + 1 == 0 ? 2 : round + 1; }

// A pack of T whose halves of 8 bytes are not zero, of the same numbers.
template <typename T>
__device__ __forceinline__ uint4 present(uint4 pack) {
  constexpr uint32_t kMinusZero = sizeof(T) == 4 ? 0x80000000u : 0x8000u;
  if ((pack.x | pack.y) == 0) pack.x = kMinusZero;
  if ((pack.z | pack.w) == 0) pack.z = kMinusZero;
  return pack;
}

// One thread's view of a round. `stride`: packs of a box.
template <int Slots>
class Round {
 public:
  __device__ __forceinline__ Round(const Peers<Slots>& peers, int64_t stride)
      : peers_(peers),
        state_(reinterpret_cast<PeerState*>(peers.memory[peers.rank])),
        patience_(state_, peers.lost, peers.patience),
        stride_(stride) {
    number_ = round_after(load_state(&state_->round));
    offset_ = kPeerHeader + (number_ & 1) * peers.half;
  }

  __device__ __forceinline__ int rank() const { return peers_.rank; }
  __device__ __forceinline__ int size() const { return peers_.size; }
  // The k-th rank after this one: not all begin with the same.
  __device__ __forceinline__ int after(int k) const {
    const int r = peers_.rank + k;
    return r < peers_.size ? r : r - peers_.size;
  }
  // The other ranks, as bits.
  __device__ __forceinline__ unsigned others() const { return ((1u << peers_.size) - 1) & ~(1u << peers_.rank); }

  // Writes a pack, which is `present`, into a box of rank r. Not once a rank was given up: others may still be waiting in a
  // round that this rank has left, and would take what is not theirs for what is missing.
  __device__ __forceinline__ void send(int r, int box, int64_t index, const uint4& pack) const {
    if (patience_.lost()) return;
    char* place = peers_.memory[r] + offset_ + (box * stride_ + index) * kPackBytes;
    store_words(place, uint64_t(pack.y) << 32 | pack.x, uint64_t(pack.w) << 32 | pack.z);
  }

  // Takes what the ranks in `from` have sent to the boxes `first` + their number, once all of it is there.
  __device__ __forceinline__ void receive(uint4 (&packs)[Slots], int first, int64_t index, unsigned from) {
    char* place = peers_.memory[peers_.rank] + offset_ + (first * stride_ + index) * kPackBytes;
    uint64_t words[Slots][2] = {};
    unsigned missing = from;
    for (unsigned tries = 0; missing != 0; ++tries) {
      if (tries > 0 && !patience_.more(tries, missing)) break;
#pragma unroll
      for (int r = 0; r < Slots; ++r) {
        if (missing >> r & 1) load_words(place + r * stride_ * kPackBytes, words[r][0], words[r][1]);
      }
#pragma unroll
      for (int r = 0; r < Slots; ++r) {
        if (words[r][0] != 0 && words[r][1] != 0) missing &= ~(1u << r);
      }
    }
#pragma unroll
    for (int r = 0; r < Slots; ++r) {
      if ((from & ~missing) >> r & 1) clear_words(place + r * stride_ * kPackBytes);
      packs[r] = {static_cast<uint32_t>(words[r][0]), static_cast<uint32_t>(words[r][0] >> 32),
                  static_cast<uint32_t>(words[r][1]), static_cast<uint32_t>(words[r][1] >> 32)};
    }
  }

  // The same for single words: word `index` of box `box`, which has two words in place of each pack's 16 bytes.
  __device__ __forceinline__ void send_word(int r, int box, int64_t index, uint32_t value) const {
    if (patience_.lost()) return;
    store_word(peers_.memory[r] + offset_ + (box * stride_ + index) * 8, word(value));
  }
  __device__ __forceinline__ uint32_t receive_word(int box, int64_t index) {
    char* place = peers_.memory[peers_.rank] + offset_ + (box * stride_ + index) * 8;
    uint64_t found = load_word(place);
    for (unsigned tries = 1; found == 0 && patience_.more(tries, 1u << box); ++tries) found = load_word(place);
    if (found != 0) clear_word(place);
    return static_cast<uint32_t>(found);
  }

  // At the end, by all threads of all CTAs: the last one counts the round.
  __device__ __forceinline__ void finish() const {
    __syncthreads();
    if (threadIdx.x != 0) return;
    if (atomicAdd(reinterpret_cast<int*>(&state_->arrived), 1) + 1 < static_cast<int>(gridDim.x)) return;
    state_->arrived = 0;
    state_->round = number_;
  }

 private:
  __device__ __forceinline__ uint64_t word(uint32_t value) const { return uint64_t(number_) << 32 | value; }

  const Peers<Slots>& peers_;
  PeerState* state_;
  Patience patience_;
  int64_t stride_, offset_;
  uint32_t number_;
};

}  // namespace mii
