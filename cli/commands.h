// The commands: what each was asked (main.cpp fills these in) and the functions that do it. They return the exit code,
// print to stdout, and throw UsageError, Failure or FileError.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "tensor_file.h"

namespace heed::cli {

struct InfoRequest {
  bool json = false;
};
int run_info(const InfoRequest& request);

struct ExplainRequest {
  std::vector<std::string> words;  // a problem line, or files of them
  std::string device;              // "": as the line says
  std::string backend;
  bool json = false;
};
int run_explain(const ExplainRequest& request);

// Tensors in files and the options of attention; q, k, v and out have q's layout unless layout_kv differs.
struct AttentionFiles {
  std::vector<std::string> inputs;             // FILE or FILE:PREFIX, every tensor with a known name
  std::map<std::string, std::string> tensors;  // "cu_seqlens_q" -> FILE or FILE:NAME
  std::string layout, layout_kv;               // "": thd with cu_seqlens, else bshd
  std::string dtype, out_dtype;                // "": as in the files; out as q
  bool causal = false;
  std::vector<int64_t> window;  // empty or {left, right}
  std::string offset;           // "", "top" or a number
  int64_t chunk = 0, splits = 0;
  double softcap = 0, dropout = 0;
  std::optional<double> scale;
  uint64_t seed = 0;
  bool batch_invariant = false;
  bool backward = false;

  bool operator==(const AttentionFiles&) const = default;
};

struct WarmRequest {
  std::vector<std::string> words;
  std::string arch;  // "": of the GPU here
  int jobs = 0;      // 0: one per core
  bool json = false;
};
int run_warm(const WarmRequest& request);

struct RunRequest {
  std::vector<std::string> words;  // a problem line instead of files, or input files
  AttentionFiles files;
  std::string device = "auto";  // or cpu, cuda, cuda:N
  std::string backend, output, lse, save_inputs, map;
  int threads = 0, samples = 15;
  int64_t head = 0, batch = 0;
  bool check = false, explain = false, json = false;
};
int run_run(const RunRequest& request);

struct CheckRequest {
  std::vector<std::string> words;
  std::string device;         // "": as the lines say
  std::string backend, impl;  // impl "all": every one that accepts
  int threads = 0;
  bool json = false;
};
int run_check(const CheckRequest& request);

struct BenchRequest {
  std::vector<std::string> words;
  std::string device;                 // "": as the lines say
  std::vector<std::string> backends;  // empty: the one that heed chooses; "all": each that accepts
  std::vector<int> threads;           // empty: 1 and all cores
  int samples = 15;
  double min_time_ms = 10;
  bool hot = false;  // GPU: samples back to back instead of rested
  std::string json;
  std::string command;  // as typed, for the JSON file
};
int run_bench(const BenchRequest& request);

}  // namespace heed::cli
