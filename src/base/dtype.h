// Element types and the scalar conversions between them: round to nearest even, NaN stays NaN.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <string_view>

namespace heed {

enum class Dtype : int32_t {
  kNone = 0,
  kF32 = 1,
  kF16 = 2,
  kBf16 = 3,
  kF64 = 4,
  kI32 = 5,
  kBool = 6
};  // as in heed/core.h

constexpr int64_t dtype_bytes(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF64: return 8;
    case Dtype::kF32:
    case Dtype::kI32: return 4;
    case Dtype::kF16:
    case Dtype::kBf16: return 2;
    case Dtype::kBool: return 1;
    case Dtype::kNone: break;
  }
  return 0;
}

constexpr std::string_view dtype_name(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF64: return "f64";
    case Dtype::kF32: return "f32";
    case Dtype::kI32: return "i32";
    case Dtype::kF16: return "f16";
    case Dtype::kBf16: return "bf16";
    case Dtype::kBool: return "bool";
    case Dtype::kNone: break;
  }
  return "none";
}

constexpr bool is_float(Dtype dtype) {
  return dtype == Dtype::kF32 || dtype == Dtype::kF16 || dtype == Dtype::kBf16 || dtype == Dtype::kF64;
}

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

constexpr float to_float(Bf16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

constexpr Bf16 to_bf16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u)
    return {static_cast<uint16_t>((u >> 16) | 0x40u)};  // NaN: keep it quiet, not inf
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

constexpr float to_float(F16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1fu;
  const uint32_t mantissa = x.bits & 0x3ffu;
  if (exponent == 0x1fu) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return std::bit_cast<float>(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // zero or subnormal: exact in f32
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
}

constexpr F16 to_f16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (a >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and above round to inf
  if (a < 0x38800000u) {                                                 // below 2^-14: subnormal, a multiple of 2^-24
    const float shifted = std::bit_cast<float>(a) + 0.5f;                // adding 2^-1 leaves a grid of 2^-24
    return {static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = a + 0xfffu + ((a >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

// Element `index` of an array of `dtype`, as double; the bool and i32 types give their numbers.
inline double load_as_double(const void* data, Dtype dtype, int64_t index) {
  switch (dtype) {
    case Dtype::kF64: return static_cast<const double*>(data)[index];
    case Dtype::kF32: return static_cast<const float*>(data)[index];
    case Dtype::kF16: return to_float(static_cast<const F16*>(data)[index]);
    case Dtype::kBf16: return to_float(static_cast<const Bf16*>(data)[index]);
    case Dtype::kI32: return static_cast<const int32_t*>(data)[index];
    case Dtype::kBool: return static_cast<const uint8_t*>(data)[index] != 0;
    case Dtype::kNone: break;
  }
  return 0.0;
}

// A double to f32 in round-to-odd: rounding that once more to a narrower type gives the correctly rounded result.
inline float round_to_odd(double x) {
  float y = static_cast<float>(x);
  if (std::isfinite(y) && static_cast<double>(y) != x) {
    uint32_t u = std::bit_cast<uint32_t>(y);
    if (std::fabs(static_cast<double>(y)) > std::fabs(x)) --u;  // now truncated toward zero
    y = std::bit_cast<float>(u | 1u);
  }
  return y;
}

inline void store_from_double(void* data, Dtype dtype, int64_t index, double value) {
  switch (dtype) {
    case Dtype::kF64: static_cast<double*>(data)[index] = value; break;
    case Dtype::kF32: static_cast<float*>(data)[index] = static_cast<float>(value); break;
    case Dtype::kF16: static_cast<F16*>(data)[index] = to_f16(round_to_odd(value)); break;
    case Dtype::kBf16: static_cast<Bf16*>(data)[index] = to_bf16(round_to_odd(value)); break;
    case Dtype::kI32: static_cast<int32_t*>(data)[index] = static_cast<int32_t>(value); break;
    case Dtype::kBool: static_cast<uint8_t*>(data)[index] = value != 0; break;
    case Dtype::kNone: break;
  }
}

}  // namespace heed
