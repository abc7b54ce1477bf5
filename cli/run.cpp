
#include <algorithm>
#include <fstream>
#include <functional>
#include <memory>

#include "attention_files.h"
#include "attention_map.h"
#include "commands.h"
#include "format.h"
#include "job.h"
#include "on_device.h"
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
  double host_us = -1;  // on a GPU: until the call returns
  double peak_bytes = -1;
};

Measured measure_on_gpu(const PlannedJob& planned, int samples) {
  heed_timing_options options = {};
  options.struct_size = sizeof options;
  options.samples = samples;
  const heed_timing timing = planned.time(options);
  Measured measured;
  measured.timing = {timing.median_us, timing.p10_us, timing.p90_us, timing.samples};
  measured.host_us = timing.host_run_us;
  return measured;
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

void print_measured(const PlannedJob& planned, const Measured& measured, const DeviceChoice& where) {
  const heed_problem* problem = planned.problem();
  const Timing& timing = measured.timing;
  const double seconds = timing.median_us * 1e-6;
  cli::print("problem    {}\n", print(problem));
  cli::print("backend    {}\n", planned.impl());
  cli::print("device     {}\n", where.text);
  cli::print("time       {} (median of {}; p10 {}, p90 {})\n", time_text(timing.median_us), timing.samples,
             time_text(timing.p10_us), time_text(timing.p90_us));
  if (measured.host_us >= 0) cli::print("host       {} until the call returns\n", time_text(measured.host_us));
  cli::print("rate       {:.4g} GFLOP/s, {:.4g} GB/s\n", heed_problem_flops(problem) / seconds / 1e9,
             heed_problem_bytes(problem) / seconds / 1e9);
  cli::print("memory     workspace {}", bytes_text(static_cast<double>(planned.workspace_bytes())));
  if (measured.peak_bytes >= 0)
    cli::print("; the first run's peak beyond inputs and outputs {}", bytes_text(measured.peak_bytes));
  cli::print("\n");
}

nlohmann::json measured_json(const PlannedJob& planned, const Measured& measured, const DeviceChoice& where) {
  const heed_problem* problem = planned.problem();
  const Timing& timing = measured.timing;
  const double seconds = timing.median_us * 1e-6;
  nlohmann::json json = {{"heed", heed_version()},
                         {"problem", print(problem)},
                         {"impl", planned.impl()},
                         {"device", where.text},
                         {"median_us", timing.median_us},
                         {"p10_us", timing.p10_us},
                         {"p90_us", timing.p90_us},
                         {"samples", timing.samples},
                         {"gflops", heed_problem_flops(problem) / seconds / 1e9},
                         {"gbs", heed_problem_bytes(problem) / seconds / 1e9},
                         {"workspace_bytes", planned.workspace_bytes()}};
  if (measured.host_us >= 0) json["host_us"] = measured.host_us;
  if (measured.peak_bytes >= 0) json["peak_bytes"] = measured.peak_bytes;
  return json;
}

void write_outputs(const RunRequest& request, const Job& job, const LoadedAttention* loaded) {
  const auto given = [&](const std::string& name, const Tensor& tensor) {
    return loaded != nullptr ? loaded->as_given(name, tensor) : tensor;
  };
  if (!request.save_inputs.empty()) write_tensors(request.save_inputs, job.tensors(false));
  if (request.output.empty() && request.lse.empty()) return;
  NamedTensors outputs = job.tensors(true);
  const auto lse = outputs.find("lse");
  if (!request.lse.empty()) {
    if (lse == outputs.end()) throw UsageError("--lse: this problem has no lse output; add the field lse to the line");
    write_tensors(request.lse, {{"lse", given("lse", lse->second)}});
  }
  // lse has its own file; with a problem line that asks for it, it goes where the others go.
  if (lse != outputs.end() && (loaded != nullptr || request.output.ends_with(".npy"))) outputs.erase(lse);
  for (auto& [name, tensor] : outputs) tensor = given(name, tensor);
  if (!request.output.empty()) write_tensors(request.output, outputs);
}

// What to run, where, and the tensors that go with it.
struct Input {
  std::string line;  // "": from files
  std::unique_ptr<LoadedAttention> files;
  std::unique_ptr<OnDevice> copies;  // of the files' tensors, on a GPU
  DeviceChoice where;

  Job job() const {
    if (!line.empty()) return Job(line);
    return Job(copies ? copies->arguments() : files->arguments());
  }
};

ProblemPtr problem_of(heed_attention_args arguments, heed_device device) {
  heed_problem* problem = nullptr;
  arguments.device = device;
  require(heed_attention_problem(&arguments, &problem));
  return ProblemPtr(problem);
}

Input line_input(const RunRequest& request, const std::string& line) {
  Input input;
  const auto on_gpu = [&] { return parse_problem(with_device(line, "cuda")); };
  const bool says_itself = line.find(" device=") != std::string::npos && request.device == "auto";
  const std::string asked = says_itself ? line.substr(line.find(" device=") + 8) : request.device;
  parse_problem(line);  // a slip in the line is told before anything else
  input.where = choose_device(asked.substr(0, asked.find(' ')), request.backend, request.threads, on_gpu);
  input.line = says_itself || input.where.device == "cpu" ? line : with_device(line, input.where.device);
  return input;
}

Input file_input(const RunRequest& request, const AttentionFiles& files) {
  Input input;
  input.files = std::make_unique<LoadedAttention>(files, !request.lse.empty());
  const heed_attention_args& arguments = input.files->arguments();
  require(heed_attention_validate(&arguments));  // lengths and indices come from a file: look at them once
  input.where = choose_device(request.device, request.backend, request.threads,
                              [&] { return problem_of(arguments, HEED_DEVICE_CUDA); });
  if (input.where.device == "cpu") return input;
  heed_device device = HEED_DEVICE_CUDA;
  int32_t index = 0;
  parse_device(input.where.device, device, index);
  input.copies = std::make_unique<OnDevice>(arguments, index);
  return input;
}

// The map is made on the CPU; the same line makes the same inputs there.
Tensor map_of(const Input& input, const Job& job, int64_t batch, int64_t head) {
  if (job.attention() == nullptr) throw UsageError("--map: only attention has a map");
  if (input.line.empty()) return attention_map(input.files->arguments(), batch, head);
  const Job on_host(with_device(input.line, "cpu"));
  return attention_map(*on_host.attention(), batch, head);
}

}  // namespace

