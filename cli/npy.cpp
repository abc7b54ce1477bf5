#include "npy.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>
#include <optional>

#include "format.h"
#include "input_file.h"

namespace heed::cli {
namespace {

constexpr std::string_view kMagic = "\x93NUMPY";

struct Descriptor {
  std::string_view text;
  ElementType type;
};
// The first spelling of a type is the one written.
constexpr Descriptor kDescriptors[] = {
    {"|b1", ElementType::kBool}, {"<i4", ElementType::kI32}, {"<i8", ElementType::kI64}, {"<f2", ElementType::kF16},
    {"<V2", ElementType::kBf16}, {"<f4", ElementType::kF32}, {"<f8", ElementType::kF64}, {"|V2", ElementType::kBf16},
    {"V2", ElementType::kBf16},  {"?", ElementType::kBool},
};

[[noreturn]] void malformed(std::string_view why) { throw FileError(cli::format("its .npy header {}", why)); }

// Reads the header's dictionary, a Python literal, left to right.
class HeaderText {
 public:
  explicit HeaderText(std::string_view text) : text_(text) {}

  void parse(NpyHeader& header) {
    std::optional<std::string> descriptor;
    bool has_order = false, has_shape = false;
    expect('{');
    while (!take('}')) {
      const std::string key = quoted();
      expect(':');
      if (key == "descr" && !descriptor) {
        descriptor = descriptor_text();
      } else if (key == "fortran_order" && !has_order) {
        header.fortran_order = boolean();
        has_order = true;
      } else if (key == "shape" && !has_shape) {
        header.shape = tuple();
        has_shape = true;
      } else {
        malformed(cli::format("has '{}' twice, or it does not belong there", key));
      }
      if (!take(',') && peek() != '}') malformed("lacks a comma or a closing brace");
    }
    peek();
    if (at_ != text_.size()) malformed("goes on after its closing brace");
    if (!descriptor || !has_order || !has_shape) malformed("lacks one of descr, fortran_order, shape");
    header.type = element_type(*descriptor);
  }

 private:
  char peek() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t')) ++at_;
    return at_ < text_.size() ? text_[at_] : '\0';
  }
  bool take(char c) {
    if (peek() != c) return false;
    ++at_;
    return true;
  }
  void expect(char c) {
    if (!take(c)) malformed(cli::format("lacks a '{}' at character {}", c, at_));
  }

  std::string quoted() {
    const char quote = peek();
    if (quote != '\'' && quote != '"') malformed(cli::format("lacks a quoted name at character {}", at_));
    const size_t end = text_.find(quote, at_ + 1);
    if (end == std::string_view::npos) malformed("has a quote that does not end");
    const std::string_view content = text_.substr(at_ + 1, end - at_ - 1);
    const auto printable = [](char c) { return c >= ' ' && c <= '~' && c != '\\'; };
    if (!std::all_of(content.begin(), content.end(), printable)) malformed("has an unprintable name");
    at_ = end + 1;
    return std::string(content);
  }

  std::string descriptor_text() {
    if (peek() == '[') throw FileError("it holds records (a structured NumPy dtype); save each field as a plain array");
    return quoted();
  }

  bool boolean() {
    peek();
    for (const bool value : {false, true}) {
      const std::string_view word = value ? "True" : "False";
      if (text_.substr(at_, word.size()) == word) {
        at_ += word.size();
        return value;
      }
    }
    malformed("has a fortran_order other than True or False");
  }

  std::vector<int64_t> tuple() {
    std::vector<int64_t> values;
    expect('(');
    while (!take(')')) {
      peek();
      int64_t value = -1;
      const auto [end, error] = std::from_chars(text_.data() + at_, text_.data() + text_.size(), value);
      if (error != std::errc() || value < 0)
        malformed(cli::format("has a shape entry that is no size at character {}", at_));
      at_ = static_cast<size_t>(end - text_.data());
      if (at_ < text_.size() && text_[at_] == 'L') ++at_;  // Python 2 wrote its long integers so
      values.push_back(value);
      if (values.size() > 32) malformed("has more than 32 dimensions");
      if (!take(',') && peek() != ')') malformed("has a shape that is no tuple");
    }
    return values;
  }

  static ElementType element_type(std::string_view text) {
    for (const Descriptor& descriptor : kDescriptors) {
      if (text == descriptor.text) return descriptor.type;
    }
    if (text.starts_with('>')) {
      throw FileError(
          cli::format("its elements are big-endian ('{}'); save it with .astype('<{}')", text, text.substr(1)));
    }
    throw FileError(
        cli::format("its dtype is '{}'; heed reads float16, float32, float64, int32, int64, bool, and bfloat16 "
                    "as '<V2'",
                    text));
  }

