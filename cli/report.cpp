#include "report.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <sstream>

#include "format.h"
#include "library.h"

namespace heed::cli {

std::string Table::text() const {
  std::vector<size_t> width;
  for (const auto& row : rows_) {
    width.resize(std::max(width.size(), row.size()), 0);
    for (size_t i = 0; i < row.size(); ++i) width[i] = std::max(width[i], row[i].size());
  }
  std::string text;
  for (const auto& row : rows_) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      if (i > 0) line += "  ";
      line += i < left_ ? cli::format("{:<{}}", row[i], width[i]) : cli::format("{:>{}}", row[i], width[i]);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
  }
  return text;
}

Progress::Progress() : terminal_(::isatty(STDERR_FILENO) != 0) {}

void Progress::show(const std::string& text) {
  if (!terminal_) return;
  constexpr size_t kWidth = 100;
  cli::print(stderr, "\r\x1b[K{}", text.size() > kWidth ? text.substr(0, kWidth - 3) + "..." : text);
  std::fflush(stderr);
  shown_ = true;
}

void Progress::clear() {
  if (!shown_) return;
  cli::print(stderr, "\r\x1b[K");
  std::fflush(stderr);
  shown_ = false;
}

std::string time_text(double us) {
  if (us < 1e3) return cli::format("{:.3g} us", us);
  return us < 1e6 ? cli::format("{:.4g} ms", us / 1e3) : cli::format("{:.4g} s", us / 1e6);
}

std::string bytes_text(double bytes) {
  constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  for (; bytes >= 1024 && unit < 4; ++unit) bytes /= 1024;
  return cli::format("{:.4g} {}", bytes, kUnits[unit]);
}

namespace {

// JSON has no NaN or infinity: they become null.
nlohmann::json number(double value) { return std::isfinite(value) ? nlohmann::json(value) : nlohmann::json(); }

}  // namespace

nlohmann::json check_json(const heed_check_report& report) {
  nlohmann::json tensors = nlohmann::json::array();
  for (int32_t i = 0; i < report.num_tensors; ++i) {
    const heed_check_tensor& tensor = report.tensors[i];
    tensors.push_back({{"name", tensor.name},
                       {"passed", tensor.passed != 0},
                       {"checked", tensor.num_checked},
                       {"max_error", number(tensor.max_error)},
                       {"max_bound", number(tensor.max_bound)},
                       {"norm_error", number(tensor.norm_error)},
                       {"norm_bound", number(tensor.norm_bound)},
                       {"worst", std::vector<int64_t>(tensor.worst, tensor.worst + 4)},
                       {"got", number(tensor.worst_got)},
                       {"want", number(tensor.worst_want)},
                       {"reason", tensor.reason}});
  }
  return {{"passed", report.passed != 0}, {"tensors", tensors}};
}

std::string check_text(const heed_check_report& report) {
  Table table({"tensor", "checked", "max error", "bound", "norm error", "bound", "", ""}, 1);
  for (int32_t i = 0; i < report.num_tensors; ++i) {
    const heed_check_tensor& tensor = report.tensors[i];
    table.add({tensor.name, cli::format("{}", tensor.num_checked), cli::format("{:.3g}", tensor.max_error),
               cli::format("{:.3g}", tensor.max_bound), cli::format("{:.3g}", tensor.norm_error),
               cli::format("{:.3g}", tensor.norm_bound), tensor.passed ? "ok" : "WRONG", tensor.reason});
  }
  return table.text();
}

void write_json(const std::string& path, const nlohmann::json& json) {
  std::ofstream file(path);
  file << json.dump(2) << "\n";
  file.close();
  if (!file) throw Failure(cli::format("{}: cannot be written: {}", path, std::strerror(errno)));
}

bool is_problem(const std::string& word) {
  const std::string first = word.substr(0, word.find(' '));
  return first == "attention" || first == "kv_append";
}

namespace {

void read_lines(std::istream& stream, const std::string& name, std::vector<std::string>& lines) {
  std::string line;
  for (int number = 1; std::getline(stream, line); ++number) {
    line.erase(std::min(line.find('#'), line.size()));
    line.erase(line.find_last_not_of(" \t\r") + 1);
    line.erase(0, std::min(line.find_first_not_of(" \t"), line.size()));
    if (line.empty()) continue;
    try {
      parse_problem(line);
    } catch (const UsageError& error) {
      throw UsageError(cli::format("{}:{}: {}", name, number, error.what()));
    }
    lines.push_back(line);
  }
  if (stream.bad()) throw Failure(cli::format("{}: cannot be read", name));
}

}  // namespace

std::vector<std::string> problem_lines(const std::vector<std::string>& words) {
  std::vector<std::string> lines;
  for (size_t i = 0; i < words.size();) {
    const std::string& word = words[i++];
    if (is_problem(word)) {
      std::string line = word;
      // An unquoted line: the words up to the next line. A word is never a file then.
      while (word.find(' ') == std::string::npos && i < words.size() && !is_problem(words[i])) line += " " + words[i++];
      parse_problem(line);
      lines.push_back(line);
    } else if (word == "-") {
      read_lines(std::cin, "stdin", lines);
    } else {
      std::ifstream file(word);
      if (!file) {
        throw UsageError(
            cli::format("'{}' is neither a problem line (these start with attention or kv_append) nor a file "
                        "that can be read: {}",
                        word, std::strerror(errno)));
      }
      const size_t before = lines.size();
      read_lines(file, word, lines);
      if (lines.size() == before) throw UsageError(cli::format("{}: no problem line in it", word));
    }
  }
  return lines;
}

std::string with_device(const std::string& line, const std::string& device) {
  if (device.empty()) return line;
  std::istringstream words(line);
  std::string result;
  for (std::string word; words >> word;) {
    if (word.starts_with("device=") || (device != "cpu" && word.starts_with("threads="))) continue;
    result += word + " ";
  }
  return result + "device=" + device;
}

}  // namespace heed::cli
