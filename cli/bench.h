// What `heed bench` does alike for the CPU and for a GPU.
#pragma once

#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "commands.h"
#include "job.h"
#include "report.h"

namespace heed::cli {

// Backends to time: as asked, "all" being each implementation that accepts but the reference.
std::vector<std::string> backends_for(const Job& job, const BenchRequest& request);

struct GpuRow {
  std::string problem, impl, device;
  heed_timing timing;
  double tflops, tbs;
  size_t workspace_bytes;
};

bool is_on_gpu(const Job& job);
std::vector<GpuRow> time_on_gpu(const Job& job, const std::string& line, const BenchRequest& request);
void print_gpu_table(const std::vector<GpuRow>& rows, const BenchRequest& request);
nlohmann::json gpu_rows_json(const std::vector<GpuRow>& rows, const BenchRequest& request);

}  // namespace heed::cli
