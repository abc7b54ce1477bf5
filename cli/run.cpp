#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <functional>
#include <memory>

#include "attention_files.h"
#include "attention_map.h"
#include "commands.h"
#include "job.h"
#include "report.h"
#include "timing.h"

namespace heed::cli {
namespace {

// Bytes from a line "VmHWM:  1234 kB" of /proc/self/status; negative where there is none.
double process_bytes(std::string_view key) {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with(key)) return 1024 * std::stod(line.substr(key.size() + 1));
  }
  return -1;
}

// What `call` needed at its peak beyond what was there before; negative where the system does not say.
template <class Call>
double peak_beyond(Call call) {
  std::ofstream("/proc/self/clear_refs") << "5";  // the peak counts from here
  const double before = process_bytes("VmRSS");
  const bool reset = process_bytes("VmHWM") <= before * 1.01;
  call();
  const double peak = process_bytes("VmHWM");
  return before < 0 || !reset ? -1 : std::max(0.0, peak - before);
}

// The words of the command line: a problem line, or files that are as good as --input.
std::string split_words(const RunRequest& request, AttentionFiles& files) {
  if (request.words.empty()) return {};
  if (is_problem(request.words[0])) {
    const std::vector<std::string> lines = problem_lines(request.words);
    if (lines.size() != 1) throw UsageError("run takes one problem line; check and bench take many");
    if (files != AttentionFiles()) {
      throw UsageError("a problem line says everything itself: drop the options for tensors and masks, or the line");
    }
    return lines[0];
  }
  files.inputs.insert(files.inputs.begin(), request.words.begin(), request.words.end());
  return {};
}

struct Measured {
  Timing timing;
  double peak_bytes = -1;
};

// A GPU's time is the device's, from the library's replayed graphs; what its memory peaks at is not the process's.
Measured measure_on_gpu(const PlannedJob& planned, int samples) {
  planned.run();
  heed_timing_options options = {};
  options.struct_size = sizeof options;
  options.samples = samples;
  const heed_timing timing = planned.time(options);
  return {{timing.median_us, timing.p10_us, timing.p90_us, timing.samples}, -1};
}

Measured measure(const PlannedJob& planned, int samples) {
  constexpr double kLeastUs = 2000;
  Measured measured;
  measured.peak_bytes = peak_beyond([&] { planned.run(); });
  const int64_t calls = calls_per_sample(kLeastUs, [&] { planned.run(); });
  std::vector<double> times;
  for (int i = 0; i < samples; ++i) times.push_back(sample_us(calls, [&] { planned.run(); }));
  measured.timing = summarize(times);
  return measured;
}

void print_measured(const PlannedJob& planned, const Measured& measured) {
  const heed_problem* problem = planned.problem();
  const Timing& timing = measured.timing;
  const double seconds = timing.median_us * 1e-6;
  fmt::print("problem    {}\n", print(problem));
  fmt::print("backend    {}\n", planned.impl());
  fmt::print("time       {} (median of {}; p10 {}, p90 {})\n", time_text(timing.median_us), timing.samples,
             time_text(timing.p10_us), time_text(timing.p90_us));
  fmt::print("rate       {:.4g} GFLOP/s, {:.4g} GB/s\n", heed_problem_flops(problem) / seconds / 1e9,
             heed_problem_bytes(problem) / seconds / 1e9);
  fmt::print("memory     workspace {}", bytes_text(static_cast<double>(planned.workspace_bytes())));
  if (measured.peak_bytes >= 0)
    fmt::print("; the first run's peak beyond inputs and outputs {}", bytes_text(measured.peak_bytes));
  fmt::print("\n");
}

