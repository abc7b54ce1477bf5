// libheed as the command line uses it: handles that free themselves, statuses that become exceptions, text as strings.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "heed/heed.h"

namespace heed::cli {

// What was asked for cannot be read as a request: exit code 2.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};
// It was read, and did not work: exit code 1.
class Failure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Throws heed_last_error(): a name that nothing bears is the user's slip, everything else a failure.
inline void require(heed_status status) {
  if (status == HEED_NOT_FOUND) throw UsageError(heed_last_error());
  if (status != HEED_OK) throw Failure(heed_last_error());
}

struct FreeProblem {
  void operator()(heed_problem* problem) const { heed_problem_destroy(problem); }
};
struct FreePlan {
  void operator()(heed_plan* plan) const { heed_plan_destroy(plan); }
};
struct FreeInputs {
  void operator()(heed_inputs* inputs) const { heed_inputs_destroy(inputs); }
};
using ProblemPtr = std::unique_ptr<heed_problem, FreeProblem>;
using PlanPtr = std::unique_ptr<heed_plan, FreePlan>;
using InputsPtr = std::unique_ptr<heed_inputs, FreeInputs>;

// Memory of a device: 0 bytes are no memory.
class DeviceBytes {
 public:
  DeviceBytes(heed_device device, int32_t index, size_t bytes) : device_(device), index_(index), bytes_(bytes) {
    require(heed_memory_allocate(device, index, bytes, &data_));
  }
  DeviceBytes(DeviceBytes&& other) noexcept
      : device_(other.device_),
        index_(other.index_),
        data_(std::exchange(other.data_, nullptr)),
        bytes_(other.bytes_) {}
  DeviceBytes& operator=(DeviceBytes&&) = delete;
  ~DeviceBytes() { heed_memory_free(device_, index_, data_); }
  void* data() const { return data_; }
  size_t size() const { return bytes_; }

 private:
  heed_device device_;
  int32_t index_;
  void* data_ = nullptr;
  size_t bytes_;
};

// `query` is one of the library's (buffer, bytes, needed) functions with the rest bound.
template <class Query>
std::string read_text(Query query) {
  size_t needed = 0;
  require(query(nullptr, size_t{0}, &needed));
  std::string text(needed, '\0');
  require(query(text.data(), text.size(), &needed));
  text.resize(needed > 0 ? needed - 1 : 0);
  return text;
}

inline std::string print(const heed_problem* problem) {
  return read_text(
      [&](char* buffer, size_t bytes, size_t* needed) { return heed_problem_print(problem, buffer, bytes, needed); });
}

inline ProblemPtr parse_problem(const std::string& line) {
  heed_problem* problem = nullptr;
  if (heed_problem_parse(line.c_str(), &problem) != HEED_OK) throw UsageError(heed_last_error());
  return ProblemPtr(problem);
}

inline heed_plan_options plan_options(const std::string& backend) {
  return {sizeof(heed_plan_options), backend.empty() ? nullptr : backend.c_str()};
}

inline PlanPtr make_plan(const heed_problem* problem, const std::string& backend) {
  const heed_plan_options options = plan_options(backend);
  heed_plan* plan = nullptr;
  require(heed_plan_create(problem, &options, &plan));
  return PlanPtr(plan);
}

struct Verdict {
  std::string impl, reason;
  bool accepted = false, chosen = false;
  double cost_us = -1;
};

inline std::vector<Verdict> verdicts(const heed_problem* problem, const std::string& backend = {}) {
  const heed_plan_options options = plan_options(backend);
  std::vector<Verdict> all;
  for (int32_t i = 0; i < heed_verdict_count(problem); ++i) {
    heed_verdict verdict = {};
    verdict.struct_size = sizeof verdict;
    require(heed_verdict_get(problem, &options, i, &verdict));
    all.push_back({verdict.impl, verdict.reason, verdict.accepted != 0, verdict.chosen != 0, verdict.cost_us});
  }
  return all;
}

}  // namespace heed::cli
