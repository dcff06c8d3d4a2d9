// Entries of a product that may be among the k largest: a key and a position in one number.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <functional>
#include <iterator>
#include <vector>

namespace lift {

// Larger ones are chosen first: ties go to the lower position.
constexpr uint32_t kLowerFirst = ~uint32_t{0};
inline uint64_t candidate_of(uint32_t key, int64_t position) {
  return uint64_t(key) << 32 | (uint32_t(position) ^ kLowerFirst);
}
inline uint32_t key_of_candidate(uint64_t candidate) { return uint32_t(candidate >> 32); }
inline uint32_t position_of(uint64_t candidate) { return uint32_t(candidate) ^ kLowerFirst; }

// The n-th largest of candidates with keys in [low, high). A histogram of the keys says among which
// few to look.
inline uint64_t nth_largest(const std::vector<std::vector<uint64_t>>& lists, int64_t n, uint32_t low, uint32_t high) {
  constexpr int kBits = 12;
  const int shift = std::max(0, int(std::bit_width(high - low)) - kBits);
  const auto bin_of = [&](uint64_t candidate) { return (key_of_candidate(candidate) - low) >> shift; };
  std::vector<int64_t> bins(1 << kBits);
  for (const auto& list : lists)
    for (const uint64_t candidate : list) ++bins[bin_of(candidate)];
  uint32_t bin = (1 << kBits) - 1;
  for (; bins[bin] < n; --bin) n -= bins[bin];
  std::vector<uint64_t> near;
  for (const auto& list : lists)
    std::copy_if(list.begin(), list.end(), std::back_inserter(near), [&](uint64_t c) { return bin_of(c) == bin; });
  std::nth_element(near.begin(), near.begin() + (n - 1), near.end(), std::greater<>());
  return near[size_t(n - 1)];
}

}  // namespace lift
