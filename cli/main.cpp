// heed on the command line: what each command is asked is declared here, what it does is in the file of its name.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <new>

#include "commands.h"
#include "format.h"
#include "library.h"

namespace {

namespace cli = heed::cli;
using namespace heed::cli;

constexpr const char* kProblemHelp =
    "A problem line, quoted or in words, e.g. attention b=1 hq=8 sq=1024 d=64 causal; docs/conventions.md has the "
    "grammar";
constexpr const char* kProblemsHelp = "Problem lines, quoted or in words, or files of them (- is stdin)";
constexpr const char* kDeviceHelp = "cpu, cuda or cuda:N, whatever the line says";
constexpr const char* kBackendHelp = "Do it with this backend (cpu, ref) or implementation (ref/attention), or fail";

// `also`: a further name that is allowed, or "".
void add_device(CLI::App* command, std::string& device, const std::string& also, const char* what) {
  const auto check = [also](const std::string& text) {
    const bool is_index =
        text.starts_with("cuda:") && text.size() > 5 && text.find_first_not_of("0123456789", 5) == std::string::npos;
    if (text == "cpu" || text == "cuda" || is_index || (!also.empty() && text == also)) return std::string();
    return cli::format("is '{}'; allowed are {}{}cpu, cuda and cuda:N", text, also, also.empty() ? "" : ", ");
  };
  command->add_option("--device", device, what)->check(CLI::Validator(check, "DEVICE"))->type_name("DEVICE");
}

CLI::App* add_command(CLI::App& app, const char* name, const char* what, const char* examples) {
  CLI::App* command = app.add_subcommand(name, what);
  command->footer(cli::format("Examples:\n{}", examples));
  return command;
}

void add_info(CLI::App& app, InfoRequest& request) {
  CLI::App* command = add_command(app, "info", "The machine, the backends and why any is missing, the configuration",
                                  "  heed info\n  heed info --json");
  command->add_flag("--json", request.json, "Print JSON");
}

void add_explain(CLI::App& app, ExplainRequest& request) {
  CLI::App* command =
      add_command(app, "explain", "How a problem would be done, and what every implementation says of it",
                  "  heed explain attention b=1 hq=8 sq=1024 d=64 causal\n"
                  "  heed explain attention sq=100 d=80 bf16 --backend ref");
  command->add_option("problem", request.words, kProblemHelp)->required();
  add_device(command, request.device, "", kDeviceHelp);
  command->add_option("--backend", request.backend, kBackendHelp);
  command->add_flag("--json", request.json, "Print JSON");
}

void add_tensor_options(CLI::App* command, AttentionFiles& files) {
  command
      ->add_option("--input", files.inputs,
                   "A file whose tensors are named q, k, v, bias, ...; FILE:PREFIX for prefixed names")
      ->type_name("FILE[:PREFIX]")
      ->group("Tensors");
  constexpr std::pair<const char*, const char*> kTensors[] = {
      {"q", "Queries"},
      {"k", "Keys"},
      {"v", "Values"},
      {"bias", "Added to the scores"},
      {"mask", "bool; true: may attend"},
      {"alibi-slopes", "One slope a head"},
      {"sinks", "One extra logit a head"},
      {"cu-seqlens-q", "Where packed sequences start in q"},
      {"cu-seqlens-k", "Where packed sequences start in k and v"},
      {"seqused-q", "Queries used of each sequence"},
      {"seqused-k", "Keys used of each sequence"},
      {"leftpad-k", "Keys to skip at each sequence's start"},
      {"page-table", "Pages of each sequence"},
      {"cache-batch-idx", "The row of k and v that each sequence reads"},
      {"dout", "Gradient of the result, with --pass bwd"},
      {"dlse", "Gradient of the log-sum-exp, with --pass bwd"},
  };
  for (const auto& [flag, what] : kTensors) {
    std::string name = flag;
    std::replace(name.begin(), name.end(), '-', '_');
    command
        ->add_option_function<std::string>(
            cli::format("--{}", flag), [&files, name](const std::string& ref) { files.tensors[name] = ref; }, what)
        ->type_name("FILE[:NAME]")
        ->group("Tensors");
  }
  command
      ->add_option("--layout", files.layout,
                   "Of q (and k, v): bshd, bhsd or thd; default thd with cu-seqlens-q, else bshd")
      ->check(CLI::IsMember({"bshd", "bhsd", "thd"}))
      ->type_name("NAME")
      ->group("Tensors");
  command->add_option("--layout-kv", files.layout_kv, "Of k and v, where it differs")
      ->check(CLI::IsMember({"bshd", "bhsd", "thd"}))
      ->type_name("NAME")
      ->group("Tensors");
  command->add_option("--dtype", files.dtype, "Convert q, k and v to f32, f16 or bf16 first")
      ->check(CLI::IsMember({"f32", "f16", "bf16"}))
      ->type_name("TYPE")
      ->group("Tensors");
  command->add_option("--out-dtype", files.out_dtype, "f32: the result in f32, whatever q is")
      ->check(CLI::IsMember({"f32"}))
      ->type_name("TYPE")
      ->group("Tensors");
}

void add_score_options(CLI::App* command, AttentionFiles& files) {
  const char* group = "Scores";
  command
      ->add_option_function<std::string>(
          "--pass", [&files](const std::string& pass) { files.backward = pass == "bwd"; },
          "bwd: the gradients of a result whose gradient is dout")
      ->check(CLI::IsMember({"fwd", "bwd"}))
      ->type_name("NAME")
      ->group(group);
  command->add_flag("--causal", files.causal, "Key j is visible iff j <= the query's position")->group(group);
  command->add_option("--window", files.window, "L,R: keys from L before to R after the position; -1 is unbounded")
      ->delimiter(',')
      ->expected(2)
      ->type_name("L,R")
      ->group(group);
  command
      ->add_option("--offset", files.offset, "Where query 0 stands: top (at key 0) or a number; default: ends aligned")
      ->type_name("top|N")
      ->group(group);
  command->add_option("--chunk", files.chunk, "Attend within chunks of N positions")->type_name("N")->group(group);
  command->add_option("--softcap", files.softcap, "s = X * tanh(s / X)")->type_name("X")->group(group);
  command->add_option("--scale", files.scale, "Factor on q k; default 1/sqrt(head_dim)")->type_name("X")->group(group);
  command->add_option("--dropout", files.dropout, "Probability of dropping a key")->type_name("P")->group(group);
  command->add_option("--seed", files.seed, "Of the dropout mask")->type_name("N")->group(group);
  command->add_option("--splits", files.splits, "Keys of a sequence in N parts; default: heed chooses")
      ->type_name("N")
      ->group(group);
  command->add_flag("--batch-invariant", files.batch_invariant, "A sequence's bits do not depend on its neighbours")
      ->group(group);
}

void add_run(CLI::App& app, RunRequest& request) {
  CLI::App* command = add_command(app, "run", "Attention on tensors from files, or on inputs made for a problem line",
                                  "  heed run --input layer.safetensors --causal --check -o out.npy\n"
                                  "  heed run --q q.npy --k k.npy --v v.npy --layout bhsd --lse lse.npy -o out.npy\n"
                                  "  heed run layer.safetensors --map map.npy --head 3\n"
                                  "  heed run layer.safetensors --pass bwd --dout dout.npy -o gradients.npz\n"
                                  "  heed run attention b=2 hq=8 sq=512 d=64 bf16 causal --check --explain");
  command->add_option("problem|file", request.words, "A problem line, or files as with --input");
  add_device(command, request.device, "auto", "auto (the GPU where there is one that does it), cpu, cuda or cuda:N");
  command->add_option("-o,--output", request.output, "Write the result: .npy, .npz or .safetensors")->type_name("FILE");
  command->add_option("--lse", request.lse, "Compute and write the log-sum-exp of every row")->type_name("FILE");
  command->add_option("--save-inputs", request.save_inputs, "Write the inputs, made or read: .npz or .safetensors")
      ->type_name("FILE");
  command->add_option("--map", request.map, "Write the probabilities [queries, keys] of one head")->type_name("FILE");
  command->add_option("--head", request.head, "The query head of --map")->type_name("H");
  command->add_option("--batch", request.batch, "The sequence of --map")->type_name("B");
  command->add_flag("--check", request.check, "Compare with the reference; exit code 1 outside its bound");
  command->add_flag("--explain", request.explain, "Print how it is done, and why so");
  command->add_option("--backend", request.backend, kBackendHelp)->type_name("NAME");
  command->add_option("--threads", request.threads, "At most so many")->check(CLI::PositiveNumber)->type_name("N");
  command->add_option("--samples", request.samples, "Time samples")
      ->check(CLI::PositiveNumber)
      ->type_name("N")
      ->capture_default_str();
  command->add_flag("--json", request.json, "Print JSON");
  add_tensor_options(command, request.files);
  add_score_options(command, request.files);
}

void add_check(CLI::App& app, CheckRequest& request) {
  CLI::App* command =
      add_command(app, "check", "Problems against the reference in double precision; exit code 1 if any is wrong",
                  "  heed check attention hq=4 hkv=2 sq=100 d=64 bf16 causal\n"
                  "  heed check tests/problems/smoke.txt --impl all");
  command->add_option("problems", request.words, kProblemsHelp)->required();
  add_device(command, request.device, "", kDeviceHelp);
  command->add_option("--backend", request.backend, kBackendHelp)->type_name("NAME");
  command->add_option("--impl", request.impl, "all: every implementation that accepts; or the name of one")
      ->type_name("NAME");
  command->add_option("--threads", request.threads, "At most so many")->check(CLI::PositiveNumber)->type_name("N");
  command->add_flag("--json", request.json, "Print JSON");
}

void add_bench(CLI::App& app, BenchRequest& request) {
  CLI::App* command =
      add_command(app, "bench", "Times of problems, beside what the machine can do at best (docs/measuring.md)",
                  "  heed bench attention hq=8 sq=1024 d=64 causal --threads 1,2\n"
                  "  heed bench tests/problems/models.txt --json models.json\n"
                  "  python -m heed.plot models.json -o models.png\n"
                  "  heed bench attention sq=256 d=64 --backend all");
  command->add_option("problems", request.words, kProblemsHelp)->required();
  add_device(command, request.device, "", kDeviceHelp);
  command->add_option("--threads", request.threads, "Thread counts, e.g. 1,2; default: 1 and all cores")
      ->delimiter(',')
      ->check(CLI::PositiveNumber)
      ->type_name("N,...");
  command
      ->add_option("--backend", request.backends, "Backends or implementations, e.g. cpu,ref; all: each that accepts")
      ->delimiter(',')
      ->type_name("NAME,...");
  command->add_option("--samples", request.samples, "Samples a cell; claims need 15")
      ->check(CLI::PositiveNumber)
      ->type_name("N")
      ->capture_default_str();
  command->add_option("--min-time", request.min_time_ms, "Least length of a sample, milliseconds")
      ->check(CLI::PositiveNumber)
      ->type_name("MS")
      ->capture_default_str();
  command->add_flag("--hot", request.hot, "GPU: samples back to back, without 60 ms of rest before each");
  command->add_option("--json", request.json, "Write the figures here too")->type_name("FILE");
}

void add_warm(CLI::App& app, WarmRequest& request) {
  CLI::App* command =
      add_command(app, "warm", "Compile ahead the GPU kernels that problems need, into the kernel cache",
                  "  heed warm attention b=4 hq=32 hkv=8 sq=4096 d=128 bf16 causal\n"
                  "  heed warm tests/problems/models.txt --arch sm_90a   # on a machine without a GPU");
  command->add_option("problems", request.words, kProblemsHelp)->required();
  command->add_option("--arch", request.arch, "For the usual GPU of this architecture; default: the GPU here")
      ->type_name("sm_90a");
  command->add_option("--jobs", request.jobs, "Kernels to compile at the same time; default: one per core")
      ->check(CLI::PositiveNumber)
      ->type_name("N");
  command->add_flag("--json", request.json, "Print JSON");
}

int complain(const std::string& sentence, int code) {
  cli::print(stderr, "heed: {}\n", sentence);
  return code;
}

struct Requests {
  InfoRequest info;
  ExplainRequest explain;
  RunRequest run;
  CheckRequest check;
  BenchRequest bench;
  WarmRequest warm;
};

int dispatch(const CLI::App& app, const Requests& requests) {
  if (app.got_subcommand("info")) return run_info(requests.info);
  if (app.got_subcommand("explain")) return run_explain(requests.explain);
  if (app.got_subcommand("run")) return run_run(requests.run);
  if (app.got_subcommand("check")) return run_check(requests.check);
  if (app.got_subcommand("bench")) return run_bench(requests.bench);
  return run_warm(requests.warm);
}

}  // namespace

