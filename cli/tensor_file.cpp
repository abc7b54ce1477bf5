#include "tensor_file.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "format.h"
#include "input_file.h"
#include "npy.h"
#include "npz.h"
#include "safetensors.h"

namespace heed::cli {
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
    throw FileError(cli::format("{}: {}", path, error.what()));
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
    if (!ref.name.empty())
      throw FileError(cli::format("a .npy file holds one tensor without a name; '{}' was asked for", ref.name));
    return read_npy(file);
  }
  const std::vector<std::string> names = names_in(ref.path);
  const std::string name = ref.name.empty() && names.size() == 1 ? names[0] : ref.name;
  if (std::find(names.begin(), names.end(), name) == names.end()) {
    const std::string missing =
        name.empty() ? "say which tensor, FILE:NAME" : cli::format("it has no tensor '{}'", name);
    throw FileError(cli::format("{}; it holds: {}", missing, names.empty() ? "nothing" : listed(names)));
  }
  if (format == Format::kNpz) return read_npz_tensor(ref.path, name);
  return read_safetensors_tensor(file, read_safetensors_index(file), name);
}

void write_parts(const std::string& path, std::span<const std::span<const std::byte>> parts) {
  std::FILE* file = std::fopen(path.c_str(), "wb");
  if (file == nullptr) throw FileError(std::strerror(errno));
  bool ok = true;
  for (const auto& part : parts)
    ok = ok && (part.empty() || std::fwrite(part.data(), 1, part.size(), file) == part.size());
  const int write_error = errno;
  if (std::fclose(file) != 0 || !ok)
    throw FileError(cli::format("cannot be written: {}", std::strerror(ok ? errno : write_error)));
}

std::span<const std::byte> content(const Tensor& tensor) { return {tensor.data.data(), tensor.data.size()}; }

void write_to(const std::string& path, const NamedTensors& tensors) {
  switch (format_of(path)) {
    case Format::kNpy: {
      if (tensors.size() != 1)
        throw FileError(
            cli::format("a .npy file holds one tensor, not {}; .npz and .safetensors hold more", tensors.size()));
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
