
#include <algorithm>
#include <deque>
#include <set>

#include "bench.h"
#include "format.h"
#include "machine_facts.h"
#include "probe.h"
#include "timing.h"

namespace heed::cli {
namespace {

// The best that each probe showed over the run, by thread count: a ceiling is what was reached once.
struct Ceilings {
  std::map<int, double> peak_gflops, read_gbs;

  void probe(const std::vector<int>& threads) {
    for (const int count : threads) {
      peak_gflops[count] = std::max(peak_gflops[count], probe_peak_gflops(count));
      read_gbs[count] = std::max(read_gbs[count], probe_read_gbs(count));
    }
  }
};

// One problem on one implementation with one thread count.
struct Cell {
  int threads;
  PlannedJob planned;
  int64_t calls = 1;
  std::vector<double> samples_us;

  Cell(const Job& job, const std::string& backend, int threads) : threads(threads), planned(job, backend, threads) {}
};

struct Row {
  std::string problem, impl;
  int threads;
  Timing timing;
  double gflops, gbs;
  size_t workspace_bytes;
};

std::deque<Cell> make_cells(const Job& job, const BenchRequest& request, const std::vector<int>& threads) {
  std::deque<Cell> cells;
  std::set<std::pair<std::string, int>> seen;  // two names may mean one implementation
  for (const std::string& backend : backends_for(job, request)) {
    for (const int count : threads) {
      cells.emplace_back(job, backend, count);
      if (!seen.emplace(cells.back().planned.impl(), count).second) cells.pop_back();
    }
  }
  return cells;
}

// A sample of every cell in turn, forwards then backwards: what disturbs the machine disturbs all alike.
void time_cells(std::deque<Cell>& cells, const BenchRequest& request, const std::string& title, Progress& progress) {
  for (Cell& cell : cells) cell.calls = calls_per_sample(request.min_time_ms * 1e3, [&] { cell.planned.run(); });
  for (int sample = 0; sample < request.samples; ++sample) {
    progress.show(cli::format("{} sample {}/{}", title, sample + 1, request.samples));
    for (size_t i = 0; i < cells.size(); ++i) {
      Cell& cell = cells[sample % 2 == 0 ? i : cells.size() - 1 - i];
      cell.planned.run();  // its data and code are warm again, whatever ran before it
      cell.samples_us.push_back(sample_us(cell.calls, [&] { cell.planned.run(); }));
    }
  }
}

Row make_row(const Cell& cell, const std::string& line) {
  const Timing timing = summarize(cell.samples_us);
  const double seconds = timing.median_us * 1e-6;
  const heed_problem* problem = cell.planned.problem();
  return {line,
          cell.planned.impl(),
          cell.threads,
          timing,
          heed_problem_flops(problem) / seconds / 1e9,
          heed_problem_bytes(problem) / seconds / 1e9,
          cell.planned.workspace_bytes()};
}

// What the library itself costs a call: a problem with next to no work.
struct HostTimes {
  Timing run, call, plan;
};

HostTimes time_host(int samples) {
  Job job(std::string("attention sq=1 sk=1 d=8"));
  const PlannedJob planned(job, "", 1);
  HostTimes host;
  std::vector<double> run, call, plan;
  const auto make = [&] { make_plan(planned.problem(), ""); };
  const int64_t calls = calls_per_sample(1000, [&] { planned.call(); });
  const int64_t plans = calls_per_sample(1000, make);
  for (int i = 0; i < samples; ++i) {
    run.push_back(sample_us(calls, [&] { planned.run(); }));
    call.push_back(sample_us(calls, [&] { planned.call(); }));
    plan.push_back(sample_us(plans, make));
  }
  return {summarize(run), summarize(call), summarize(plan)};
}

nlohmann::json timing_json(const Timing& timing) {
  return {{"median_us", timing.median_us},
          {"p10_us", timing.p10_us},
          {"p90_us", timing.p90_us},
          {"samples", timing.samples}};
}

nlohmann::json by_threads(const std::map<int, double>& values) {
  nlohmann::json json = nlohmann::json::object();
  for (const auto& [threads, value] : values) json[std::to_string(threads)] = value;
  return json;
}

nlohmann::json to_json(const BenchRequest& request, const std::vector<Row>& rows, const Ceilings& ceilings,
                       const HostTimes& host, const std::vector<GpuRow>& gpu_rows) {
  nlohmann::json list = nlohmann::json::array();
  for (const Row& row : rows) {
    nlohmann::json json = timing_json(row.timing);
    json.update({{"problem", row.problem},
                 {"impl", row.impl},
                 {"threads", row.threads},
                 {"gflops", row.gflops},
                 {"gbs", row.gbs},
                 {"workspace_bytes", row.workspace_bytes},
                 {"peer", "heed"}});
    list.push_back(json);
  }
  return {
      {"heed", heed_version()},
      {"machine", machine_facts()},
      {"date", utc_date()},
      {"command", request.command},
      {"peak_gflops", by_threads(ceilings.peak_gflops)},
      {"read_gbs", by_threads(ceilings.read_gbs)},
      {"host", {{"run", timing_json(host.run)}, {"call", timing_json(host.call)}, {"plan", timing_json(host.plan)}}},
      {"rows", list},
      {"gpu_rows", gpu_rows_json(gpu_rows, request)}};
}

void print_table(const std::vector<Row>& rows, const Ceilings& ceilings, const HostTimes& host) {
  Table table({"problem", "impl", "threads", "median", "p10", "p90", "GFLOP/s", "% peak", "GB/s", "% read"}, 2);
  for (const Row& row : rows) {
    table.add({row.problem, row.impl, cli::format("{}", row.threads), time_text(row.timing.median_us),
               time_text(row.timing.p10_us), time_text(row.timing.p90_us), cli::format("{:.1f}", row.gflops),
               cli::format("{:.1f}", 100 * row.gflops / ceilings.peak_gflops.at(row.threads)),
               cli::format("{:.2f}", row.gbs),
               cli::format("{:.1f}", 100 * row.gbs / ceilings.read_gbs.at(row.threads))});
  }
  cli::print("{}\n", table.text());
  for (const auto& [threads, peak] : ceilings.peak_gflops) {
    cli::print("peak on {} thread{}: {:.0f} GFLOP/s of f32 multiply-adds, {:.1f} GB/s read from memory\n", threads,
               threads == 1 ? "" : "s", peak, ceilings.read_gbs.at(threads));
  }
  cli::print("host, 1 query and 1 key: {} to run a plan, {} a call with its plan cached, {} to make a plan\n",
             time_text(host.run.median_us), time_text(host.call.median_us), time_text(host.plan.median_us));
}

}  // namespace

std::vector<std::string> backends_for(const Job& job, const BenchRequest& request) {
  if (request.backends.empty()) return {""};
  std::vector<std::string> names;
  for (const std::string& backend : request.backends) {
    if (backend != "all") {
      names.push_back(backend);
      continue;
    }
    for (const Verdict& verdict : verdicts(job.problem(0).get())) {
      if (verdict.accepted && !verdict.impl.starts_with("ref/")) names.push_back(verdict.impl);
    }
  }
  return names;
}

int run_bench(const BenchRequest& request) {
  std::vector<std::string> lines = problem_lines(request.words);
  for (std::string& line : lines) line = with_device(line, request.device);
  std::vector<int> threads = request.threads;
  if (threads.empty()) threads = {1, usable_cores()};
  std::sort(threads.begin(), threads.end());
  threads.erase(std::unique(threads.begin(), threads.end()), threads.end());

  Progress progress;
  Ceilings ceilings;
  std::vector<Row> rows;
  std::vector<GpuRow> gpu_rows;
  std::vector<std::string> failures;
  progress.show("the library's own time");
  const HostTimes host = time_host(request.samples);
  for (size_t i = 0; i < lines.size(); ++i) {
    const std::string title = cli::format("{}/{} {}:", i + 1, lines.size(), lines[i]);
    progress.show(title + " making inputs");
    try {
      const Job job(lines[i]);
      if (is_on_gpu(job)) {
        progress.show(title + " timing");
        const std::vector<GpuRow> timed = time_on_gpu(job, lines[i], request);
        gpu_rows.insert(gpu_rows.end(), timed.begin(), timed.end());
        continue;
      }
      progress.show(title + " probing the machine");
      ceilings.probe(threads);  // at every problem: a ceiling from a disturbed moment would flatter what follows
      std::deque<Cell> cells = make_cells(job, request, threads);
      time_cells(cells, request, title, progress);
      for (const Cell& cell : cells) rows.push_back(make_row(cell, lines[i]));
    } catch (const Failure& failure) {
      failures.push_back(cli::format("{}: {}", lines[i], failure.what()));
    }
  }
  if (!rows.empty()) {
    progress.show("probing the machine");
    ceilings.probe(threads);
  }
  progress.clear();
  if (!rows.empty() || gpu_rows.empty()) print_table(rows, ceilings, host);
  print_gpu_table(gpu_rows, request);
  if (!request.json.empty()) write_json(request.json, to_json(request, rows, ceilings, host, gpu_rows));
  for (const std::string& failure : failures) cli::print(stderr, "heed: {}\n", failure);
  return failures.empty() ? 0 : 1;
}

}  // namespace heed::cli
