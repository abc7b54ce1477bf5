// What commands print: tables, a progress line, numbers as people read them, problem files and lists.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "heed/check.h"

namespace heed::cli {

// Columns as wide as their widest cell; the first `left` columns are aligned left, the others right.
class Table {
 public:
  Table(std::vector<std::string> head, size_t left) : rows_{std::move(head)}, left_(left) {}
  void add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }
  std::string text() const;

 private:
  std::vector<std::vector<std::string>> rows_;
  size_t left_;
};

// One line on a terminal's stderr, rewritten in place; nothing where stderr is no terminal.
class Progress {
 public:
  Progress();
  ~Progress() { clear(); }
  void show(const std::string& text);
  void clear();

 private:
  bool terminal_ = false;
  bool shown_ = false;
};

std::string time_text(double us);      // "12.3 us", "4.56 ms"
std::string bytes_text(double bytes);  // "1.5 MiB"
nlohmann::json check_json(const heed_check_report& report);
std::string check_text(const heed_check_report& report);  // a table, a row a tensor
void write_json(const std::string& path, const nlohmann::json& json);

// Problem lines from the words of a command line: lines (quoted or in words), or files of them; "-" is stdin. In files
// '#' starts a comment. UsageError names file and line.
std::vector<std::string> problem_lines(const std::vector<std::string>& words);
bool is_problem(const std::string& word);  // starts like a problem line
// The line for another device, "cpu" or "cuda": its own device field, and on cuda its threads, are dropped. "": as it is.
std::string with_device(const std::string& line, const std::string& device);

}  // namespace heed::cli