int main(int argc, char** argv) {
  Requests requests;
  CLI::App app("heed: exact attention, explained.", "heed");
  app.set_version_flag("--version", std::string("heed ") + heed_version());
  app.require_subcommand(1);
  app.footer(
      "heed COMMAND --help shows a command's options and examples.\n"
      "Exit codes: 0 done, 1 failed or wrong, 2 not understood.");
  add_info(app, requests.info);
  add_explain(app, requests.explain);
  add_run(app, requests.run);
  add_check(app, requests.check);
  add_bench(app, requests.bench);
  add_warm(app, requests.warm);
  for (int i = 0; i < argc; ++i)
    requests.bench.command += cli::format("{}{}", i > 0 ? " " : "", i > 0 ? argv[i] : "heed");
  try {
    const auto is_named = [&](const CLI::App* command) { return argc > 1 && command->check_name(argv[1]); };
    if (argc > 1 && argv[1][0] != '-' && app.get_subcommands(is_named).empty()) {
      return complain(
          cli::format("there is no command '{}'; there are info, explain, run, check, bench and warm", argv[1]), 2);
    }
    app.parse(argc, argv);
    return dispatch(app, requests);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version
    return complain(cli::format("{} (heed --help)", error.what()), 2);
  } catch (const UsageError& error) {
    return complain(error.what(), 2);
  } catch (const std::bad_alloc&) {
    return complain("there is not enough memory for this", 1);
  } catch (const std::exception& error) {
    return complain(error.what(), 1);
  }
}
