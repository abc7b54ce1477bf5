// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the dropout mask's counter-based
// generator, the same words on every backend.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

namespace heed {

constexpr uint32_t kPhiloxMul0 = 0xD2511F53u, kPhiloxMul1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;

constexpr std::array<uint32_t, 4> philox4x32_10(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{kPhiloxMul0} * counter[0];
    const uint64_t p1 = uint64_t{kPhiloxMul1} * counter[2];
    counter = {static_cast<uint32_t>(p1 >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(p1),
               static_cast<uint32_t>(p0 >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(p0)};
    key[0] += kPhiloxWeyl0;
    key[1] += kPhiloxWeyl1;
  }
  return counter;
}

// A key is kept iff its word is below this; compared in 64 bits, so p = 0 keeps all and p = 1 none.
inline uint64_t dropout_threshold(float p) {
  return static_cast<uint64_t>(std::nearbyint((1.0 - static_cast<double>(p)) * 4294967296.0));
}

}  // namespace heed
