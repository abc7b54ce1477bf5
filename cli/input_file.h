// A file read by ranges.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace heed::cli {

// Throws FileError, with sentences that lack the file's name.
class InputFile {
 public:
  explicit InputFile(const std::string& path);
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  uint64_t size() const { return size_; }
  void read(uint64_t offset, std::span<std::byte> into) const;

 private:
  int descriptor_ = -1;
  uint64_t size_ = 0;
};

}  // namespace heed::cli
