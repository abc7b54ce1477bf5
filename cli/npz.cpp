#include "npz.h"

#include <zip.h>

#include <algorithm>

#include "format.h"
#include "npy.h"

namespace heed::cli {
namespace {

struct CloseArchive {
  void operator()(zip_t* archive) const { zip_discard(archive); }  // what was written is committed by zip_close before
};
struct CloseEntry {
  void operator()(zip_file_t* entry) const { zip_fclose(entry); }
};
using Archive = std::unique_ptr<zip_t, CloseArchive>;
using Entry = std::unique_ptr<zip_file_t, CloseEntry>;

Archive open_archive(const std::string& path, int flags) {
  int code = 0;
  Archive archive(zip_open(path.c_str(), flags, &code));
  if (!archive) {
    zip_error_t error;
    zip_error_init_with_code(&error, code);
    const std::string why = zip_error_strerror(&error);
    zip_error_fini(&error);
    throw FileError(cli::format("it is no readable .npz archive ({})", why));
  }
  return archive;
}

[[noreturn]] void refuse(const std::string& name, std::string_view why) {
  throw FileError(cli::format("tensor '{}': {}", name, why));
}

// The whole entry, in memory that grows with what is really there: the archive's own figure is a claim.
std::vector<std::byte> read_entry(zip_t* archive, const std::string& name) {
  zip_stat_t facts;
  if (zip_stat(archive, (name + ".npy").c_str(), 0, &facts) != 0) refuse(name, zip_strerror(archive));
  const Entry entry(zip_fopen_index(archive, facts.index, 0));
  if (!entry) refuse(name, zip_strerror(archive));
  std::vector<std::byte> content;
  uint64_t used = 0;
  while (used < facts.size) {
    if (used == content.size()) content.resize(std::min<uint64_t>(facts.size, std::max<uint64_t>(2 * used, 1 << 20)));
    const zip_int64_t count = zip_fread(entry.get(), content.data() + used, content.size() - used);
    if (count < 0) refuse(name, zip_file_strerror(entry.get()));
    if (count == 0) refuse(name, "it is truncated");
    used += static_cast<uint64_t>(count);
  }
  std::byte past;
  if (zip_fread(entry.get(), &past, 1) != 0) refuse(name, "its length or checksum is wrong");
  return content;
}

}  // namespace

std::vector<std::string> npz_names(const std::string& path) {
  const Archive archive = open_archive(path, ZIP_RDONLY);
  std::vector<std::string> names;
  for (zip_int64_t i = 0; i < zip_get_num_entries(archive.get(), 0); ++i) {
    const char* text = zip_get_name(archive.get(), static_cast<zip_uint64_t>(i), 0);
    const std::string_view name = text != nullptr ? text : "";
    if (name.ends_with(".npy")) names.emplace_back(name.substr(0, name.size() - 4));
  }
  std::sort(names.begin(), names.end());
  return names;
}

Tensor read_npz_tensor(const std::string& path, const std::string& name) {
  const Archive archive = open_archive(path, ZIP_RDONLY);
  const std::vector<std::byte> content = read_entry(archive.get(), name);
  try {
    return read_npy(content);
  } catch (const FileError& error) {
    refuse(name, error.what());
  }
}

void write_npz(const std::string& path, const NamedTensors& tensors) {
  Archive archive = open_archive(path, ZIP_CREATE | ZIP_TRUNCATE);
  std::vector<std::vector<std::byte>> contents;  // libzip reads them when the archive is closed
  for (const auto& [name, tensor] : tensors) {
    std::vector<std::byte>& content = contents.emplace_back(make_npy_header(tensor.type, tensor.shape));
    content.insert(content.end(), tensor.data.data(), tensor.data.data() + tensor.data.size());
    zip_source_t* source = zip_source_buffer(archive.get(), content.data(), content.size(), 0);
    const zip_int64_t index = zip_file_add(archive.get(), (name + ".npy").c_str(), source, ZIP_FL_ENC_UTF_8);
    if (index < 0) {
      zip_source_free(source);
      refuse(name, zip_strerror(archive.get()));
    }
    zip_set_file_compression(archive.get(), static_cast<zip_uint64_t>(index), ZIP_CM_STORE, 0);
  }
  if (zip_close(archive.get()) != 0) throw FileError(cli::format("cannot be written: {}", zip_strerror(archive.get())));
  archive.release();  // closed
}

}  // namespace heed::cli
