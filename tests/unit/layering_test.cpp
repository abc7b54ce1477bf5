// Who may include whom (ARCHITECTURE.md): base <- ops <- plan/impl.h <- {ref, cpu}; check above ref; the C interface on
// top of all; everything outside the library sees only include/heed. New folders have to be entered here.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <string>
#include <vector>

namespace heed {
namespace {

namespace fs = std::filesystem;

struct Include {
  std::string path;  // as written
  bool quoted = false;
};

std::vector<Include> includes_of(const fs::path& file) {
  std::vector<Include> found;
  std::ifstream stream(file);
  for (std::string line; std::getline(stream, line);) {
    size_t at = line.find_first_not_of(" \t");
    if (at == std::string::npos || line[at] != '#') continue;
    at = line.find_first_not_of(" \t", at + 1);
    if (at == std::string::npos || line.compare(at, 7, "include") != 0) continue;
    const size_t open = line.find_first_of("\"<", at + 7);
    if (open == std::string::npos) continue;  // a macro
    const bool quoted = line[open] == '"';
    const size_t close = line.find(quoted ? '"' : '>', open + 1);
    found.push_back({line.substr(open + 1, close - open - 1), quoted});
  }
  return found;
}

bool starts_with_one_of(const std::string& path, const std::vector<std::string>& prefixes) {
  for (const std::string& prefix : prefixes) {
    if (path.starts_with(prefix)) return true;
  }
  return false;
}

// Prefixes of the project's own files that a room may include.
const std::map<std::string, std::vector<std::string>>& rooms() {
  static const std::map<std::string, std::vector<std::string>> kRooms = {
      {"src/base", {"base/", "heed/"}},
      {"src/ops", {"ops/", "base/", "heed/"}},
      {"src/plan", {"plan/", "ops/", "base/", "heed/"}},
      {"src/ref", {"ref/", "plan/impl.h", "ops/", "base/", "heed/"}},
      {"src/cpu", {"cpu/", "plan/impl.h", "ops/", "base/", "heed/"}},
      {"src/cuda", {"cuda/", "plan/impl.h", "ops/", "base/", "heed/"}},
      {"src/check", {"check/", "ref/", "plan/", "ops/", "base/", "heed/", "cuda/device.h", "cuda/memory.h"}},
      // capi*.cpp, their private headers, and nothing else lies in src/ itself.
      {"src", {"capi", "check/", "cuda/", "plan/", "ops/", "base/", "heed/"}},
      {"include", {"heed/"}},
      {"cli", {"heed/"}},
      {"bench", {"heed/"}},
      {"python", {"heed/"}},
      {"examples", {"heed/"}},
  };
  return kRooms;
}

// The room of a file given by its path in the repository: the longest prefix that is one.
std::string room_of(const std::string& path) {
  std::string best;
  for (const auto& [room, allowed] : rooms()) {
    if (path.starts_with(room + "/") && room.size() > best.size()) best = room;
  }
  return best;
}

// Project files that a path as written can mean: from src/, from include/, or from the file's own folder.
std::string resolve(const fs::path& root, const fs::path& file, const Include& include) {
  const fs::path candidates[] = {file.parent_path() / include.path, root / "src" / include.path,
                                 root / "include" / include.path};
  for (const fs::path& candidate : candidates) {
    if (fs::exists(candidate)) return fs::relative(fs::weakly_canonical(candidate), root).generic_string();
  }
  return {};
}

bool is_source(const fs::path& path) {
  for (const char* extension : {".h", ".hpp", ".c", ".cpp", ".cc", ".cu", ".cuh"}) {
    if (path.extension() == extension) return true;
  }
  return false;
}

TEST(Layering, EveryIncludeIsAllowed) {
  const fs::path root = fs::weakly_canonical(HEED_SOURCE_DIR);
  int files = 0;
  for (const char* top : {"src", "include", "cli", "bench", "python", "examples"}) {
    if (!fs::exists(root / top)) continue;
    for (const auto& entry : fs::recursive_directory_iterator(root / top)) {
      if (!entry.is_regular_file() || !is_source(entry.path())) continue;
      const std::string name = fs::relative(entry.path(), root).generic_string();
      const std::string room = room_of(name);
      const std::string folder = room + "/";
      ASSERT_FALSE(room.empty()) << name << " lies in no known folder";
      // A file of src/ itself is part of the C interface; a new folder of src/ needs a row of its own.
      if (room == "src") {
        ASSERT_EQ(name.find('/', 4), std::string::npos) << name << ": src/ has a new folder";
      }
      ++files;
      for (const Include& include : includes_of(entry.path())) {
        const std::string target = resolve(root, entry.path(), include);
        if (target.empty()) {
          // Not the project's: a system header, in angle brackets. Highway's own idiom quotes its generated file name.
          EXPECT_FALSE(include.quoted && !include.path.starts_with("hwy/"))
              << name << " includes \"" << include.path << "\", which is not there";
          continue;
        }
        std::string written = target;
        for (const char* prefix : {"src/", "include/"}) {
          if (written.starts_with(prefix)) written = written.substr(std::string(prefix).size());
        }
        const bool own = !room.starts_with("src") && room != "include" && target.starts_with(folder);
        EXPECT_TRUE(own || starts_with_one_of(written, rooms().at(room)))
            << name << " must not include " << target << " (" << room << " may include its own and what is below it)";
      }
    }
  }
  EXPECT_GT(files, 30);
  std::cout << files << " files\n";
}

TEST(Layering, PublicHeadersAreSelfContained) {
  // They include the C or C++ standard library and each other: a consumer needs nothing else.
  const fs::path root = fs::weakly_canonical(HEED_SOURCE_DIR);
  for (const auto& entry : fs::recursive_directory_iterator(root / "include")) {
    if (!entry.is_regular_file()) continue;
    for (const Include& include : includes_of(entry.path())) {
      if (include.quoted) {
        EXPECT_TRUE(include.path.starts_with("heed/")) << entry.path() << " includes " << include.path;
      } else {
        EXPECT_EQ(include.path.find('/'), std::string::npos) << entry.path() << " includes <" << include.path << ">";
      }
    }
  }
}

}  // namespace
}  // namespace heed
