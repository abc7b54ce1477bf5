#include "cuda/tensor_maps.h"

#include <algorithm>

namespace heed::cuda {
namespace {

// Addresses as devices give them and others, all on 16 bytes: between them every bit from 4 to 46 is set once and clear once.
constexpr uint64_t kStandIns[] = {0x7f0000000000, 0x2aaaaaaaaaa0, 0x555555555550, 0x400000};
constexpr uint64_t kApart = 0x1000;  // of the four tensors

}  // namespace

bool address_is_first_word(const EncodeMaps& encode) {
  TensorMaps first = {};
  for (const uint64_t base : kStandIns) {
    MapAddresses addresses;
    for (size_t i = 0; i < addresses.size(); ++i) addresses[i] = reinterpret_cast<const void*>(base + i * kApart);
    TensorMaps maps = {};
    if (!encode(addresses, maps).ok()) return false;
    if (base == kStandIns[0]) first = maps;
    for (size_t i = 0; i < maps.size(); ++i) {
      const auto& words = maps[i].opaque;
      const bool as_expected = words[0] == base + i * kApart &&
                               std::equal(std::begin(words) + 1, std::end(words), std::begin(first[i].opaque) + 1);
      if (!as_expected) return false;
    }
  }
  return true;
}

}  // namespace heed::cuda
