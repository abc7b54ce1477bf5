// heed_attention_time, heed_kv_append_time: the measuring protocol, for programs and for heed's own tools.
#include "heed/timing.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "capi_error.h"
#include "capi_handles.h"
#include "capi_run.h"
#include "cuda/device.h"
#include "cuda/graph_timer.h"

namespace heed {
namespace {

constexpr int32_t kSamples = 15, kMaxSamples = 100000, kMaxCalls = 200, kMostCalls = 100000;
constexpr int32_t kHostCalls = 64;       // few enough that the driver's queue never makes the caller wait
constexpr double kHostSampleUs = 20000;  // of the device's time, for each sample of the host's
constexpr double kSampleUs = 5000, kMaxPauseMs = 10000;

// One plan and its arguments with the op taken away: each function runs once on the stream.
struct Work {
  std::function<Status(void* stream)> run;   // the plan in hand
  std::function<Status(void* stream)> call;  // the one-call form
};

double quantile(std::vector<double> samples, double fraction) {
  std::sort(samples.begin(), samples.end());
  const double rank = fraction * static_cast<double>(samples.size() - 1);
  const auto low = static_cast<size_t>(rank);
  return std::lerp(samples[low], samples[std::min(low + 1, samples.size() - 1)], rank - static_cast<double>(low));
}

Status out_of_range(const char* name, double value, double most) {
  return invalid_argument(heed::format("options.{} = {}: must be from 0 to {}", name, value, most));
}

Result<heed_timing_options> read_options(const heed_timing_options* given) {
  heed_timing_options options = {};
  if (given != nullptr) {
    HEED_RETURN_IF_ERROR(check_struct(given, "options"));
    options = *given;
  }
  if (options.samples < 0 || options.samples > kMaxSamples)
    return out_of_range("samples", options.samples, kMaxSamples);
  if (options.calls < 0 || options.calls > kMostCalls) return out_of_range("calls", options.calls, kMostCalls);
  if (!(options.sample_us >= 0) || options.sample_us > 1e9) return out_of_range("sample_us", options.sample_us, 1e9);
  if (!(options.pause_ms >= 0) || options.pause_ms > kMaxPauseMs)
    return out_of_range("pause_ms", options.pause_ms, kMaxPauseMs);
  if (options.samples == 0) options.samples = kSamples;
  if (options.sample_us == 0) options.sample_us = kSampleUs;
  return options;
}

int32_t calls_for(const heed_timing_options& options, double rough_us) {
  if (options.calls > 0) return options.calls;
  const double wanted = options.sample_us / std::max(rough_us, 1e-3);
  return static_cast<int32_t>(std::clamp(std::round(wanted), 1.0, static_cast<double>(kMaxCalls)));
}

void rest(double pause_ms) {
  if (pause_ms > 0) std::this_thread::sleep_for(std::chrono::duration<double, std::milli>(pause_ms));
}

// `take` gives microseconds per call, or why there are none.
template <class Take>
Result<std::vector<double>> samples_of(const heed_timing_options& options, Take take) {
  std::vector<double> samples;
  for (int32_t i = 0; i < options.samples; ++i) {
    rest(options.pause_ms);
    const Result<double> sample = take();
    if (!sample.ok()) return sample.status();
    samples.push_back(sample.value());
  }
  return samples;
}

Result<double> wall_us(const std::function<Status(void*)>& work, int32_t calls) {
  const auto start = std::chrono::steady_clock::now();
  for (int32_t i = 0; i < calls; ++i) HEED_RETURN_IF_ERROR(work(nullptr));
  const std::chrono::duration<double, std::micro> elapsed = std::chrono::steady_clock::now() - start;
  return elapsed.count() / calls;
}

Status time_on_cpu(const Work& work, const heed_timing_options& options, heed_timing& timing) {
  HEED_RETURN_IF_ERROR(work.run(nullptr));
  HEED_RETURN_IF_ERROR(work.call(nullptr));
  const Result<double> rough = wall_us(work.run, 1);
  if (!rough.ok()) return rough.status();
  const int32_t calls = calls_for(options, rough.value());
  const Result<std::vector<double>> run = samples_of(options, [&] { return wall_us(work.run, calls); });
  if (!run.ok()) return run.status();
  const Result<std::vector<double>> call = samples_of(options, [&] { return wall_us(work.call, calls); });
  if (!call.ok()) return call.status();
  timing.median_us = timing.host_run_us = quantile(run.value(), 0.5);
  timing.p10_us = quantile(run.value(), 0.1);
  timing.p90_us = quantile(run.value(), 0.9);
  timing.host_call_us = quantile(call.value(), 0.5);
  timing.calls = calls;
  return {};
}

Status time_on_cuda(const Work& work, int32_t device_index, const heed_timing_options& options, heed_timing& timing) {
  const cuda::ContextScope scope(device_index);
  HEED_RETURN_IF_ERROR(scope.status());
  cuda::GraphTimer timer;
  HEED_RETURN_IF_ERROR(timer.open(device_index));
  const Result<double> rough = timer.rough_us(work.run);
  if (!rough.ok()) return rough.status();
  const int32_t calls = calls_for(options, rough.value());
  HEED_RETURN_IF_ERROR(timer.capture(work.run, calls));
  const Result<std::vector<double>> device = samples_of(options, [&] { return timer.sample_us(); });
  if (!device.ok()) return device.status();
  heed_timing_options host = options;
  host.pause_ms = 0;
  const double fitting = kHostSampleUs / std::max(rough.value(), 1e-3);
  const int32_t host_calls = static_cast<int32_t>(std::clamp(fitting, 2.0, static_cast<double>(kHostCalls)));
  const Result<std::vector<double>> run = samples_of(host, [&] { return timer.host_us(work.run, host_calls); });
  if (!run.ok()) return run.status();
  const Result<std::vector<double>> call = samples_of(host, [&] { return timer.host_us(work.call, host_calls); });
  if (!call.ok()) return call.status();
  timing.median_us = quantile(device.value(), 0.5);
  timing.p10_us = quantile(device.value(), 0.1);
  timing.p90_us = quantile(device.value(), 0.9);
  timing.host_run_us = quantile(run.value(), 0.5);
  timing.host_call_us = quantile(call.value(), 0.5);
  timing.calls = calls;
  return {};
}

Status measure(const Work& work, Device device, int32_t device_index, const heed_timing_options* given,
               heed_timing* timing) {
  HEED_RETURN_IF_ERROR(check_struct(timing, "timing"));
  const Result<heed_timing_options> options = read_options(given);
  if (!options.ok()) return options.status();
  heed_timing measured = {};
  measured.samples = options.value().samples;
  HEED_RETURN_IF_ERROR(device == Device::kCuda ? time_on_cuda(work, device_index, options.value(), measured)
                                               : time_on_cpu(work, options.value(), measured));
  return fill_struct(timing, "timing", measured);
}

// The status of a C function of heed's, with the sentence it left.
Status status_of(heed_status status) {
  if (status == HEED_OK) return {};
  return {static_cast<StatusCode>(status), heed_last_error()};
}

template <class Problem, class Args, class Run, class Call>
Status time_plan(const heed_plan* plan, const Args* args, std::string_view op, Run run, Call call,
                 const heed_timing_options* options, heed_timing* timing) {
  HEED_RETURN_IF_ERROR(check_struct(args, "args"));
  const Plan<Problem>* planned = nullptr;
  HEED_RETURN_IF_ERROR(plan_of(plan, op, planned));
  const std::string impl(planned->impl->name);
  const heed_plan_options plan_options = {sizeof(heed_plan_options), impl.c_str()};
  Args copy = *args;
  const bool on_cpu = planned->problem.device == Device::kCpu;
  const auto with_stream = [&](void* stream) -> Args* {
    if (!on_cpu) copy.stream = stream;
    return &copy;
  };
  const Work work = {[&](void* stream) { return status_of(run(plan, with_stream(stream))); },
                     [&](void* stream) { return status_of(call(with_stream(stream), &plan_options)); }};
  return measure(work, planned->problem.device, planned->problem.device_index, options, timing);
}

}  // namespace
}  // namespace heed

extern "C" {

heed_status heed_attention_time(const heed_plan* plan, const heed_attention_args* args,
                                const heed_timing_options* options, heed_timing* timing) {
  return heed::guarded([&]() -> heed::Status {
    return heed::time_plan<heed::AttentionProblem>(plan, args, "attention", &heed_attention_run, &heed_attention,
                                                   options, timing);
  });
}

heed_status heed_kv_append_time(const heed_plan* plan, const heed_kv_append_args* args,
                                const heed_timing_options* options, heed_timing* timing) {
  return heed::guarded([&]() -> heed::Status {
    return heed::time_plan<heed::KvAppendProblem>(plan, args, "kv_append", &heed_kv_append_run, &heed_kv_append,
                                                  options, timing);
  });
}

}  // extern "C"
