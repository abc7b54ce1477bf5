#include "tensor.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

#include "format.h"

namespace heed::cli {
namespace {

constexpr size_t kAlignment = 128;

}  // namespace

std::string_view element_name(ElementType type) {
  constexpr std::string_view kNames[] = {"bool", "i32", "i64", "f16", "bf16", "f32", "f64"};
  return kNames[static_cast<int>(type)];
}

size_t element_bytes(ElementType type) {
  constexpr size_t kBytes[] = {1, 4, 8, 2, 2, 4, 8};
  return kBytes[static_cast<int>(type)];
}

bool is_float(ElementType type) { return type >= ElementType::kF16; }

AlignedBytes::AlignedBytes(size_t size) : size_(size) {
  // Rounded up, and one block at least: a tensor without elements has an address too.
  const size_t bytes = (size / kAlignment + 1) * kAlignment;
  memory_.reset(static_cast<std::byte*>(::operator new(bytes, std::align_val_t(kAlignment))));
  std::memset(memory_.get(), 0, bytes);
}

AlignedBytes::AlignedBytes(const AlignedBytes& other) : AlignedBytes(other.size_) {
  if (size_ > 0) std::memcpy(memory_.get(), other.memory_.get(), size_);
}

AlignedBytes::AlignedBytes(AlignedBytes&& other) noexcept
    : memory_(std::move(other.memory_)), size_(std::exchange(other.size_, 0)) {}

AlignedBytes& AlignedBytes::operator=(AlignedBytes other) noexcept {
  std::swap(memory_, other.memory_);
  std::swap(size_, other.size_);
  return *this;
}

void AlignedBytes::Free::operator()(std::byte* memory) const {
  ::operator delete(memory, std::align_val_t(kAlignment));
}

Tensor::Tensor(ElementType type, std::vector<int64_t> shape)
    : type(type), shape(std::move(shape)), data(checked_bytes(this->shape, element_bytes(type), "the shape")) {}

int64_t Tensor::num_elements() const { return static_cast<int64_t>(data.size() / element_bytes(type)); }

size_t checked_bytes(std::span<const int64_t> shape, size_t bytes, std::string_view what) {
  bool empty = false;
  for (const int64_t extent : shape) {
    if (extent < 0) throw FileError(cli::format("{} {} has a negative extent", what, shape_text(shape)));
    empty |= extent == 0;
  }
  if (empty) return 0;
  constexpr uint64_t kMost = std::numeric_limits<int64_t>::max();
  uint64_t product = bytes;
  for (const int64_t extent : shape) {
    if (product > kMost / static_cast<uint64_t>(extent)) {
      throw FileError(cli::format("{} {} is larger than any memory", what, shape_text(shape)));
    }
    product *= static_cast<uint64_t>(extent);
  }
  return product;
}

std::string shape_text(std::span<const int64_t> shape) { return cli::format("[{}]", listed(shape)); }

float bfloat_to_float(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

uint16_t float_to_bfloat(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);  // a NaN stays one
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float half_to_float(uint16_t bits) {
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 31) return mantissa != 0 ? std::numeric_limits<float>::quiet_NaN() : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
}

uint16_t float_to_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return sign | 0x7e00;
  if (magnitude == 0) return sign;
  if (magnitude >= 65520.0f) return sign | 0x7c00;  // halfway to the first value that is not finite
  // Below 2^-14 the spacing is fixed at 2^-24; the integer from rounding then carries into the exponent by itself.
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int spacing = std::max(exponent - 11, -24);
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, -spacing)));
  return static_cast<uint16_t>(sign | (static_cast<uint32_t>(spacing + 24) * 1024 + steps));
}

namespace {

float load_float(const Tensor& tensor, int64_t i) {
  switch (tensor.type) {
    case ElementType::kF16: return half_to_float(tensor.as<uint16_t>()[i]);
    case ElementType::kBf16: return bfloat_to_float(tensor.as<uint16_t>()[i]);
    case ElementType::kF64: return static_cast<float>(tensor.as<double>()[i]);
    default: return tensor.as<float>()[i];
  }
}

void store_float(Tensor& tensor, int64_t i, float value) {
  switch (tensor.type) {
    case ElementType::kF16: tensor.as<uint16_t>()[i] = float_to_half(value); break;
    case ElementType::kBf16: tensor.as<uint16_t>()[i] = float_to_bfloat(value); break;
    case ElementType::kF64: tensor.as<double>()[i] = value; break;
    default: tensor.as<float>()[i] = value; break;
  }
}

}  // namespace

Tensor convert(const Tensor& tensor, ElementType type) {
  if (tensor.type == type) return tensor;
  Tensor converted(type, tensor.shape);
  const int64_t count = tensor.num_elements();
  if (tensor.type == ElementType::kI64 && type == ElementType::kI32) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t value = tensor.as<int64_t>()[i];
      if (value != static_cast<int32_t>(value))
        throw FileError(cli::format("element {} is {}, too large for i32", i, value));
      converted.as<int32_t>()[i] = static_cast<int32_t>(value);
    }
    return converted;
  }
  if (!is_float(tensor.type) || !is_float(type)) {
    throw FileError(cli::format("{} where {} is needed", element_name(tensor.type), element_name(type)));
  }
  for (int64_t i = 0; i < count; ++i) store_float(converted, i, load_float(tensor, i));
  return converted;
}

}  // namespace heed::cli
