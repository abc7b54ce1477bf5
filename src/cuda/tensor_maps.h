// Tensor maps for addresses that change from run to run. The driver encodes a map for one address; its format is the
// driver's own. Where the address turns out to be the first word of a map and nothing else in it, a plan has its maps
// encoded once and each run writes its addresses in.
#pragma once

#include <array>
#include <cstdint>
#include <functional>

#include "base/status.h"
#include "cuda/kernels/params.h"

namespace heed::cuda {

using TensorMaps = std::array<TensorMap, 4>;
using MapAddresses = std::array<const void*, 4>;

// Maps of tensors at these addresses.
using EncodeMaps = std::function<Status(const MapAddresses&, TensorMaps&)>;

// Does `set_address` make maps those of other addresses? Asked of this driver with a few addresses.
bool address_is_first_word(const EncodeMaps& encode);

inline void set_address(TensorMap& map, const void* address) { map.opaque[0] = reinterpret_cast<uintptr_t>(address); }

}  // namespace heed::cuda
