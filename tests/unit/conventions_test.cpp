// docs/conventions.md ends with a table that names the tests that guard its sentences: each has to exist.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <regex>
#include <set>
#include <sstream>
#include <string>

namespace heed {
namespace {

namespace fs = std::filesystem;

std::string text_of(const fs::path& path) {
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

// "Suite.Name" of every TEST, TEST_F and TEST_P; "file.py::name" of every Python test.
std::set<std::string> existing_tests() {
  std::set<std::string> found;
  const std::regex cpp(R"(TEST(?:_F|_P)?\(\s*(\w+),\s*(\w+)\s*\))"), python(R"(def (test_\w+)\()");
  for (const auto& entry : fs::directory_iterator(HEED_SOURCE_DIR "/tests/unit")) {
    const std::string text = text_of(entry.path());
    for (std::sregex_iterator match(text.begin(), text.end(), cpp), end; match != end; ++match) {
      found.insert((*match)[1].str() + "." + (*match)[2].str());
    }
  }
  for (const auto& entry : fs::directory_iterator(HEED_SOURCE_DIR "/tests/python")) {
    if (entry.path().extension() != ".py") continue;
    const std::string text = text_of(entry.path());
    for (std::sregex_iterator match(text.begin(), text.end(), python), end; match != end; ++match) {
      found.insert(entry.path().filename().string() + "::" + (*match)[1].str());
    }
  }
  return found;
}

TEST(Conventions, EveryNamedTestExists) {
  const std::set<std::string> tests = existing_tests();
  std::istringstream lines(text_of(HEED_SOURCE_DIR "/docs/conventions.md"));
  const std::regex name(R"(`([A-Z]\w+\.\w+|\w+\.py::\w+)`)");
  bool in_table = false;
  int named = 0;
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("## ")) in_table = line.find("guard") != std::string::npos;
    if (!in_table || !line.starts_with("| ") || line.starts_with("| sentence")) continue;
    int in_line = 0;
    for (std::sregex_iterator match(line.begin(), line.end(), name), end; match != end; ++match, ++in_line) {
      EXPECT_TRUE(tests.contains((*match)[1].str())) << (*match)[1].str() << " is named but does not exist";
    }
    EXPECT_GT(in_line, 0) << "no test guards: " << line;
    named += in_line;
  }
  EXPECT_GT(named, 50);
}

}  // namespace
}  // namespace heed