int run_run(const RunRequest& request) {
  AttentionFiles files = request.files;
  const std::string line = split_words(request, files);
  if (line.empty() && files.inputs.empty() && files.tensors.empty()) {
    throw UsageError("nothing to run: give a problem line, --input FILE, or --q, --k and --v");
  }
  const Input input = line.empty() ? file_input(request, files) : line_input(request, line);
  Job job = input.job();
  const PlannedJob planned(job, request.backend, request.threads);
  if (request.explain) {
    const heed_plan_options options = plan_options(request.backend);
    cli::print("{}\n", read_text([&](char* buffer, size_t bytes, size_t* needed) {
                 return heed_explain(planned.problem(), &options, buffer, bytes, needed);
               }));
  }
  if (!request.json && input.files) {
    for (const auto& [name, source] : input.files->sources()) cli::print("{:<10} {}\n", name, source);
  }
  const bool on_gpu = job.device() == HEED_DEVICE_CUDA;
  const Measured measured = on_gpu ? measure_on_gpu(planned, request.samples) : measure(planned, request.samples);
  nlohmann::json json = measured_json(planned, measured, input.where);
  if (!request.json) print_measured(planned, measured, input.where);

  bool passed = true;
  if (request.check) {
    const heed_check_report report = job.check();
    passed = report.passed != 0;
    json["check"] = check_json(report);
    if (!request.json) cli::print("\nagainst the reference in double precision:\n{}", check_text(report));
  }
  write_outputs(request, job, input.files.get());
  if (!request.map.empty()) {
    write_tensors(request.map, {{"map", map_of(input, job, request.batch, request.head)}});
  }
  if (request.json) cli::print("{}\n", json.dump(2));
  return passed ? 0 : 1;
}

}  // namespace heed::cli
