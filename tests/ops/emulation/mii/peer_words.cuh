// In place of csrc/include/mii/peer_words.cuh: words are on their way for any time and land in any order.
#pragma once
#include <chrono>
#include <mutex>
#include <unordered_map>

#include "card.h"

namespace card {

inline std::mutex wires;
inline std::vector<std::pair<void*, uint64_t>> flights;  // words on their way
inline std::unordered_map<void*, int> targets;           // where to

inline void fly(void* address, uint64_t word) {
  if (reinterpret_cast<uintptr_t>(address) % 8) refuse("a word is not aligned to 8 bytes");
  if (targets[address]++ != 0) refuse("two words are on their way to one place");
  flights.push_back({address, word});
}
inline void land_words() {
  for (int count = chance() % 4; count > 0 && !flights.empty(); --count) {
    std::swap(flights[chance() % flights.size()], flights.back());
    const auto [address, word] = flights.back();
    flights.pop_back();
    targets.erase(address);
    std::memcpy(address, &word, 8);
  }
}

}  // namespace card

namespace mii {

inline void store_word(void* address, uint64_t word) {
  card::must_have_waited();
  const std::lock_guard lock(card::wires);
  card::fly(address, word);
}
inline void store_words(void* address, uint64_t first, uint64_t second) {
  if (reinterpret_cast<uintptr_t>(address) % 16) card::refuse("a pair of words is not aligned to 16 bytes");
  store_word(address, first);
  store_word(static_cast<char*>(address) + 8, second);
}
inline void clear_word(void* address) {
  const std::lock_guard lock(card::wires);
  if (card::targets.count(address)) card::refuse("a word is on its way to a place that is cleared");
  std::memset(address, 0, 8);
}
inline void clear_words(void* address) {
  clear_word(address);
  clear_word(static_cast<char*>(address) + 8);
}
inline uint64_t load_word(const void* address) {
  card::must_have_waited();
  if (card::chance() % 2) card::yield();
  const std::lock_guard lock(card::wires);
  card::land_words();
  uint64_t word;
  std::memcpy(&word, address, 8);
  return word;
}
inline void load_words(const void* address, uint64_t& first, uint64_t& second) {
  if (reinterpret_cast<uintptr_t>(address) % 16) card::refuse("a pair of words is not aligned to 16 bytes");
  first = load_word(address);
  second = load_word(static_cast<const char*>(address) + 8);
}
inline uint32_t load_state(const uint32_t* address) {
  card::must_have_waited();
  card::yield();
  const std::lock_guard lock(card::wires);
  return *address;
}
inline uint32_t load_said(const void* address) {
  card::must_have_waited();
  card::yield();
  const std::lock_guard lock(card::wires);
  uint32_t word;
  std::memcpy(&word, address, 4);
  return word;
}
inline void store_host(int32_t* address, int32_t value) {
  const std::lock_guard lock(card::wires);
  *address = value;
}
inline uint64_t nanoseconds() {
  card::yield();
  return std::chrono::steady_clock::now().time_since_epoch().count();
}

}  // namespace mii
