#include "on_device.h"

#include <charconv>

#include "format.h"
#include "job.h"

namespace heed::cli {
namespace {

constexpr heed_tensor heed_attention_args::*kTensors[] = {
    &heed_attention_args::q,
    &heed_attention_args::k,
    &heed_attention_args::v,
    &heed_attention_args::bias,
    &heed_attention_args::mask,
    &heed_attention_args::alibi_slopes,
    &heed_attention_args::sinks,
    &heed_attention_args::cu_seqlens_q,
    &heed_attention_args::cu_seqlens_k,
    &heed_attention_args::seqused_q,
    &heed_attention_args::seqused_k,
    &heed_attention_args::leftpad_k,
    &heed_attention_args::page_table,
    &heed_attention_args::cache_batch_idx,
    &heed_attention_args::out,
    &heed_attention_args::lse,
    &heed_attention_args::dout,
    &heed_attention_args::dlse,
    &heed_attention_args::dq,
    &heed_attention_args::dk,
    &heed_attention_args::dv,
    &heed_attention_args::dbias,
    &heed_attention_args::dsinks,
    &heed_attention_args::dalibi_slopes,
    &heed_attention_args::status,
};

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

DeviceChoice on_cpu(const std::string& why) { return {"cpu", "cpu: " + why}; }

}  // namespace

void parse_device(const std::string& text, heed_device& device, int32_t& index) {
  index = 0;
  device = text == "cpu" ? HEED_DEVICE_CPU : HEED_DEVICE_CUDA;
  if (text == "cpu" || text == "cuda") return;
  const char* end = text.data() + text.size();
  if (text.starts_with("cuda:")) {
    const auto [at, error] = std::from_chars(text.data() + 5, end, index);
    if (error == std::errc() && at == end && index >= 0) return;
  }
  throw UsageError(cli::format("--device is '{}'; allowed are cpu, cuda and cuda:N", text));
}

std::string device_name(heed_device device, int32_t index) {
  return read_text([&](char* buffer, size_t bytes, size_t* needed) {
    return heed_device_name(device, index, buffer, bytes, needed);
  });
}

DeviceChoice choose_device(const std::string& asked, const std::string& backend, int threads,
                           const std::function<ProblemPtr()>& problem_on_gpu) {
  if (asked != "auto") {
    heed_device device = HEED_DEVICE_CPU;
    int32_t index = 0;
    parse_device(asked, device, index);
    return {asked, device == HEED_DEVICE_CPU ? "cpu" : cli::format("{}: {}", asked, device_name(device, index))};
  }
  if (backend == "cuda" || backend.starts_with("cuda/")) return {"cuda", "cuda: " + device_name(HEED_DEVICE_CUDA, 0)};
  if (!backend.empty()) return on_cpu("--backend " + backend);
  if (threads > 0) return on_cpu("--threads is of the CPU");
  int32_t count = 0;
  if (heed_device_count(HEED_DEVICE_CUDA, &count) != HEED_OK) return on_cpu(first_line(heed_last_error()));
  const ProblemPtr problem = problem_on_gpu();
  const heed_plan_options options = plan_options(backend);
  heed_plan* plan = nullptr;
  const heed_status status = heed_plan_create(problem.get(), &options, &plan);
  heed_plan_destroy(plan);
  if (status == HEED_NOT_SUPPORTED)
    return on_cpu("no implementation on the GPU does this; heed explain --device cuda says why");
  if (status != HEED_OK) return on_cpu("not on the GPU: " + first_line(heed_last_error()));
  return {"cuda", "cuda: " + device_name(HEED_DEVICE_CUDA, 0)};
}

OnDevice::OnDevice(const heed_attention_args& host, int32_t device_index) : arguments_(host) {
  arguments_.device = HEED_DEVICE_CUDA;
  arguments_.device_index = device_index;
  for (const auto member : kTensors) {
    heed_tensor& view = arguments_.*member;
    if (view.dtype == HEED_DTYPE_NONE) continue;
    const size_t bytes = extent_bytes(view);
    memory_.emplace_back(HEED_DEVICE_CUDA, device_index, bytes);
    const void* from = view.data;
    view.data = memory_.back().data();
    if (bytes == 0) continue;
    require(heed_memory_copy(view.data, HEED_DEVICE_CUDA, from, HEED_DEVICE_CPU, device_index, bytes));
  }
}

}  // namespace heed::cli