  std::string_view text_;
  size_t at_ = 0;
};

// Fortran order to C order: element (i0, i1, ...) lies at i0 + i1*n0 + ...
void reorder(Tensor& tensor) {
  const size_t ndim = tensor.shape.size();
  const int64_t count = tensor.num_elements();
  if (ndim < 2 || count == 0) return;
  const size_t bytes = element_bytes(tensor.type);
  AlignedBytes reordered(tensor.data.size());
  std::vector<int64_t> index(ndim, 0), stride(ndim, 1);
  for (size_t d = 1; d < ndim; ++d) stride[d] = stride[d - 1] * tensor.shape[d - 1];
  int64_t from = 0;
  for (int64_t to = 0; to < count; ++to) {
    std::memcpy(reordered.data() + to * bytes, tensor.data.data() + from * bytes, bytes);
    for (size_t d = ndim; d-- > 0;) {  // the next index, last dimension first
      from += stride[d];
      if (++index[d] < tensor.shape[d]) break;
      from -= stride[d] * tensor.shape[d];
      index[d] = 0;
    }
  }
  tensor.data = std::move(reordered);
}

void check_data_bytes(const NpyHeader& header, uint64_t file_bytes) {
  const uint64_t have = file_bytes - header.data_offset;
  if (have < header.data_bytes) {
    throw FileError(cli::format("it is truncated: shape {} of {} needs {} bytes, {} are there",
                                shape_text(header.shape), element_name(header.type), header.data_bytes, have));
  }
  if (have > header.data_bytes)
    throw FileError(cli::format("it has {} bytes after its data", have - header.data_bytes));
}

}  // namespace

NpyHeader parse_npy_header(std::span<const std::byte> prefix) {
  const auto byte = [&](size_t i) { return std::to_integer<uint32_t>(prefix[i]); };
  if (prefix.size() < 10 || std::memcmp(prefix.data(), kMagic.data(), kMagic.size()) != 0) {
    throw FileError("it is no .npy file (its first bytes are not \\x93NUMPY)");
  }
  const uint32_t version = byte(6);
  if (version < 1 || version > 3) throw FileError(cli::format("its .npy version is {}; 1, 2 and 3 are known", version));
  const size_t text_offset = version == 1 ? 10 : 12;
  if (prefix.size() < text_offset) throw FileError("it is truncated inside its .npy header");
  size_t text_bytes = byte(8) | byte(9) << 8;
  if (version > 1) text_bytes |= byte(10) << 16 | static_cast<size_t>(byte(11)) << 24;
  if (text_offset + text_bytes > kMaxNpyHeaderBytes) {
    malformed(cli::format("claims {} bytes; more than {} is no array's", text_bytes, kMaxNpyHeaderBytes - 12));
  }
  if (prefix.size() - text_offset < text_bytes) throw FileError("it is truncated inside its .npy header");

  NpyHeader header;
  HeaderText(std::string_view(reinterpret_cast<const char*>(prefix.data()) + text_offset, text_bytes)).parse(header);
  header.data_offset = text_offset + text_bytes;
  header.data_bytes = checked_bytes(header.shape, element_bytes(header.type), "its shape");
  return header;
}

Tensor read_npy(std::span<const std::byte> file) {
  const NpyHeader header = parse_npy_header(file.first(std::min(file.size(), kMaxNpyHeaderBytes)));
  check_data_bytes(header, file.size());
  Tensor tensor(header.type, header.shape);
  if (header.data_bytes > 0) std::memcpy(tensor.data.data(), file.data() + header.data_offset, header.data_bytes);
  if (header.fortran_order) reorder(tensor);
  return tensor;
}

Tensor read_npy(const InputFile& file) {
  std::vector<std::byte> prefix(std::min<uint64_t>(file.size(), kMaxNpyHeaderBytes));
  file.read(0, prefix);
  const NpyHeader header = parse_npy_header(prefix);
  check_data_bytes(header, file.size());
  Tensor tensor(header.type, header.shape);
  file.read(header.data_offset, {tensor.data.data(), tensor.data.size()});
  if (header.fortran_order) reorder(tensor);
  return tensor;
}

std::vector<std::byte> make_npy_header(ElementType type, std::span<const int64_t> shape) {
  const auto* descriptor = std::find_if(std::begin(kDescriptors), std::end(kDescriptors),
                                        [&](const Descriptor& row) { return row.type == type; });
  const char* comma = shape.size() == 1 ? "," : "";
  std::string text = cli::format("{{'descr': '{}', 'fortran_order': False, 'shape': ({}{}), }}", descriptor->text,
                                 listed(shape), comma);
  text.append((64 - (10 + text.size() + 1) % 64) % 64, ' ');  // the data starts at a multiple of 64, as NumPy has it
  text += '\n';
  std::string header(kMagic);
  header += {1, 0, static_cast<char>(text.size() & 255), static_cast<char>(text.size() >> 8)};
  header += text;
  std::vector<std::byte> bytes(header.size());
  std::memcpy(bytes.data(), header.data(), header.size());
  return bytes;
}

}  // namespace heed::cli
