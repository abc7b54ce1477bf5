// Which drivers' tensor maps take another address by its being written into them.
#include "cuda/tensor_maps.h"

#include <gtest/gtest.h>

namespace heed::cuda {
namespace {

Status encode_as_words(const MapAddresses& addresses, TensorMaps& maps) {
  for (size_t i = 0; i < maps.size(); ++i) {
    maps[i] = {{reinterpret_cast<uintptr_t>(addresses[i]), 0x1234 + i, 7}};
  }
  return {};
}

TEST(TensorMaps, AnAddressByItselfIsWrittenIn) {
  ASSERT_TRUE(address_is_first_word(encode_as_words));
  TensorMap map = {{1, 2, 3}};
  set_address(map, reinterpret_cast<const void*>(0xabc0));
  EXPECT_EQ(map.opaque[0], 0xabc0u);
  EXPECT_EQ(map.opaque[1], 2u);
}

TEST(TensorMaps, AnAddressThatCountsElsewhereIsNot) {
  for (int bit = 4; bit < 47; ++bit) {  // any bit of it in any map
    EXPECT_FALSE(address_is_first_word([bit](const MapAddresses& addresses, TensorMaps& maps) {
      const Status status = encode_as_words(addresses, maps);
      maps[static_cast<size_t>(bit) % 4].opaque[15] = reinterpret_cast<uintptr_t>(addresses[bit % 4]) >> bit & 1;
      return status;
    })) << "bit "
        << bit;
  }
}

TEST(TensorMaps, AnAddressWithSomethingAddedIsNot) {
  EXPECT_FALSE(address_is_first_word([](const MapAddresses& addresses, TensorMaps& maps) {
    const Status status = encode_as_words(addresses, maps);
    maps[2].opaque[0] |= 1;
    return status;
  }));
}

TEST(TensorMaps, ADriverThatRefusesIsAskedForEveryRun) {
  EXPECT_FALSE(address_is_first_word([](const MapAddresses&, TensorMaps&) { return operation_failed("no"); }));
}

}  // namespace
}  // namespace heed::cuda
