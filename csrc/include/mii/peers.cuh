// How the cards of one host tell one another what they have computed, by writing into each other's memory.
//
// A call in which they do is a round, and rounds are counted on the device, so a captured graph can be replayed any number
// of times. A rank's memory is
//     state   PeerState, read and written by its own card only
//     halves  two of them, which take turns: round e has the half e % 2. A half is divided into boxes of packs (16 bytes of
//             data, 32 with the round's numbers); who writes which box is a matter of the call.
// Two halves are enough, and no rank has to say that it has read: nobody writes into the half of round e again before
// round e + 2, and a rank begins that only after round e + 1, for which it needed words that each other rank wrote, itself
// or through a third one, after its round e had ended. So all has been read, and nothing of round e is still on its way.
//
// Every CTA of a round must be resident, since those of one rank wait for those of another. All ranks go through the packs
// in the same order, so whoever handles the first one that is not complete never waits for a later one.
#pragma once
#include "mii/common.cuh"
#include "mii/peer_words.cuh"

namespace mii {

constexpr int kMostPeers = 8;
constexpr int kPackWords = 32;  // bytes of a pack in a box

struct PeerState {
  uint32_t round, arrived;  // the last round; CTAs of this one that are done
  uint32_t lost;            // 1 + a rank that has not come: nobody is waited for any more
};
constexpr int64_t kPeerHeader = 256;

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

// One thread's view of a round. `stride`: packs of a box.
template <int Slots>
class Round {
 public:
  __device__ __forceinline__ Round(const Peers<Slots>& peers, int64_t stride) : peers_(peers), stride_(stride) {
    state_ = reinterpret_cast<PeerState*>(peers.memory[peers.rank]);
    number_ = round_after(load_state(&state_->round));
    lost_ = load_state(&state_->lost) != 0;
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

  // Writes a pack into a box of rank r.
  __device__ __forceinline__ void send(int r, int box, int64_t index, const uint4& pack) const {
    char* place = peers_.memory[r] + offset_ + (2 * box * stride_ + index) * 16;
    store_words(place, word(pack.x), word(pack.y));
    store_words(place + stride_ * 16, word(pack.z), word(pack.w));
  }

  // Takes what the ranks in `from` have sent to the boxes `first` + their number, once all of it is there.
  __device__ __forceinline__ void receive(uint4 (&packs)[Slots], int first, int64_t index, unsigned from) {
    const char* place = peers_.memory[peers_.rank] + offset_ + (2 * first * stride_ + index) * 16;
    uint64_t words[Slots][4] = {};
    unsigned missing = from;
    for (unsigned tries = 0; missing != 0; ++tries) {
      if (tries > 0 && !patient(tries, missing)) break;
#pragma unroll
      for (int r = 0; r < Slots; ++r) {
        if ((missing >> r & 1) == 0) continue;
        load_words(place + 2 * r * stride_ * 16, words[r][0], words[r][1]);
        load_words(place + (2 * r + 1) * stride_ * 16, words[r][2], words[r][3]);
      }
#pragma unroll
      for (int r = 0; r < Slots; ++r) {
        const bool fresh = current(words[r][0]) && current(words[r][1]) && current(words[r][2]) && current(words[r][3]);
        if (fresh) missing &= ~(1u << r);
      }
    }
#pragma unroll
    for (int r = 0; r < Slots; ++r) {
      packs[r] = {static_cast<uint32_t>(words[r][0]), static_cast<uint32_t>(words[r][1]),
                  static_cast<uint32_t>(words[r][2]), static_cast<uint32_t>(words[r][3])};
    }
  }

  // The same for single words: word `index` of box `box`, which has two words in place of each pack's 16 bytes.
  __device__ __forceinline__ void send_word(int r, int box, int64_t index, uint32_t value) const {
    store_word(peers_.memory[r] + offset_ + (box * stride_ + index) * 8, word(value));
  }
  __device__ __forceinline__ uint32_t receive_word(int box, int64_t index) {
    const char* place = peers_.memory[peers_.rank] + offset_ + (box * stride_ + index) * 8;
    uint64_t found = load_word(place);
    for (unsigned tries = 1; !current(found) && patient(tries, 1u << box); ++tries) found = load_word(place);
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
  __device__ __forceinline__ bool current(uint64_t word) const { return static_cast<uint32_t>(word >> 32) == number_; }

  // Whether to go on waiting for the ranks in `missing`. Looks at the clock now and then.
  __device__ __forceinline__ bool patient(unsigned tries, unsigned missing) {
    if (lost_) return false;
    if (tries % 64 != 0) return true;
    const uint64_t now = nanoseconds();
    if (tries == 64) deadline_ = now + peers_.patience;
    if (now <= deadline_) return true;
    lost_ = true;
    const int first = __ffs(missing);
    state_->lost = first;
    store_host(peers_.lost, first);
    return false;
  }

  const Peers<Slots>& peers_;
  PeerState* state_;
  int64_t stride_, offset_;
  uint64_t deadline_ = 0;
  uint32_t number_;
  bool lost_;
};

}  // namespace mii