nlohmann::json measured_json(const PlannedJob& planned, const Measured& measured) {
  const heed_problem* problem = planned.problem();
  const Timing& timing = measured.timing;
  const double seconds = timing.median_us * 1e-6;
  nlohmann::json json = {{"heed", heed_version()},
                         {"problem", print(problem)},
                         {"impl", planned.impl()},
                         {"median_us", timing.median_us},
                         {"p10_us", timing.p10_us},
                         {"p90_us", timing.p90_us},
                         {"samples", timing.samples},
                         {"gflops", heed_problem_flops(problem) / seconds / 1e9},
                         {"gbs", heed_problem_bytes(problem) / seconds / 1e9},
                         {"workspace_bytes", planned.workspace_bytes()}};
  if (measured.peak_bytes >= 0) json["peak_bytes"] = measured.peak_bytes;
  return json;
}

void write_outputs(const RunRequest& request, const Job& job, const LoadedAttention* loaded) {
  const auto given = [&](const Tensor& tensor) { return loaded != nullptr ? loaded->as_given(tensor) : tensor; };
  if (!request.save_inputs.empty()) write_tensors(request.save_inputs, job.tensors(false));
  if (request.output.empty() && request.lse.empty()) return;
  NamedTensors outputs = job.tensors(true);
  const auto lse = outputs.find("lse");
  if (!request.lse.empty()) {
    if (lse == outputs.end()) throw UsageError("--lse: this problem has no lse output; add the field lse to the line");
    write_tensors(request.lse, {{"lse", given(lse->second)}});
  }
  // lse has its own file; with a problem line that asks for it, it goes where the others go.
  if (lse != outputs.end() && (loaded != nullptr || request.output.ends_with(".npy"))) outputs.erase(lse);
  for (auto& [name, tensor] : outputs) tensor = given(tensor);
  if (!request.output.empty()) write_tensors(request.output, outputs);
}

}  // namespace

int run_run(const RunRequest& request) {
  AttentionFiles files = request.files;
  const std::string line = split_words(request, files);
  if (line.empty() && files.inputs.empty() && files.tensors.empty()) {
    throw UsageError("nothing to run: give a problem line, --input FILE, or --q, --k and --v");
  }
  std::unique_ptr<LoadedAttention> loaded;
  if (line.empty()) {
    loaded = std::make_unique<LoadedAttention>(files, !request.lse.empty());
    require(heed_attention_validate(&loaded->arguments()));  // lengths and indices come from a file: look at them once
  }
  Job job = loaded ? Job(loaded->arguments()) : Job(line);
  const bool on_gpu = job.device() == HEED_DEVICE_CUDA;
  if (on_gpu && !request.map.empty()) throw UsageError("--map: is computed on the CPU; drop device=cuda from the line");
  const PlannedJob planned(job, request.backend, request.threads);
  if (request.explain) {
    const heed_plan_options options = plan_options(request.backend);
    fmt::print("{}\n", read_text([&](char* buffer, size_t bytes, size_t* needed) {
                 return heed_explain(planned.problem(), &options, buffer, bytes, needed);
               }));
  }
  if (!request.json && loaded) {
    for (const auto& [name, source] : loaded->sources()) fmt::print("{:<10} {}\n", name, source);
  }
  const Measured measured = on_gpu ? measure_on_gpu(planned, request.samples) : measure(planned, request.samples);
  nlohmann::json json = measured_json(planned, measured);
  if (!request.json) print_measured(planned, measured);

  bool passed = true;
  if (request.check) {
    const heed_check_report report = job.check();
    passed = report.passed != 0;
    json["check"] = check_json(report);
    if (!request.json) fmt::print("\nagainst the reference in double precision:\n{}", check_text(report));
  }
  write_outputs(request, job, loaded.get());
  if (!request.map.empty()) {
    if (job.attention() == nullptr) throw UsageError("--map: only attention has a map");
    write_tensors(request.map, {{"map", attention_map(*job.attention(), request.batch, request.head)}});
  }
  if (request.json) fmt::print("{}\n", json.dump(2));
  return passed ? 0 : 1;
}

}  // namespace heed::cli
