// `heed bench` for problem lines on a GPU: the library's own timing, from replayed graphs.

#include "bench.h"
#include "format.h"

namespace heed::cli {
namespace {

constexpr double kRestMs = 60;

std::string device_name(const Job& job) {
  return read_text([&](char* buffer, size_t bytes, size_t* needed) {
    return heed_device_name(job.device(), job.device_index(), buffer, bytes, needed);
  });
}

GpuRow time_one(const Job& job, const std::string& line, const std::string& backend, const BenchRequest& request) {
  const PlannedJob planned(job, backend, 0);
  heed_timing_options options = {};
  options.struct_size = sizeof options;
  options.samples = request.samples;
  options.pause_ms = request.hot ? 0 : kRestMs;
  const heed_timing timing = planned.time(options);
  const double seconds = timing.median_us * 1e-6;
  return {line,
          planned.impl(),
          device_name(job),
          timing,
          heed_problem_flops(planned.problem()) / seconds / 1e12,
          heed_problem_bytes(planned.problem()) / seconds / 1e12,
          planned.workspace_bytes()};
}

}  // namespace

bool is_on_gpu(const Job& job) { return job.device() == HEED_DEVICE_CUDA; }

std::vector<GpuRow> time_on_gpu(const Job& job, const std::string& line, const BenchRequest& request) {
  std::vector<GpuRow> rows;
  std::set<std::string> seen;  // two names may mean one implementation
  for (const std::string& backend : backends_for(job, request)) {
    GpuRow row = time_one(job, line, backend, request);
    if (seen.insert(row.impl).second) rows.push_back(std::move(row));
  }
  return rows;
}

void print_gpu_table(const std::vector<GpuRow>& rows, const BenchRequest& request) {
  if (rows.empty()) return;
  Table table({"problem", "impl", "median", "p10", "p90", "TFLOP/s", "TB/s", "host run", "host call", "workspace"}, 2);
  for (const GpuRow& row : rows) {
    table.add({row.problem, row.impl, time_text(row.timing.median_us), time_text(row.timing.p10_us),
               time_text(row.timing.p90_us), cli::format("{:.1f}", row.tflops), cli::format("{:.2f}", row.tbs),
               time_text(row.timing.host_run_us), time_text(row.timing.host_call_us),
               bytes_text(static_cast<double>(row.workspace_bytes))});
  }
  cli::print("{}\n", table.text());
  cli::print("{}, {}: a run of a plan on the device, its host time, and the host time of a call with its plan cached\n",
             rows.front().device, request.hot ? "hot" : "rested");
}

nlohmann::json gpu_rows_json(const std::vector<GpuRow>& rows, const BenchRequest& request) {
  nlohmann::json list = nlohmann::json::array();
  for (const GpuRow& row : rows) {
    list.push_back({{"problem", row.problem},
                    {"impl", row.impl},
                    {"device", row.device},
                    {"regime", request.hot ? "hot" : "rested"},
                    {"median_us", row.timing.median_us},
                    {"p10_us", row.timing.p10_us},
                    {"p90_us", row.timing.p90_us},
                    {"samples", row.timing.samples},
                    {"calls", row.timing.calls},
                    {"host_run_us", row.timing.host_run_us},
                    {"host_call_us", row.timing.host_call_us},
                    {"tflops", row.tflops},
                    {"tbs", row.tbs},
                    {"workspace_bytes", row.workspace_bytes}});
  }
  return list;
}

}  // namespace heed::cli
