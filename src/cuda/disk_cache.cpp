#include "cuda/disk_cache.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <compare>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <vector>

#include "base/config.h"
#include "base/format.h"
#include "base/log.h"

namespace heed::cuda {
namespace {

// File: header, key text, payload. The checksum covers both texts.
struct FileHeader {
  char magic[8];
  uint64_t key_bytes;
  uint64_t payload_bytes;
  uint64_t checksum[2];
};
constexpr char kMagic[8] = {'h', 'e', 'e', 'd', 'j', 'i', 't', '1'};
constexpr off_t kLargestFile = 256 << 20;  // a kernel has some 50 KB
constexpr time_t kStaleSeconds = 3600;     // no writer takes that long
constexpr std::string_view kSuffix = ".cubin", kTemporarySuffix = ".tmp";

uint64_t mix(uint64_t x) {  // the finaliser of MurmurHash3
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdULL;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ULL;
  return x ^ (x >> 33);
}

void hash_into(std::string_view text, uint64_t (&state)[2]) {
  size_t i = 0;
  for (; i < text.size(); i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, text.data() + i, std::min<size_t>(8, text.size() - i));
    state[0] = mix(state[0] ^ word) + 0x9e3779b97f4a7c15ULL;
    state[1] = mix(state[1] + (word ^ state[0]));
  }
  state[0] = mix(state[0] ^ text.size());
  state[1] = mix(state[1] + state[0]);
}

struct CompilerName {
  int major = 0, minor = 0;
  auto operator<=>(const CompilerName&) const = default;
};

CompilerName parse_compiler(std::string_view text) {  // "nvrtc-13.0"; 0.0 where it reads otherwise
  CompilerName name;
  const size_t dash = text.find('-'), dot = text.find('.');
  if (dash == std::string_view::npos || dot == std::string_view::npos || dot < dash) return name;
  std::from_chars(text.data() + dash + 1, text.data() + dot, name.major);
  std::from_chars(text.data() + dot + 1, text.data() + text.size(), name.minor);
  return name;
}

// mkdir -p with mode 0700 for what is missing.
bool make_folders(const std::string& path) {
  for (size_t slash = path.find('/', 1);; slash = path.find('/', slash + 1)) {
    const std::string part = path.substr(0, slash);
    if (mkdir(part.c_str(), 0700) != 0 && errno != EEXIST) return false;
    if (slash == std::string::npos) return true;
  }
}

// Why the folder cannot be used; "" where it can.
std::string reason_against(const std::string& folder) {
  if (!make_folders(folder)) return std::strerror(errno);
  const int fd = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return std::strerror(errno);
  struct stat facts = {};
  const bool ours = fstat(fd, &facts) == 0 && facts.st_uid == geteuid();
  close(fd);
  return ours ? "" : "belongs to another user";
}

std::optional<std::string> read_whole(int fd) {
  struct stat facts = {};
  if (fstat(fd, &facts) != 0 || facts.st_size < 0 || facts.st_size > kLargestFile) return {};
  std::string data(static_cast<size_t>(facts.st_size), '\0');
  size_t done = 0;
  while (done < data.size()) {
    const ssize_t n = read(fd, data.data() + done, data.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return {};
    done += static_cast<size_t>(n);
  }
  return data;
}

bool write_whole(int fd, std::string_view data) {
  while (!data.empty()) {
    const ssize_t n = write(fd, data.data(), data.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    data.remove_prefix(static_cast<size_t>(n));
  }
  return true;
}

FileHeader header_of(std::string_view key_text, std::string_view payload) {
  FileHeader header = {};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.key_bytes = key_text.size();
  header.payload_bytes = payload.size();
  hash_into(key_text, header.checksum);
  hash_into(payload, header.checksum);
  return header;
}

std::optional<std::string> payload_of(const std::string& data, std::string_view key_text) {
  FileHeader header = {};
  if (data.size() < sizeof header) return {};
  std::memcpy(&header, data.data(), sizeof header);
  if (header.key_bytes != key_text.size() || header.payload_bytes != data.size() - sizeof header - key_text.size())
    return {};
  if (std::string_view(data).substr(sizeof header, key_text.size()) != key_text) return {};
  std::string payload = data.substr(sizeof header + key_text.size());
  const FileHeader expected = header_of(key_text, payload);
  if (std::memcmp(&expected, &header, sizeof header) != 0) return {};
  return payload;
}

}  // namespace

std::string hash_text(std::string_view text) {
  uint64_t state[2] = {0x243f6a8885a308d3ULL, 0x13198a2e03707344ULL};
  hash_into(text, state);
  return heed::format("{:016x}{:016x}", state[0], state[1]);
}

DiskCache::DiskCache(std::string folder) {
  while (folder.size() > 1 && folder.back() == '/') folder.pop_back();
  if (folder.empty()) return;
  const std::string reason = reason_against(folder);
  if (reason.empty()) {
    folder_ = std::move(folder);
  } else {
    log_message(HEED_LOG_WARNING, heed::format("kernel cache {}: {}: kernels are kept in memory only", folder, reason));
  }
}

DiskCache::Contents DiskCache::contents() const {
  Contents contents;
  if (folder_.empty()) return contents;
  std::error_code error;
  for (std::filesystem::directory_iterator entry(folder_, error), end; !error && entry != end; entry.increment(error)) {
    std::error_code unreadable;
    const bool is_kernel = entry->path().extension() == kSuffix && entry->is_regular_file(unreadable);
    const auto bytes = is_kernel ? entry->file_size(unreadable) : 0;
    if (!is_kernel || unreadable) continue;
    ++contents.num_kernels;
    contents.bytes += static_cast<int64_t>(bytes);
  }
  return contents;
}

std::string DiskCache::file(std::string_view key_text, std::string_view compiler) const {
  return heed::format("{}/{}.{}{}", folder_, hash_text(key_text), compiler, kSuffix);
}

std::optional<std::string> DiskCache::load(std::string_view key_text, std::string_view compiler,
                                           int newest_major) const {
  if (folder_.empty()) return {};
  if (!compiler.empty()) return load_file(file(key_text, compiler), key_text);
  const std::string prefix = hash_text(key_text) + ".";  // names from here on differ in the compiler only
  std::vector<std::pair<CompilerName, std::string>> found;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(folder_, error)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(prefix) || !name.ends_with(kSuffix) || name.size() < prefix.size() + kSuffix.size()) continue;
    const std::string middle = name.substr(prefix.size(), name.size() - prefix.size() - kSuffix.size());
    if (const CompilerName by = parse_compiler(middle); newest_major == 0 || by.major <= newest_major)
      found.emplace_back(by, name);
  }
  std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return b.first < a.first; });
  for (const auto& [by, name] : found)
    if (std::optional<std::string> payload = load_file(folder_ + "/" + name, key_text)) return payload;
  return {};
}

