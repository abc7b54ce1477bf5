
#include <sstream>

#include "commands.h"
#include "format.h"
#include "library.h"
#include "machine_facts.h"
#include "report.h"

namespace heed::cli {
namespace {

// One line an op and pass, plain enough that every implementation which can run here accepts it.
constexpr const char* kPlainLines[] = {
    "attention hq=2 hkv=1 sq=64 sk=64 d=64",
    "attention pass=bwd hq=2 hkv=1 sq=64 sk=64 d=64",
    "kv_append hkv=1 sn=1 sk=64 d=64",
    "attention hq=2 hkv=1 sq=64 sk=64 d=64 bf16 device=cuda",
    "kv_append hkv=1 sn=1 sk=64 d=64 bf16 device=cuda",
};

std::string info_text() {
  return read_text([](char* buffer, size_t bytes, size_t* needed) { return heed_info(buffer, bytes, needed); });
}

// The entries of the section "gpu": {"device 0": "NVIDIA ...", "compiler": "NVRTC ...", ...}.
nlohmann::json gpu_json(const std::string& info) {
  constexpr size_t kValue = 20;  // the column where values start
  nlohmann::json entries = nlohmann::json::object();
  std::istringstream lines(info);
  std::string name, section;
  for (std::string line; std::getline(lines, line);) {
    if (!line.starts_with(' ')) section = line;
    if (section != "gpu" || line.size() <= kValue) continue;
    const std::string key = line.substr(2, line.find("  ", 2) - 2);
    if (!key.starts_with(' ')) name = key;
    std::string value = entries.value(name, "");
    if (!value.empty()) value += '\n';
    value += line.substr(kValue);
    entries[name] = value;
  }
  return entries;
}

std::vector<heed_config_entry> config_entries() {
  std::vector<heed_config_entry> entries;
  for (int32_t i = 0; i < heed_config_count(); ++i) {
    heed_config_entry entry = {};
    entry.struct_size = sizeof entry;
    require(heed_config_get(i, &entry));
    entries.push_back(entry);
  }
  return entries;
}

int print_json() {
  nlohmann::json implementations = nlohmann::json::array();
  for (const char* line : kPlainLines) {
    for (const Verdict& verdict : verdicts(parse_problem(line).get())) {
      implementations.push_back({{"problem", line},
                                 {"impl", verdict.impl},
                                 {"accepted", verdict.accepted},
                                 {"chosen", verdict.chosen},
                                 {"reason", verdict.reason}});
    }
  }
  nlohmann::json config = nlohmann::json::array();
  for (const heed_config_entry& entry : config_entries()) {
    config.push_back({{"name", entry.name},
                      {"value", entry.value},
                      {"default", entry.default_value},
                      {"set", entry.is_set != 0},
                      {"help", entry.help}});
  }
  const nlohmann::json all = {
      {"heed", heed_version()},       {"abi", heed_abi_version()},          {"machine", machine_facts()},
      {"gpu", gpu_json(info_text())}, {"implementations", implementations}, {"config", config}};
  cli::print("{}\n", all.dump(2));
  return 0;
}

}  // namespace

int run_info(const InfoRequest& request) {
  if (request.json) return print_json();
  const std::string text = info_text();
  cli::print("{}", text);
  if (!text.ends_with('\n')) cli::print("\n");
  return 0;
}

int run_explain(const ExplainRequest& request) {
  nlohmann::json all = nlohmann::json::array();
  bool planned = true;
  for (const std::string& line : problem_lines(request.words)) {
    const ProblemPtr problem = parse_problem(with_device(line, request.device));
    const heed_plan_options options = plan_options(request.backend);
    heed_plan* plan = nullptr;
    planned = heed_plan_create(problem.get(), &options, &plan) == HEED_OK && planned;  // the explanation says why not
    heed_plan_destroy(plan);
    if (!request.json) {
      cli::print("{}\n", read_text([&](char* buffer, size_t bytes, size_t* needed) {
                   return heed_explain(problem.get(), &options, buffer, bytes, needed);
                 }));
      continue;
    }
    nlohmann::json rows = nlohmann::json::array();
    for (const Verdict& verdict : verdicts(problem.get(), request.backend)) {
      rows.push_back({{"impl", verdict.impl},
                      {"accepted", verdict.accepted},
                      {"chosen", verdict.chosen},
                      {"reason", verdict.reason},
                      {"cost_us", verdict.accepted ? nlohmann::json(verdict.cost_us) : nullptr}});
    }
    all.push_back({{"problem", print(problem.get())},
                   {"flops", heed_problem_flops(problem.get())},
                   {"bytes", heed_problem_bytes(problem.get())},
                   {"verdicts", rows}});
  }
  if (request.json) cli::print("{}\n", all.dump(2));
  return planned ? 0 : 1;
}

}  // namespace heed::cli
