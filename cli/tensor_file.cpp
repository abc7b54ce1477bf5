#include "tensor_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <new>

#include "npy.h"
#include "npz.h"
#include "safetensors.h"

namespace heed::cli {
namespace {

constexpr size_t kAlignment = 128;

}  // namespace

// ---- memory and elements ---------------------------------------------------------------------------------------------

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
    if (extent < 0) throw FileError(fmt::format("{} {} has a negative extent", what, shape_text(shape)));
    empty |= extent == 0;
  }
  if (empty) return 0;
  constexpr uint64_t kMost = std::numeric_limits<int64_t>::max();
  uint64_t product = bytes;
  for (const int64_t extent : shape) {
    if (product > kMost / static_cast<uint64_t>(extent)) {
      throw FileError(fmt::format("{} {} is larger than any memory", what, shape_text(shape)));
    }
    product *= static_cast<uint64_t>(extent);
  }
  return product;
}

std::string shape_text(std::span<const int64_t> shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

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
      if (value != static_cast<int32_t>(value)) throw FileError(fmt::format("element {} is {}, too large for i32", i, value));
      converted.as<int32_t>()[i] = static_cast<int32_t>(value);
    }
    return converted;
  }
  if (!is_float(tensor.type) || !is_float(type)) {
    throw FileError(fmt::format("{} where {} is needed", element_name(tensor.type), element_name(type)));
  }
  for (int64_t i = 0; i < count; ++i) store_float(converted, i, load_float(tensor, i));
  return converted;
}

// ---- files -----------------------------------------------------------------------------------------------------------

InputFile::InputFile(const std::string& path) : path_(path), descriptor_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
  if (descriptor_ < 0) throw FileError(std::strerror(errno));
  struct stat facts = {};
  const bool known = ::fstat(descriptor_, &facts) == 0;
  if (!known || !S_ISREG(facts.st_mode)) {
    const std::string why = known ? "it is no regular file" : std::strerror(errno);
    ::close(descriptor_);
    throw FileError(why);
  }
  size_ = static_cast<uint64_t>(facts.st_size);
}

InputFile::~InputFile() { ::close(descriptor_); }

void InputFile::read(uint64_t offset, std::span<std::byte> into) const {
  while (!into.empty()) {
    const ssize_t count = ::pread(descriptor_, into.data(), into.size(), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw FileError(std::strerror(errno));
    if (count == 0) throw FileError("it became shorter while it was read");
    into = into.subspan(static_cast<size_t>(count));
    offset += static_cast<uint64_t>(count);
  }
}

namespace {

constexpr std::string_view kEndings[] = {".npy", ".npz", ".safetensors"};

enum class Format { kNpy, kNpz, kSafetensors };

Format format_of(const std::string& path) {
  if (path.ends_with(".npy")) return Format::kNpy;
  if (path.ends_with(".npz")) return Format::kNpz;
  if (path.ends_with(".safetensors")) return Format::kSafetensors;
  throw FileError("its name ends in none of .npy, .npz, .safetensors");
}

// Every sentence about a file starts with its name.
template <class Action>
auto with_path(const std::string& path, Action action) {
  try {
    return action();
  } catch (const FileError& error) {
    throw FileError(fmt::format("{}: {}", path, error.what()));
  }
}

std::vector<std::string> names_in(const std::string& path) {
  const InputFile file(path);
  switch (format_of(path)) {
    case Format::kNpy: return {""};
    case Format::kNpz: return npz_names(path);
    case Format::kSafetensors: break;
  }
  std::vector<std::string> names;
  for (const auto& [name, entry] : read_safetensors_index(file).entries) names.push_back(name);
  return names;
}

Tensor read_from(const TensorRef& ref) {
  const InputFile file(ref.path);
  const Format format = format_of(ref.path);
  if (format == Format::kNpy) {
    if (!ref.name.empty()) throw FileError(fmt::format("a .npy file holds one tensor without a name; '{}' was asked for", ref.name));
    return read_npy(file);
  }
  const std::vector<std::string> names = names_in(ref.path);
  const std::string name = ref.name.empty() && names.size() == 1 ? names[0] : ref.name;
  if (std::find(names.begin(), names.end(), name) == names.end()) {
    const std::string missing = name.empty() ? "say which tensor, FILE:NAME" : fmt::format("it has no tensor '{}'", name);
    throw FileError(fmt::format("{}; it holds: {}", missing, names.empty() ? "nothing" : fmt::format("{}", fmt::join(names, ", "))));
  }
  if (format == Format::kNpz) return read_npz_tensor(ref.path, name);
  return read_safetensors_tensor(file, read_safetensors_index(file), name);
}

void write_parts(const std::string& path, std::span<const std::span<const std::byte>> parts) {
  std::FILE* file = std::fopen(path.c_str(), "wb");
  if (file == nullptr) throw FileError(std::strerror(errno));
  bool ok = true;
  for (const auto& part : parts) ok = ok && (part.empty() || std::fwrite(part.data(), 1, part.size(), file) == part.size());
  const int write_error = errno;
  if (std::fclose(file) != 0 || !ok) throw FileError(fmt::format("cannot be written: {}", std::strerror(ok ? errno : write_error)));
}

std::span<const std::byte> content(const Tensor& tensor) { return {tensor.data.data(), tensor.data.size()}; }

void write_to(const std::string& path, const NamedTensors& tensors) {
  switch (format_of(path)) {
    case Format::kNpy: {
      if (tensors.size() != 1) throw FileError(fmt::format("a .npy file holds one tensor, not {}; .npz and .safetensors hold more", tensors.size()));
      const Tensor& tensor = tensors.begin()->second;
      const std::vector<std::byte> header = make_npy_header(tensor.type, tensor.shape);
      return write_parts(path, std::array<std::span<const std::byte>, 2>{header, content(tensor)});
    }
    case Format::kNpz: return write_npz(path, tensors);
    case Format::kSafetensors: break;
  }
  std::vector<const Tensor*> order;
  const std::vector<std::byte> header = make_safetensors_header(tensors, order);
  std::vector<std::span<const std::byte>> parts = {header};
  for (const Tensor* tensor : order) parts.push_back(content(*tensor));
  write_parts(path, parts);
}

}  // namespace

TensorRef parse_tensor_ref(std::string_view text) {
  size_t colon = std::string_view::npos;
  for (const std::string_view ending : kEndings) {
    const size_t at = text.rfind(std::string(ending) + ":");
    if (at != std::string_view::npos) colon = std::min(colon, at + ending.size());
  }
  if (colon == std::string_view::npos) return {std::string(text), ""};
  return {std::string(text.substr(0, colon)), std::string(text.substr(colon + 1))};
}

std::vector<std::string> tensor_names(const std::string& path) {
  return with_path(path, [&] { return names_in(path); });
}

Tensor read_tensor(const TensorRef& ref) {
  return with_path(ref.path, [&] { return read_from(ref); });
}

void write_tensors(const std::string& path, const NamedTensors& tensors) {
  with_path(path, [&] { write_to(path, tensors); });
}

}  // namespace heed::cli
