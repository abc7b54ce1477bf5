// attention, forward: the registry's rows, the plan, and the division of a run's work among threads.
#include "cpu/attention_fwd.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>

#include "base/format.h"
#include "base/threads.h"
#include "cpu/amx.h"
#include "cpu/attention_fwd_bf16.h"
#include "plan/impl.h"

namespace heed::cpu {
namespace {

constexpr int64_t kMaxChunks = 32;
constexpr int64_t kLineFloats = 16;  // 64 bytes

// ---- blocking
// -----------------------------------------------------------------------------------------------------------

int64_t decode_rows_limit(const AttentionProblem&) { return kDecodeRows; }

int64_t max_rows(const AttentionProblem& problem) {
  const int64_t queries = problem.packed_q() ? problem.total_q : problem.seqlen_q;
  return queries * problem.gqa_ratio();
}

// kv heads that a decode unit takes together: as many as lie side by side within some 4 KiB, one page of memory.
int64_t decode_heads(const AttentionProblem& problem) {
  const auto &k = problem.strides(Slot::kK), &v = problem.strides(Slot::kV);
  const bool side_by_side = k[1] < k[2] && v[1] < v[2];
  const bool whole = problem.head_dim % kRowPad == 0 && problem.head_dim_v % kRowPad == 0;  // else rows are copied
  if (!side_by_side || !whole) return 1;
  const int64_t bytes = std::max(problem.head_dim, problem.head_dim_v) * dtype_bytes(problem.dtype);
  return std::clamp<int64_t>(4096 / bytes, 1, std::min(kDecodeHeads, problem.nheads_kv));
}

ForwardShape shape_of(const AttentionProblem& problem, Products products) {
  ForwardShape shape;
  shape.head_dim = problem.head_dim;
  shape.head_dim_v = problem.head_dim_v;
  const int64_t widest = std::max(problem.head_dim, problem.head_dim_v);
  shape.key_block = widest <= 128 ? 128 : 64;
  // K and V are brought into place once per unit, which weighs more where products are quick.
  shape.unit_rows = widest <= 128 ? (products == Products::kAmx ? 512 : 256) : widest <= 256 ? 128 : 64;
  shape.decode_only = max_rows(problem) <= decode_rows_limit(problem);
  shape.decode_rows = decode_heads(problem) * std::min(max_rows(problem), kDecodeRows);
  shape.modified = problem.bias() || problem.mask;
  shape.products = products;
  return shape;
}

// Keys of a chunk: from the sequence's own length, never from threads or neighbours.
int64_t chunk_keys(const AttentionProblem& problem, int64_t k_len, bool decode) {
  const int64_t block = 128;
  if (problem.splits > 0) return round_up(std::max<int64_t>((k_len + problem.splits - 1) / problem.splits, 1), block);
  return std::max<int64_t>(decode ? 512 : 1024, round_up((k_len + kMaxChunks - 1) / kMaxChunks, block));
}

int64_t max_chunks(const AttentionProblem& problem) {
  const int64_t keys = problem.packed_k() ? problem.total_k : problem.seqlen_k;
  const int64_t bound = problem.splits > 0 ? problem.splits : kMaxChunks;
  return std::clamp<int64_t>((keys + 127) / 128, 1, bound);
}

// ---- what a plan carries
// --------------------------------------------------------------------------------------------------

struct ForwardParams {
  const ForwardKernels* kernels = nullptr;
  const Bf16Tiles* bf16 = nullptr;
  ForwardShape shape;
  ScratchLayout layout;
  int32_t threads = 1;
  int64_t max_split_units = 0;  // units whose chunks may be tasks: workspace for their partials
  int64_t partial_stride = 0;
  size_t sequences_at = 0, pending_at = 0, partials_at = 0, scratch_at = 0;  // bytes into the workspace
};

// Fewer units than this many per thread: chunks become tasks.
constexpr int64_t kUnitsPerThread = 2;

void lay_out_workspace(const AttentionProblem& problem, ForwardParams* params, size_t* bytes) {
  size_t at = 0;
  const auto take = [&](int64_t size) {
    const size_t start = at;
    at += static_cast<size_t>(round_up(size, 64));
    return start;
  };
  params->sequences_at = take((problem.batch + 1) * static_cast<int64_t>(sizeof(SequenceWork)));
  const bool may_split = params->threads > 1 && max_chunks(problem) > 1;
  params->max_split_units = may_split ? kUnitsPerThread * params->threads - 1 : 0;
  const int64_t rows = params->shape.decode_only ? params->shape.decode_rows : params->shape.unit_rows;
  params->partial_stride = round_up(partial_floats(params->shape, rows), kLineFloats);
  params->pending_at = take(params->max_split_units * static_cast<int64_t>(sizeof(std::atomic<int32_t>)));
  params->partials_at = take(params->max_split_units * max_chunks(problem) * params->partial_stride * 4);
  params->scratch_at = take(params->threads * params->layout.floats * 4);
  *bytes = at;
}

// ---- the run
// ----------------------------------------------------------------------------------------------------------------

int64_t num_head_groups(const ForwardRun& run, const SequenceWork& work) {
  return (run.problem->nheads_kv + work.unit_heads - 1) / work.unit_heads;
}

int64_t count_units(const ForwardRun& run) {
  int64_t units = 0;
  for (int64_t b = 0; b < run.num_sequences; ++b)
    units += run.sequences[b].row_blocks * num_head_groups(run, run.sequences[b]);
  return units;
}

void set_units(ForwardRun* run) {
  for (int64_t b = 0; b < run->num_sequences; ++b) {
    SequenceWork& work = run->sequences[b];
    const int64_t rows = work.where.q_len * run->problem->gqa_ratio();
    work.row_blocks = work.decode ? 1 : (rows + run->unit_rows - 1) / run->unit_rows;
    work.unit_heads = work.decode ? run->decode_heads : 1;
  }
}

bool has_padding(const Sequence& s) { return s.q_gap > 0 || s.q_rows > s.q_len; }

// Geometry of every sequence, then the list of tasks: per kv head all units of a sequence, heaviest first, and one task
// for its padding.
void divide_work(ForwardRun* run, int32_t threads) {
  const AttentionProblem& problem = *run->problem;
  PackedRows before;
  int64_t longest = 0;  // chunks of the longest sequence
  for (int64_t b = 0; b < problem.batch; ++b) {
    SequenceWork* work = new (run->sequences + b) SequenceWork;
    work->where = locate_sequence(problem, *run->args, b, &before);
    const int64_t rows = work->where.q_len * problem.gqa_ratio();
    work->decode = rows > 0 && rows <= decode_rows_limit(problem);
    work->chunk_keys = chunk_keys(problem, work->where.k_len, work->decode);
    work->num_chunks = std::max<int64_t>(1, (work->where.k_len + work->chunk_keys - 1) / work->chunk_keys);
    longest = std::max(longest, work->num_chunks);
    if (run->args->status != nullptr) run->args->status[b] = work->where.status;
  }
  SequenceWork* tail = new (run->sequences + problem.batch) SequenceWork;
  if (problem.packed_q()) {
    tail->where.q_begin = problem.total_q;
    tail->where.q_gap = problem.total_q - before.end_q;
  }
  run->num_sequences = problem.batch + 1;
  // Smaller units when there are few: which rows and heads share a unit changes no bit.
  run->unit_rows = run->shape.unit_rows;
  run->decode_heads = decode_heads(problem);
  set_units(run);
  while (threads > 1 && run->unit_rows > kBlockLanes && count_units(*run) < 4 * threads) {
    run->unit_rows /= 2;
    set_units(run);
  }
  const bool chunks_are_tasks = run->pending != nullptr && longest > 1;
  while (threads > 1 && !chunks_are_tasks && run->decode_heads > 1 && count_units(*run) < 2 * threads) {
    run->decode_heads /= 2;
    set_units(run);
  }
  run->split = run->pending != nullptr && count_units(*run) < kUnitsPerThread * threads;
  int64_t task = 0, unit = 0;
  for (int64_t b = 0; b < run->num_sequences; ++b) {
    SequenceWork& work = run->sequences[b];
    work.first_task = task;
    work.first_unit = unit;
    const int64_t units = work.row_blocks * num_head_groups(*run, work);
    if (run->split)
      for (int64_t u = 0; u < units; ++u)
        new (run->pending + unit + u) std::atomic<int32_t>(static_cast<int32_t>(work.num_chunks));
    unit += units;
    task += units * (run->split ? work.num_chunks : 1) + (has_padding(work.where) ? 1 : 0);
  }
  run->num_tasks = task;
}

void run_one_task(const ForwardRun& run, int64_t index, float* scratch) {
  const SequenceWork* work = std::upper_bound(run.sequences, run.sequences + run.num_sequences, index,
                                              [](int64_t i, const SequenceWork& w) { return i < w.first_task; }) -
                             1;
  const int64_t chunks = run.split ? work->num_chunks : 1, per_head = work->row_blocks * chunks;
  const int64_t in_sequence = index - work->first_task;
  if (in_sequence >= per_head * num_head_groups(run, *work)) {
    clear_query_rows(run, work->where, -work->where.q_gap, work->where.q_gap);
    clear_query_rows(run, work->where, work->where.q_len, work->where.q_rows - work->where.q_len);
    return;
  }
  UnitTask task;
  task.work = work;
  const int64_t group = in_sequence / per_head;
  task.kv_head = group * work->unit_heads;
  task.num_heads = std::min(work->unit_heads, run.problem->nheads_kv - task.kv_head);
  const int64_t in_head = in_sequence % per_head,
                block = work->row_blocks - 1 - in_head / chunks;  // late rows see most keys
  task.first_row = block * run.unit_rows;
  task.num_rows = std::min(run.unit_rows, work->where.q_len * run.problem->gqa_ratio() - task.first_row);
  if (run.split) {
    const int64_t unit = work->first_unit + group * work->row_blocks + block;
    task.chunk = in_head % chunks;
    task.pending = run.pending + unit;
    task.partials = run.partials + unit * max_chunks(*run.problem) * run.partial_stride;
  }
  run.kernels->attend(run, task, scratch);
}

Status run_forward(const Plan<AttentionProblem>& plan, const Step<AttentionProblem>& step, const AttentionArgs& args) {
  const ForwardParams& params = *static_cast<const ForwardParams*>(step.params.get());
  char* workspace = static_cast<char*>(args.workspace) + step.workspace_offset;
  ForwardRun run;
  run.problem = &plan.problem;
  run.args = &args;
  run.kernels = params.kernels;
  run.bf16 = params.bf16;
  run.shape = params.shape;
  run.layout = params.layout;
  run.terms = make_score_terms(plan.problem, args);
  // Q carries the scale, unless that could push it out of f32's range or into denormals; bf16 products are scaled
  // after.
  const float scale = std::fabs(run.terms.factor);
  run.scale = run.terms.factor;
  if (scale == 0.0f || (scale > 0x1p-40f && scale < 0x1p40f)) {
    run.q_factor = run.terms.factor;
    run.terms.factor = 1.0f;
  }
  run.partial_stride = params.partial_stride;
  run.sequences = reinterpret_cast<SequenceWork*>(workspace + params.sequences_at);
  if (params.max_split_units > 0) {
    run.pending = reinterpret_cast<std::atomic<int32_t>*>(workspace + params.pending_at);
    run.partials = reinterpret_cast<float*>(workspace + params.partials_at);
  }
  divide_work(&run, params.threads);
  std::atomic<int64_t> next{0};
  float* scratch = reinterpret_cast<float*>(workspace + params.scratch_at);
  run_tasks(*args.executor, static_cast<int32_t>(std::min<int64_t>(params.threads, run.num_tasks)),
            [&](int32_t worker) {
              for (;;) {
                const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
                if (task >= run.num_tasks) return;
                run_one_task(run, task, scratch + worker * params.layout.floats);
              }
            });
  return {};
}

// ---- the rows
// ---------------------------------------------------------------------------------------------------------------

struct RowFacts {
  const char* label;  // "avx512"
  const ForwardKernels* (*kernels)();
  double lanes;  // multiply-adds of f32 a cycle, for the estimate
  Products products;
};

Verdict check_problem(const AttentionProblem& problem, const RowFacts& facts) {
  if (problem.pass != Pass::kForward)
    return decline("does the forward pass only; cpu/attention_bwd does the backward pass");
  if (problem.dtype != Dtype::kF32 && problem.dtype != Dtype::kF16 && problem.dtype != Dtype::kBf16)
    return decline(heed::format("takes f32, f16 and bf16, not {}; ref/attention takes f64", dtype_name(problem.dtype)));
  if (problem.out_dtype != problem.dtype && problem.out_dtype != Dtype::kF32)
    return decline(
        heed::format("writes out as {} or f32, not {}", dtype_name(problem.dtype), dtype_name(problem.out_dtype)));
  if (problem.head_dim < 1 || problem.head_dim > 512 || problem.head_dim_v < 1 || problem.head_dim_v > 512)
    return decline(heed::format("takes head_dim and head_dim_v from 1 to 512, not {} and {}; ref/attention takes any",
                                problem.head_dim, problem.head_dim_v));
  const ForwardShape shape = shape_of(problem, facts.products);
  return accept(heed::format("rows: lanes are query rows, {} x {} keys a step; up to {} rows: lanes are head_dim",
                             shape.unit_rows, shape.key_block, decode_rows_limit(problem)));
}

// Multiply-adds at the rate of the instruction set, or memory where that is slower: enough to order rows.
double estimate_us(const AttentionProblem& problem, const Machine& machine, const RowFacts& facts) {
  const double threads = std::max(1, problem.threads);
  const double cycles = flops(problem) / (2.0 * facts.lanes * 0.8), memory_us = bytes(problem) / 20e3;
  return 2.0 + std::max(cycles / 3.0e3, memory_us) / threads;
}

template <class Problem>
Status prepare_forward(const Problem& problem, Plan<Problem>& plan, const RowFacts& facts) {
  auto params = std::make_shared<ForwardParams>();
  params->kernels = facts.kernels();
  params->bf16 = facts.products == Products::kF32 ? nullptr : bf16_tiles();
  params->shape = shape_of(problem, facts.products);
  params->layout = lay_out_scratch(params->shape);
  params->threads = std::max(1, problem.threads);
  Step<Problem> step;
  lay_out_workspace(problem, params.get(), &step.workspace_bytes);
  step.kernel = heed::format("attention_fwd {} q{} k{}", facts.label, params->shape.unit_rows, params->shape.key_block);
  step.run = run_forward;
  const int64_t queries = problem.packed_q() ? problem.total_q : problem.seqlen_q * problem.batch;
  step.grid =
      (queries * problem.gqa_ratio() + params->shape.unit_rows - 1) / params->shape.unit_rows * problem.nheads_kv;
  step.scratch_bytes = static_cast<size_t>(params->layout.floats) * 4;
  plan.workspace_bytes = step.workspace_bytes;
  step.params = std::move(params);
  plan.steps.push_back(std::move(step));
  return {};
}

const RowFacts kAmx = {"amx", forward_kernels_avx512, 64.0, Products::kAmx};
const RowFacts kAvx512Bf16 = {"avx512_bf16", forward_kernels_avx512, 32.0, Products::kBf16Dot};
const RowFacts kAvx512 = {"avx512", forward_kernels_avx512, 16.0, Products::kF32};
const RowFacts kAvx2 = {"avx2", forward_kernels_avx2, 12.0, Products::kF32};
const RowFacts kNeon = {"neon", forward_kernels_neon, 8.0, Products::kF32};
const RowFacts kGeneric = {"generic", forward_kernels_generic, 1.0, Products::kF32};

Verdict check_compiled(const AttentionProblem& problem, const RowFacts& facts, bool cpu_has_it, const char* needs) {
  if (problem.device != Device::kCpu) return decline("runs on the CPU only");
  if (facts.kernels() == nullptr) return decline(heed::format("this build has no {} kernels", facts.label));
  if (!cpu_has_it) return decline(heed::format("needs a CPU with {}", needs));
  return accept();
}

// What both rows with products of bf16 ask of a problem.
Verdict check_bf16_products(const AttentionProblem& problem, const RowFacts& facts) {
  if (bf16_tiles() == nullptr) return decline(heed::format("this build has no {} kernels", facts.label));
  if (problem.dtype != Dtype::kBf16)
    return decline(
        heed::format("multiplies bf16, not {}; cpu/attention_fwd_avx512 takes it", dtype_name(problem.dtype)));
  if (problem.out_dtype != Dtype::kBf16)
    return decline(
        heed::format("rounds probabilities to bf16, too coarse for out in {}; cpu/attention_fwd_avx512 keeps f32",
                     dtype_name(problem.out_dtype)));
  if (problem.head_dim % 2 != 0)
    return decline(
        heed::format("takes an even head_dim, not {}; cpu/attention_fwd_avx512 takes any", problem.head_dim));
  return check_problem(problem, facts);
}

Verdict check_avx512_bf16(const AttentionProblem& problem, const Machine& machine) {
  const Verdict verdict = check_compiled(problem, kAvx512Bf16, machine.cpu.avx512_bf16, "AVX-512 BF16");
  return verdict.accepted ? check_bf16_products(problem, kAvx512Bf16) : verdict;
}

Verdict check_amx(const AttentionProblem& problem, const Machine& machine) {
  Verdict verdict = check_compiled(problem, kAmx, machine.cpu.avx512, "AVX-512 and AMX BF16");
  if (verdict.accepted) verdict = check_bf16_products(problem, kAmx);
  if (!verdict.accepted) return verdict;
  if (shape_of(problem, Products::kAmx).decode_only)
    return decline(heed::format("takes more than {} packed rows; cpu/attention_fwd_avx512 takes few", kDecodeRows));
  return amx_refusal().empty() ? verdict : decline(amx_refusal());  // last: the first call asks for the whole process
}

double cost_avx512_bf16(const AttentionProblem& problem, const Machine& machine) {
  const double us = estimate_us(problem, machine, kAvx512Bf16);
  return machine.cpu.bf16_dot_pays ? us : 4.0 * us;  // at half the rate of f32
}

Verdict check_avx512(const AttentionProblem& problem, const Machine& machine) {
  Verdict verdict = check_compiled(problem, kAvx512, machine.cpu.avx512, "AVX-512 (F, BW, CD, DQ, VL)");
  return verdict.accepted ? check_problem(problem, kAvx512) : verdict;
}

Verdict check_avx2(const AttentionProblem& problem, const Machine& machine) {
  Verdict verdict = check_compiled(problem, kAvx2, machine.cpu.avx2, "AVX2, FMA and F16C");
  return verdict.accepted ? check_problem(problem, kAvx2) : verdict;
}

Verdict check_neon(const AttentionProblem& problem, const Machine& machine) {
  Verdict verdict = check_compiled(problem, kNeon, machine.cpu.neon, "NEON");
  return verdict.accepted ? check_problem(problem, kNeon) : verdict;
}

Verdict check_generic(const AttentionProblem& problem, const Machine&) {
  Verdict verdict = check_compiled(problem, kGeneric, true, "");
  return verdict.accepted ? check_problem(problem, kGeneric) : verdict;
}

template <const RowFacts& kFacts>
double cost(const AttentionProblem& problem, const Machine& machine) {
  return estimate_us(problem, machine, kFacts);
}

template <const RowFacts& kFacts>
Status prepare(const AttentionProblem& problem, const Machine&, Plan<AttentionProblem>& plan) {
  return prepare_forward(problem, plan, kFacts);
}

}  // namespace

// ---- scratch
// ------------------------------------------------------------------------------------------------------------------

int64_t partial_floats(const ForwardShape& shape, int64_t rows) {
  return rows * (round_up(shape.head_dim_v, kRowPad) + 2);
}

ScratchLayout lay_out_scratch(const ForwardShape& shape) {
  ScratchLayout at;
  const auto take = [&](int64_t floats) {
    const int64_t start = at.floats;
    at.floats += round_up(floats, kLineFloats);
    return start;
  };
  const int64_t d = round_up(shape.head_dim, kRowPad), dv = round_up(shape.head_dim_v, kRowPad);
  const int64_t rows = shape.decode_only ? shape.decode_rows : shape.unit_rows;
  const int64_t keys = shape.decode_only ? kDecodeBlock : shape.key_block;
  at.q = take(rows * d);
  at.part = take(partial_floats(shape, rows));
  at.sum = take(partial_floats(shape, rows));
  at.k = take(keys * d);
  at.v = take(keys * dv);
  if (shape.decode_only) {
    at.s = take(kDecodeRows * (kDecodeBlock + kRowPad));
    at.row = take(kDecodeBlock + kRowPad);
    return at;
  }
  at.s = take(keys * kBlockLanes);
  at.row = take(std::max(4 * keys, 16 * d));  // rows of bias on the way to a tile; rows of Q widened to f32
  if (shape.modified) at.tile = take(keys * kBlockLanes);
  at.lanes = take(rows / kBlockLanes * static_cast<int64_t>(sizeof(LaneBlock)) / 4);
  if (shape.products != Products::kF32) {
    const int64_t operand = round_up(shape.operand_dim(), kRowPad);
    at.q_pairs = take(rows * operand / 2);
    at.k_rows16 = take(keys * operand / 2);
    at.v_pairs = take(keys / 2 * dv);
    at.p_pairs = take(keys / 2 * kBlockLanes);
  }
  return at;
}

void clear_query_rows(const ForwardRun& run, const Sequence& sequence, int64_t first_row, int64_t num_rows) {
  const AttentionProblem& problem = *run.problem;
  const int64_t size = dtype_bytes(problem.out_dtype);
  for (int64_t i = first_row; i < first_row + num_rows; ++i) {
    for (int64_t h = 0; h < problem.nheads_q; ++h) {
      char* out = static_cast<char*>(run.args->out) + row_offset(problem, Slot::kOut, sequence, h, i) * size;
      std::memset(out, 0, static_cast<size_t>(problem.head_dim_v * size));
      if (problem.lse && run.args->lse != nullptr)
        static_cast<float*>(run.args->lse)[row_offset(problem, Slot::kLse, sequence, h, i)] = -INFINITY;
    }
  }
}

}  // namespace heed::cpu

