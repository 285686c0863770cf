// A grid whose CTAs wait for one another: each in a thread of the host.
#pragma once
#include <thread>

#include "mii/partial_sums.cuh"

inline void run_at_once(int ctas, int threads, const std::function<void()>& kernel) {
  const unsigned seed = card::chance();
  std::vector<std::thread> all;
  for (int cta = 0; cta < ctas; ++cta) {
    all.emplace_back([=] {
      card::chance.seed(seed + cta);
      card::block = {cta}, card::grid = {ctas};
      card::run_cta(threads, kernel);
    });
  }
  for (std::thread& each : all) each.join();
  while (!card::flights.empty()) card::land_words();
}

// Of partial_sums.cuh: zeros are left for the next launch.
inline void must_be_empty(const std::vector<float4>& places) {
  for (const float4& place : places) {
    uint32_t words[4];
    std::memcpy(words, &place, sizeof words);
    if (words[0] | words[1] | words[2] | words[3]) card::refuse("a partial sum was left");
  }
}
