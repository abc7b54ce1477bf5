// Compiled kernels on disk: one file a key and compiler, written whole or not at all. Nothing here can fail a run: a
// cache that cannot be read is empty, one that cannot be written is not used, and each is said in the log.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace heed::cuda {

class DiskCache {
 public:
  // Makes `folder` with mode 0700 where it is missing. One that cannot be made or belongs to another user is not used;
  // "" is a cache that holds nothing.
  explicit DiskCache(std::string folder);

  // The folder in use; "" if none.
  const std::string& folder() const { return folder_; }

  // The payload stored under `key_text` by `compiler` ("nvrtc-13.0"), or, if that is "", by any whose major version is
  // at most `newest_major` (0: any at all), the newest first. A file that is truncated, altered or of another key is
  // removed; one of another user, or no plain file, is left alone; each counts as absent.
  std::optional<std::string> load(std::string_view key_text, std::string_view compiler, int newest_major = 0) const;
  // Writes to a temporary name, syncs, renames: readers see the whole file or none, and a killed writer leaves no half.
  void store(std::string_view key_text, std::string_view compiler, std::string_view payload) const;

  struct Contents {
    int64_t num_kernels = 0, bytes = 0;
  };
  // What lies in the folder, of every compiler and version of heed.
  Contents contents() const;

  // Where the pair is kept.
  std::string file(std::string_view key_text, std::string_view compiler) const;

 private:
  std::optional<std::string> load_file(const std::string& file, std::string_view key_text) const;
  void remove_stale_temporaries() const;

  std::string folder_;
  mutable std::atomic<bool> swept_{false};
};

// $HEED_CACHE_DIR, $XDG_CACHE_HOME/heed or $HOME/.cache/heed; "" where none of them is set.
std::string default_cache_folder();
// The process's cache, in that folder.
const DiskCache& disk_cache();

// 128 bits of the text as 32 hex digits. Not a defence: the key's text is compared on load, so a clash is only a miss.
std::string hash_text(std::string_view text);

}  // namespace heed::cuda
