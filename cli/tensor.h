// A tensor in memory, as files hold it: element type, shape, elements.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace heed::cli {

enum class ElementType : int32_t { kBool, kI32, kI64, kF16, kBf16, kF32, kF64 };

std::string_view element_name(ElementType type);  // "bf16"
size_t element_bytes(ElementType type);
bool is_float(ElementType type);

// Zeroed memory, aligned as no tensor could ask for more (128 bytes).
class AlignedBytes {
 public:
  AlignedBytes() = default;
  explicit AlignedBytes(size_t size);
  AlignedBytes(const AlignedBytes& other);
  AlignedBytes(AlignedBytes&& other) noexcept;
  AlignedBytes& operator=(AlignedBytes other) noexcept;

  std::byte* data() { return memory_.get(); }
  const std::byte* data() const { return memory_.get(); }
  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(std::byte* memory) const;
  };
  std::unique_ptr<std::byte[], Free> memory_;
  size_t size_ = 0;
};

// Elements in C order, without gaps.
struct Tensor {
  ElementType type = ElementType::kF32;
  std::vector<int64_t> shape;
  AlignedBytes data;

  Tensor() = default;
  Tensor(ElementType type, std::vector<int64_t> shape);  // zeroed

  int64_t num_elements() const;
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(data.data());
  }
  template <class T>
  const T* as() const {
    return reinterpret_cast<const T*>(data.data());
  }
};

using NamedTensors = std::map<std::string, Tensor>;

// A file that cannot be read or written, or does not hold what it should. what() is a sentence.
class FileError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Floating-point types into each other (to nearest even; f64 by way of f32), i64 into i32 where every value fits.
Tensor convert(const Tensor& tensor, ElementType type);
float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);
float bfloat_to_float(uint16_t bits);
uint16_t float_to_bfloat(float value);

// The product of the extents times `bytes`; throws FileError (with `what` in front) on negative extents and overflow.
size_t checked_bytes(std::span<const int64_t> shape, size_t bytes, std::string_view what);
std::string shape_text(std::span<const int64_t> shape);  // "[2, 3]"

}  // namespace heed::cli