namespace heed {

extern const Impl<AttentionProblem> kCpuAttentionFwdAmx = {
    "cpu/attention_fwd_amx", "forward, bf16 products on AMX", false, cpu::check_amx,
    cpu::cost<cpu::kAmx>,    cpu::prepare<cpu::kAmx>};
extern const Impl<AttentionProblem> kCpuAttentionFwdAvx512Bf16 = {
    "cpu/attention_fwd_avx512_bf16",
    "forward, bf16 products on the AVX-512 BF16 dot product",
    false,
    cpu::check_avx512_bf16,
    cpu::cost_avx512_bf16,
    cpu::prepare<cpu::kAvx512Bf16>};
extern const Impl<AttentionProblem> kCpuAttentionFwdAvx512 = {
    "cpu/attention_fwd_avx512", "forward, AVX-512",      false,
    cpu::check_avx512,          cpu::cost<cpu::kAvx512>, cpu::prepare<cpu::kAvx512>};
extern const Impl<AttentionProblem> kCpuAttentionFwdAvx2 = {
    "cpu/attention_fwd_avx2", "forward, AVX2 and FMA", false,
    cpu::check_avx2,          cpu::cost<cpu::kAvx2>,   cpu::prepare<cpu::kAvx2>};
extern const Impl<AttentionProblem> kCpuAttentionFwdNeon = {
    "cpu/attention_fwd_neon", "forward, NEON", false, cpu::check_neon, cpu::cost<cpu::kNeon>, cpu::prepare<cpu::kNeon>};
extern const Impl<AttentionProblem> kCpuAttentionFwdGeneric = {
    "cpu/attention_fwd_generic", "forward, plain C++",     false,
    cpu::check_generic,          cpu::cost<cpu::kGeneric>, cpu::prepare<cpu::kGeneric>};

}  // namespace heed
