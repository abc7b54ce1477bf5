// Numbers that depend on (seed, name, index) alone: the same line makes the same tensors on every machine.
#pragma once

#include <cmath>
#include <cstdint>
#include <string_view>

#include "base/philox.h"

namespace heed::check {

class Random {
 public:
  Random(uint64_t seed, std::string_view name) {
    uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a
    for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
    const uint64_t mixed = (seed + 1) * 0x9e3779b97f4a7c15u ^ hash;
    key_ = {static_cast<uint32_t>(mixed), static_cast<uint32_t>(mixed >> 32)};
  }

  uint32_t bits(int64_t index) {
    const int64_t block = index >> 2;
    if (block != block_) {
      block_ = block;
      words_ = philox4x32_10({static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 0, 0}, key_);
      normals_drawn_ = false;
    }
    return words_[index & 3];
  }

  double uniform(int64_t index) { return (bits(index) + 0.5) * 0x1p-32; }  // inside (0, 1)

  int64_t integer(int64_t index, int64_t low, int64_t high) {  // both inclusive
    if (high <= low) return low;
    return low + static_cast<int64_t>(bits(index) % static_cast<uint64_t>(high - low + 1));
  }

  double normal(int64_t index) {  // Box-Muller on the two pairs of a block
    bits(index);
    if (!normals_drawn_) {
      for (int pair = 0; pair < 4; pair += 2) {
        const double radius = std::sqrt(-2.0 * std::log((words_[pair] + 0.5) * 0x1p-32));
        const double angle = 6.283185307179586 * (words_[pair + 1] + 0.5) * 0x1p-32;
        normals_[pair] = radius * std::cos(angle);
        normals_[pair + 1] = radius * std::sin(angle);
      }
      normals_drawn_ = true;
    }
    return normals_[index & 3];
  }

 private:
  std::array<uint32_t, 2> key_;
  int64_t block_ = -1;
  std::array<uint32_t, 4> words_ = {};
  std::array<double, 4> normals_ = {};
  bool normals_drawn_ = false;
};

}  // namespace heed::check
