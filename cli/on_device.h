// Where `heed run` computes, and tensors from files on their way to a GPU.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "library.h"

namespace heed::cli {

struct DeviceChoice {
  std::string device;  // "cpu", "cuda" or "cuda:1"
  std::string text;    // "cuda: NVIDIA H200", "cpu: no CUDA driver: ..."
};

// What --device says of one problem. "auto": the GPU where there is one that does it. `problem_on_gpu` makes the problem
// for device=cuda.
DeviceChoice choose_device(const std::string& asked, const std::string& backend, int threads,
                           const std::function<ProblemPtr()>& problem_on_gpu);

// "cpu", "cuda", "cuda:1" as the interface has it; UsageError for others.
void parse_device(const std::string& text, heed_device& device, int32_t& index);
std::string device_name(heed_device device, int32_t index);  // "NVIDIA H200"

// The same tensors on a GPU, strides and all. What is an output there is copied back by who reads it (copy_view).
class OnDevice {
 public:
  OnDevice(const heed_attention_args& host, int32_t device_index);
  const heed_attention_args& arguments() const { return arguments_; }

 private:
  std::vector<DeviceBytes> memory_;
  heed_attention_args arguments_;
};

}  // namespace heed::cli