std::optional<std::string> DiskCache::load_file(const std::string& file, std::string_view key_text) const {
  // O_NONBLOCK: a FIFO planted under the name must not stop the program.
  const int fd = open(file.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (fd < 0) {
    if (errno != ENOENT)
      log_message(HEED_LOG_WARNING, heed::format("kernel cache {}: {}: not used", file, std::strerror(errno)));
    return {};
  }
  std::optional<std::string> payload;
  struct stat facts = {};
  if (fstat(fd, &facts) != 0 || facts.st_uid != geteuid() || !S_ISREG(facts.st_mode)) {
    log_message(HEED_LOG_WARNING,
                heed::format("kernel cache {}: belongs to another user or is no plain file: not used", file));
  } else if (const std::optional<std::string> data = read_whole(fd)) {
    payload = payload_of(*data, key_text);
    if (!payload) {
      log_message(HEED_LOG_WARNING,
                  heed::format("kernel cache {}: damaged or of another key: removed, compiled anew", file));
      unlink(file.c_str());
    }
  }
  close(fd);
  return payload;
}

void DiskCache::store(std::string_view key_text, std::string_view compiler, std::string_view payload) const {
  if (folder_.empty()) return;
  if (!swept_.exchange(true)) remove_stale_temporaries();
  static std::atomic<uint64_t> serial{0};
  const std::string target = file(key_text, compiler);
  std::string temporary;
  int fd = -1;
  do {  // the name may be taken by a killed process that had our id
    temporary = heed::format("{}.{}.{}{}", target, getpid(), serial.fetch_add(1), kTemporarySuffix);
    fd = open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
  } while (fd < 0 && errno == EEXIST);
  if (fd < 0) {
    log_message(HEED_LOG_WARNING,
                heed::format("kernel cache {}: {}: kept in memory only", temporary, std::strerror(errno)));
    return;
  }
  const FileHeader header = header_of(key_text, payload);
  const bool written = write_whole(fd, {reinterpret_cast<const char*>(&header), sizeof header}) &&
                       write_whole(fd, key_text) && write_whole(fd, payload) && fsync(fd) == 0;
  int reason = written ? 0 : errno;
  close(fd);
  if (written && rename(temporary.c_str(), target.c_str()) != 0) reason = errno;
  if (reason != 0) {
    log_message(HEED_LOG_WARNING,
                heed::format("kernel cache {}: {}: kept in memory only", target, std::strerror(reason)));
    unlink(temporary.c_str());
  }
}

// Writers that were killed leave their temporary files; those that nobody can still be writing go.
void DiskCache::remove_stale_temporaries() const {
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(folder_, error)) {
    const std::string path = entry.path().string();
    struct stat facts = {};
    if (path.ends_with(kTemporarySuffix) && lstat(path.c_str(), &facts) == 0 && S_ISREG(facts.st_mode) &&
        facts.st_uid == geteuid() && facts.st_mtime + kStaleSeconds < std::time(nullptr)) {
      unlink(path.c_str());
    }
  }
}

std::string default_cache_folder() {
  if (!config().cache_dir.empty()) return std::string(config().cache_dir);
  if (const char* xdg = std::getenv("XDG_CACHE_HOME"); xdg != nullptr && *xdg != '\0')
    return std::string(xdg) + "/heed";
  if (const char* home = std::getenv("HOME"); home != nullptr && *home != '\0')
    return std::string(home) + "/.cache/heed";
  return {};
}

const DiskCache& disk_cache() {
  static const DiskCache* cache = new DiskCache(default_cache_folder());  // outlives every thread that may still ask
  return *cache;
}

}  // namespace heed::cuda
