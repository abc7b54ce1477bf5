// Conversions between f32, f16, bf16 and f64 against their definitions: all 65,536 patterns, every rounding boundary.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "base/dtype.h"

namespace heed {
namespace {

double value_of_f16(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int mantissa = bits & 1023;
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == 31) return mantissa == 0 ? sign * std::numeric_limits<double>::infinity() : std::nan("");
  return sign * (exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25));
}

double value_of_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

TEST(Half, EveryF16PatternHasItsValueAndComesBack) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const F16 half{static_cast<uint16_t>(bits)};
    const double want = value_of_f16(half.bits);
    if (std::isnan(want)) {
      EXPECT_TRUE(std::isnan(to_float(half)));
      EXPECT_TRUE(std::isnan(to_float(to_f16(to_float(half)))));
    } else {
      EXPECT_EQ(to_float(half), want);
      EXPECT_EQ(to_f16(to_float(half)).bits, half.bits);
    }
  }
}

TEST(Half, EveryBf16PatternComesBack) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const Bf16 half{static_cast<uint16_t>(bits)};
    const double want = value_of_bf16(half.bits);
    if (std::isnan(want)) {
      EXPECT_TRUE(std::isnan(to_float(to_bf16(to_float(half)))));
    } else {
      EXPECT_EQ(to_float(half), want);
      EXPECT_EQ(to_bf16(to_float(half)).bits, half.bits);
    }
  }
}

// Between two neighbours: below the middle down, above it up, at it to the even one.
template <class Half, class Value, class Convert>
void check_boundaries(uint16_t last_finite, Value value_of, Convert convert) {
  for (uint16_t bits = 0; bits < last_finite; ++bits) {
    const double low = value_of(bits), high = value_of(static_cast<uint16_t>(bits + 1));
    const float middle = static_cast<float>((low + high) / 2);
    ASSERT_EQ(middle, (low + high) / 2) << "the middle is a float";
    const uint16_t even = bits % 2 == 0 ? bits : static_cast<uint16_t>(bits + 1);
    ASSERT_EQ(convert(middle), even) << bits;
    ASSERT_EQ(convert(std::nextafter(middle, 0.0f)), bits);
    ASSERT_EQ(convert(std::nextafter(middle, INFINITY)), bits + 1);
    ASSERT_EQ(convert(-middle), even | 0x8000);
  }
}

TEST(Half, F16RoundsToNearestEven) {
  check_boundaries<F16>(0x7bff, value_of_f16, [](float x) { return to_f16(x).bits; });
  EXPECT_EQ(to_f16(65519.996f).bits, 0x7bff);
  EXPECT_EQ(to_f16(65520.0f).bits, 0x7c00);
  EXPECT_EQ(to_f16(-1e30f).bits, 0xfc00);
}

TEST(Half, Bf16RoundsToNearestEven) {
  check_boundaries<Bf16>(0x7f7f, value_of_bf16, [](float x) { return to_bf16(x).bits; });
  EXPECT_EQ(to_bf16(std::numeric_limits<float>::max()).bits, 0x7f80);
}

TEST(Half, NanWithALowPayloadStaysNan) {
  for (const uint32_t bits : {0x7f800001u, 0xff800001u, 0x7fffffffu}) {
    float nan;
    std::memcpy(&nan, &bits, sizeof nan);
    EXPECT_TRUE(std::isnan(to_float(to_bf16(nan))));
    EXPECT_TRUE(std::isnan(to_float(to_f16(nan))));
  }
}

// A double that f32 would round onto the middle between two halves has to go to its own side of it.
TEST(Half, DoublesAreRoundedOnce) {
  const double above = 1.0 + std::ldexp(1.0, -11) + std::ldexp(1.0, -40);
  uint16_t bits = 0;
  store_from_double(&bits, Dtype::kF16, 0, above);
  EXPECT_EQ(bits, 0x3c01);
  store_from_double(&bits, Dtype::kF16, 0, 1.0 + std::ldexp(1.0, -11) - std::ldexp(1.0, -40));
  EXPECT_EQ(bits, 0x3c00);
  store_from_double(&bits, Dtype::kBf16, 0, 1.0 + std::ldexp(1.0, -8) + std::ldexp(1.0, -45));
  EXPECT_EQ(bits, 0x3f81);

  std::mt19937_64 random(7);
  for (int i = 0; i < 100000; ++i) {
    const uint16_t low = static_cast<uint16_t>(random() % 0x7bff);
    const double a = value_of_f16(low), b = value_of_f16(static_cast<uint16_t>(low + 1));
    const double t = static_cast<double>(random() >> 11) * 0x1p-53;
    const double x = a + (b - a) * t;
    store_from_double(&bits, Dtype::kF16, 0, x);
    if (x - a != b - x) {
      ASSERT_EQ(bits, x - a < b - x ? low : low + 1) << x;
    }
  }
}

TEST(Half, LoadGivesWhatStorePut) {
  alignas(8) unsigned char memory[32] = {};
  for (const Dtype dtype : {Dtype::kF64, Dtype::kF32, Dtype::kF16, Dtype::kBf16, Dtype::kI32, Dtype::kBool}) {
    store_from_double(memory, dtype, 2, 1.0);
    EXPECT_EQ(load_as_double(memory, dtype, 2), 1.0) << dtype_name(dtype);
  }
}

}  // namespace
}  // namespace heed
