// A Job is something to do with its tensors in memory; a PlannedJob is a Job with a plan and a workspace, ready to run.
#pragma once

#include <string>

#include "library.h"
#include "tensor_file.h"

namespace heed::cli {

// Inputs made from a problem line by the library: the same line, the same bits, everywhere.
class Job {
 public:
  explicit Job(const std::string& line);               // UsageError where the line is wrong
  explicit Job(const heed_attention_args& arguments);  // tensors that the caller keeps alive

  // The problem with so many threads; 0: as the line has it.
  ProblemPtr problem(int threads) const;
  heed_check_report check() const;  // the outputs of the last run
  void poison();                    // outputs to NaN
  void check_guards() const;
  NamedTensors tensors(bool outputs) const;  // copies of all inputs, or of all outputs

  const heed_attention_args* attention() const { return attention_; }
  const heed_kv_append_args* append() const { return append_; }
  heed_device device() const { return attention_ != nullptr ? attention_->device : append_->device; }
  int32_t device_index() const { return attention_ != nullptr ? attention_->device_index : append_->device_index; }

 private:
  InputsPtr inputs_;
  InputsPtr before_;  // kv_append is judged against the caches as they were
  const heed_attention_args* attention_ = nullptr;
  const heed_kv_append_args* append_ = nullptr;
};

class PlannedJob {
 public:
  PlannedJob(const Job& job, const std::string& backend, int threads);

  void run() const;
  // The same through the library's one-call form, which looks the plan up.
  void call() const;
  // As docs/measuring.md says: on a GPU from replayed graphs.
  heed_timing time(const heed_timing_options& options) const;
  std::string impl() const { return heed_plan_impl(plan_.get()); }
  size_t workspace_bytes() const { return heed_plan_workspace_bytes(plan_.get()); }
  const heed_problem* problem() const { return problem_.get(); }

 private:
  std::string backend_;
  ProblemPtr problem_;
  PlanPtr plan_;
  DeviceBytes workspace_;
  heed_attention_args attention_ = {};
  heed_kv_append_args append_ = {};
  bool is_attention_ = false;
};

// A copy of a view of that device's memory, in C order.
Tensor copy_view(const heed_tensor& view, heed_device device = HEED_DEVICE_CPU, int32_t device_index = 0);
// Bytes from the first element to the end of the last one that the view reaches.
size_t extent_bytes(const heed_tensor& view);
// A view of a tensor; i64 has none.
heed_tensor view_of(Tensor& tensor);
heed_dtype dtype_of(ElementType type);
ElementType type_of(heed_dtype dtype);

}  // namespace heed::cli
