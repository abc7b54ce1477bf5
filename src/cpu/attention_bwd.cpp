// The backward pass on the CPU: the rows of the registry, the workspace, and how the work is divided. attention_bwd.h
// says what a task does and in which order contributions meet.
#include "cpu/attention_bwd.h"

#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <utility>

#include "base/format.h"
#include "base/threads.h"
#include "plan/impl.h"

namespace heed::cpu {

namespace {

constexpr int64_t round_to(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

using BackwardPlan = Plan<AttentionProblem>;
using BackwardStep = Step<AttentionProblem>;

// What a plan knows beside the problem.
struct BackwardParams {
  const BackwardKernels* kernels = nullptr;
  BackwardShape shape;
  BackwardScratch layout;
  BackwardWorkspace workspace;
};

bool dbias_is_summed(const AttentionProblem& p) { return p.dbias && p.bias_dims != (kDimB | kDimH | kDimI | kDimJ); }

// Lengths come from data: what no task owns has to be written as 0 first.
bool lengths_vary(const AttentionProblem& p) {
  return p.packed_q() || p.packed_k() || p.used_q || p.used_k || p.leftpad;
}

// Every pair of a query and a key is in some tile.
bool tiles_cover_all(const AttentionProblem& p) {
  return !lengths_vary(p) && p.window_left < 0 && p.window_right < 0 && p.chunk == 0;
}

int64_t num_query_rows(const AttentionProblem& p) {
  return p.nheads_q * (p.packed_q() ? p.total_q : p.batch * p.seqlen_q);
}

int64_t num_turns(const AttentionProblem& p, const BackwardShape& shape) {
  const int64_t rows = shape.query_block;
  if (p.packed_q()) return p.nheads_q * (p.total_q / rows + p.batch + 1);
  return p.nheads_q * p.batch * ((p.seqlen_q + rows - 1) / rows);
}

BackwardWorkspace lay_out_workspace(const AttentionProblem& p, const BackwardShape& shape,
                                    const BackwardScratch& scratch) {
  BackwardWorkspace at;
  const auto take = [&](int64_t count, size_t bytes_each) {
    const size_t begin = at.bytes;
    at.bytes += round_to(count * static_cast<int64_t>(bytes_each), 64);
    return begin;
  };
  at.sequences = take(p.batch, sizeof(Sequence));
  at.first_task = take(p.batch + 1, sizeof(int64_t));
  at.delta = take(num_query_rows(p), sizeof(float));
  at.dq_sum = take(p.dq && p.dtype != Dtype::kF32 ? num_query_rows(p) * shape.d_pad : 0, sizeof(float));
  at.turns = take(p.dq ? num_turns(p, shape) : 0, sizeof(int32_t));
  at.head_turns = take(p.dalibi ? p.batch * p.nheads_kv : 0, sizeof(int32_t));
  at.dalibi = take(p.dalibi ? p.batch * p.nheads_q : 0, sizeof(double));
  at.dsinks = take(p.dsinks ? p.batch * p.nheads_q : 0, sizeof(double));
  at.scratch = take(scratch.floats * std::max(p.threads, 1), sizeof(float));
  return at;
}

BackwardRun make_run(const BackwardPlan& plan, const BackwardStep& step, const AttentionArgs& args) {
  const auto& params = *static_cast<const BackwardParams*>(step.params.get());
  const AttentionProblem& p = plan.problem;
  BackwardRun run;
  run.problem = &p;
  run.args = &args;
  run.kernels = params.kernels;
  run.shape = params.shape;
  run.layout = params.layout;
  run.terms = make_score_terms(p, args);
  const auto section = [&](size_t offset) { return static_cast<void*>(static_cast<char*>(args.workspace) + offset); };
  const BackwardWorkspace& at = params.workspace;
  run.sequences = static_cast<Sequence*>(section(at.sequences));
  run.first_task = static_cast<int64_t*>(section(at.first_task));
  run.delta = static_cast<float*>(section(at.delta));
  if (p.dq && p.dtype != Dtype::kF32) run.dq_sum = static_cast<float*>(section(at.dq_sum));
  run.turns = static_cast<int32_t*>(section(at.turns));
  run.head_turns = static_cast<int32_t*>(section(at.head_turns));
  run.dalibi = static_cast<double*>(section(at.dalibi));
  run.dsinks = static_cast<double*>(section(at.dsinks));
  run.scratch = static_cast<float*>(section(at.scratch));
  return run;
}

// body(task, worker) for every task, claimed in order.
template <class Body>
void claim_tasks(const BackwardRun& run, int64_t num_tasks, int64_t max_workers, const Body& body) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>({num_tasks, max_workers, run.problem->threads});
  run_tasks(*run.args->executor, static_cast<int32_t>(workers), [&](int32_t worker) {
    for (int64_t task = next.fetch_add(1); task < num_tasks; task = next.fetch_add(1)) body(task, worker);
  });
}

// ---- step 1: where sequences lie, zeroes, delta ---------------------------------------------------------------------

void locate_sequences(const BackwardRun& run) {
  const AttentionProblem& p = *run.problem;
  PackedRows before;
  run.first_task[0] = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    run.sequences[b] = locate_sequence(p, *run.args, b, &before);
    if (run.args->status != nullptr) run.args->status[b] = run.sequences[b].status;
    run.first_task[b + 1] = run.first_task[b] + run.num_key_blocks(run.sequences[b]) * p.nheads_kv;
  }
}

// Planes (b, h) of a tensor in rows of contiguous numbers, written as 0.
struct ZeroFill {
  Slot slot;
  char* data = nullptr;
  int64_t planes = 0;
};

void zero_plane(const AttentionProblem& p, const ZeroFill& fill, int64_t plane) {
  const std::array<int64_t, 4> shape = slot_shape(p, fill.slot);
  const auto& stride = p.strides(fill.slot);
  const int64_t bytes = dtype_bytes(slot_dtype(p, fill.slot));
  char* at = fill.data + (plane / shape[1] * stride[0] + plane % shape[1] * stride[1]) * bytes;
  for (int64_t row = 0; row < shape[2]; ++row) {
    if (stride[3] == 1 || shape[3] == 1) {
      std::memset(at + row * stride[2] * bytes, 0, static_cast<size_t>(shape[3] * bytes));
    } else {
      for (int64_t column = 0; column < shape[3]; ++column)
        std::memset(at + (row * stride[2] + column * stride[3]) * bytes, 0, static_cast<size_t>(bytes));
    }
  }
}

Status run_prologue(const BackwardPlan& plan, const BackwardStep& step, const AttentionArgs& args) {
  const BackwardRun run = make_run(plan, step, args);
  const AttentionProblem& p = plan.problem;
  locate_sequences(run);
  std::array<ZeroFill, 4> fills;
  int num_fills = 0;
  const auto zero = [&](Slot slot, void* data) {
    const std::array<int64_t, 4> shape = slot_shape(p, slot);
    fills[num_fills++] = {slot, static_cast<char*>(data), shape[0] * shape[1]};
  };
  if (p.dq && (run.dq_sum == nullptr || lengths_vary(p))) zero(Slot::kDq, args.dq);
  if (p.dk && lengths_vary(p)) zero(Slot::kDk, args.dk);
  if (p.dv && lengths_vary(p)) zero(Slot::kDv, args.dv);
  if (p.dbias && !dbias_is_summed(p) && !tiles_cover_all(p)) zero(Slot::kDbias, args.dbias);
  if (p.dq) std::memset(run.turns, 0, sizeof(int32_t) * static_cast<size_t>(num_turns(p, run.shape)));
  if (p.dalibi) {
    std::memset(run.head_turns, 0, sizeof(int32_t) * static_cast<size_t>(p.batch * p.nheads_kv));
    std::memset(run.dalibi, 0, sizeof(double) * static_cast<size_t>(p.batch * p.nheads_q));
  }
  const int64_t heads = p.batch * p.nheads_q;
  int64_t num_tasks = heads;
  for (int n = 0; n < num_fills; ++n) num_tasks += fills[n].planes;
  claim_tasks(run, num_tasks, num_tasks, [&](int64_t task, int32_t) {
    if (task < heads) {
      const Sequence& sequence = run.sequences[task / p.nheads_q];
      const int64_t head = task % p.nheads_q;
      run.kernels->delta_rows(run, sequence, head);
      if (run.dq_sum != nullptr) {
        std::memset(run.dq_sum + run.row_index(sequence, head, 0) * run.shape.d_pad, 0,
                    sizeof(float) * static_cast<size_t>(sequence.q_len * run.shape.d_pad));
      }
      return;
    }
    task -= heads;
    int n = 0;
    for (; task >= fills[n].planes; ++n) task -= fills[n].planes;
    zero_plane(p, fills[n], task);
  });
  return {};
}

// ---- step 2: blocks of keys -----------------------------------------------------------------------------------------

// Tasks of a sequence, in groups of as many kv heads as there are threads: within a group block by block, so that
// threads work on different heads and seldom wait for each other's dQ. Any such order gives the same bits.
KeyBlockTask key_block_task(const BackwardRun& run, int64_t task) {
  const AttentionProblem& p = *run.problem;
  const int64_t b = std::upper_bound(run.first_task, run.first_task + p.batch + 1, task) - run.first_task - 1;
  const Sequence& sequence = run.sequences[b];
  const int64_t blocks = run.num_key_blocks(sequence);
  task -= run.first_task[b];
  const int64_t group = std::min<int64_t>(p.threads, p.nheads_kv), first_head = task / (group * blocks) * group;
  task -= first_head * blocks;
  const int64_t heads = std::min(group, p.nheads_kv - first_head);
  return {&sequence, first_head + task % heads, task / heads};
}

// A broken cu_seqlens_k can give two sequences the same keys. Then one thread goes through them in order.
bool keys_are_shared(const BackwardRun& run) {
  const AttentionProblem& p = *run.problem;
  if (!p.packed_k()) return false;
  int64_t end = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence& s = run.sequences[b];
    if (s.k_len == 0) continue;
    if (s.k_begin < end) return true;
    end = s.k_begin + s.k_len;
  }
  return false;
}

Status run_key_blocks(const BackwardPlan& plan, const BackwardStep& step, const AttentionArgs& args) {
  const BackwardRun run = make_run(plan, step, args);
  const int64_t num_tasks = run.first_task[plan.problem.batch];
  claim_tasks(run, num_tasks, keys_are_shared(run) ? 1 : num_tasks, [&](int64_t task, int32_t worker) {
    run.kernels->key_block(run, key_block_task(run, task), run.scratch + worker * run.layout.floats);
  });
  return {};
}

// ---- step 3: dbias with broadcast dimensions ------------------------------------------------------------------------

int64_t blocks_for(int64_t length, int64_t block) { return std::max<int64_t>((length + block - 1) / block, 1); }

// Extents of the grid of parts: a broadcast dimension is one part, summed by one task.
std::array<int64_t, 4> bias_grid(const AttentionProblem& p, const BackwardShape& shape) {
  return {(p.bias_dims & kDimB) != 0 ? p.batch : 1, (p.bias_dims & kDimH) != 0 ? p.nheads_q : 1,
          (p.bias_dims & kDimI) != 0 ? blocks_for(p.seqlen_q, shape.query_block) : 1,
          (p.bias_dims & kDimJ) != 0 ? blocks_for(p.seqlen_k, shape.key_block) : 1};
}

BiasPart bias_part(const AttentionProblem& p, const std::array<int64_t, 4>& grid, int64_t task) {
  std::array<int64_t, 4> at;
  for (int d = 3; d >= 0; --d) {
    at[d] = task % grid[d];
    task /= grid[d];
  }
  const auto range = [&](int d, uint8_t bit, int64_t extent) {
    return (p.bias_dims & bit) != 0 ? std::pair{at[d], at[d] + 1} : std::pair{int64_t{0}, extent};
  };
  BiasPart part;
  std::tie(part.first_batch, part.end_batch) = range(0, kDimB, p.batch);
  std::tie(part.first_head, part.end_head) = range(1, kDimH, p.nheads_q);
  std::tie(part.first_query_block, part.end_query_block) = range(2, kDimI, kFar);
  std::tie(part.first_key_block, part.end_key_block) = range(3, kDimJ, kFar);
  return part;
}

Status run_bias_parts(const BackwardPlan& plan, const BackwardStep& step, const AttentionArgs& args) {
  const BackwardRun run = make_run(plan, step, args);
  const AttentionProblem& p = plan.problem;
  const std::array<int64_t, 4> grid = bias_grid(p, run.shape), shape = slot_shape(p, Slot::kDbias);
  if (shape[0] == 0 || shape[2] == 0 || shape[3] == 0) return {};
  const int64_t num_tasks = grid[0] * grid[1] * grid[2] * grid[3];
  claim_tasks(run, num_tasks, num_tasks, [&](int64_t task, int32_t worker) {
    run.kernels->bias_part(run, bias_part(p, grid, task), run.scratch + worker * run.layout.floats);
  });
  return {};
}

// ---- step 4: sums over sequences, dQ in 16 bits ---------------------------------------------------------------------

Status run_epilogue(const BackwardPlan& plan, const BackwardStep& step, const AttentionArgs& args) {
  const BackwardRun run = make_run(plan, step, args);
  const AttentionProblem& p = plan.problem;
  if (run.dq_sum != nullptr) {
    claim_tasks(run, p.batch * p.nheads_q, p.batch * p.nheads_q, [&](int64_t task, int32_t) {
      run.kernels->narrow_dq(run, run.sequences[task / p.nheads_q], task % p.nheads_q);
    });
  }
  for (int64_t h = 0; h < p.nheads_q; ++h) {
    double dsink = 0.0, dalibi = 0.0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t at = b * p.nheads_q + h;
      if (p.dsinks) dsink += run.dsinks[at];
      if (p.dalibi && p.alibi_per_batch)
        static_cast<float*>(args.dalibi_slopes)[at] = static_cast<float>(run.dalibi[at]);
      if (p.dalibi) dalibi += run.dalibi[at];
    }
    if (p.dsinks) static_cast<float*>(args.dsinks)[h] = static_cast<float>(dsink);
    if (p.dalibi && !p.alibi_per_batch) static_cast<float*>(args.dalibi_slopes)[h] = static_cast<float>(dalibi);
  }
  return {};
}

// ---- rows of the registry -------------------------------------------------------------------------------------------

struct InstructionSet {
  const char* name;  // as in the row's name
  const char* title;
  const char* nearest;  // where it is missing
  const BackwardKernels* (*kernels)();
  bool (*present)(const Machine& machine);
  double flops_per_us;  // of one thread, for the cost
};

constexpr InstructionSet kAvx512 = {"avx512",
                                    "AVX-512",
                                    "cpu/attention_bwd_avx2",
                                    backward_kernels_avx512,
                                    [](const Machine& m) { return m.cpu.avx512; },
                                    80e3};
constexpr InstructionSet kAvx2 = {
    "avx2", "AVX2", "cpu/attention_bwd_generic", backward_kernels_avx2, [](const Machine& m) { return m.cpu.avx2; },
    50e3};
constexpr InstructionSet kNeon = {
    "neon", "NEON", "cpu/attention_bwd_generic", backward_kernels_neon, [](const Machine& m) { return m.cpu.neon; },
    30e3};
constexpr InstructionSet kGeneric = {
    "generic", "plain C++", "ref/attention", backward_kernels_generic, [](const Machine&) { return true; }, 3e3};

template <const InstructionSet& kSet>
Verdict check(const AttentionProblem& p, const Machine& machine) {
  if (p.device != Device::kCpu) return decline("runs on the CPU only");
  if (p.pass != Pass::kBackward) {
    return decline(heed::format("computes gradients; pass = forward is for cpu/attention_fwd_{}", kSet.name));
  }
  if (kSet.kernels() == nullptr) {
    return decline(heed::format("this build has no {} kernels; {} is the nearest", kSet.title, kSet.nearest));
  }
  if (!kSet.present(machine))
    return decline(heed::format("this CPU has no {}; {} is the nearest", kSet.title, kSet.nearest));
  if (p.dtype == Dtype::kF64 || p.out_dtype == Dtype::kF64) {
    return decline("computes in f32: dtype f64 is for ref/attention");
  }
  if (p.paged()) return decline("gradients of a paged cache are not computed: pass k and v without page_table");
  if (p.cache_batch > 0)
    return decline("gradients of cache rows are not computed: pass k and v without cache_batch_idx");
  if (dbias_is_summed(p)) {
    return accept("dbias has broadcast dimensions: summed in a pass of its own, which computes the scores once more");
  }
  return accept();
}

template <const InstructionSet& kSet>
double cost_us(const AttentionProblem& p, const Machine& machine) {
  const double threads =
      std::max(1, std::min(p.threads > 0 ? p.threads : machine.cpu.num_cores, machine.cpu.num_cores));
  return 5.0 + flops(p) * (dbias_is_summed(p) ? 1.4 : 1.0) / (kSet.flops_per_us * threads);
}

template <const InstructionSet& kSet>
Status prepare(const AttentionProblem& p, const Machine&, BackwardPlan& plan) {
  const auto params = std::make_shared<BackwardParams>();
  params->kernels = kSet.kernels();
  params->shape = backward_shape(p);
  params->layout = lay_out_scratch(params->shape, dbias_is_summed(p));
  params->workspace = lay_out_workspace(p, params->shape, params->layout);
  plan.workspace_bytes = params->workspace.bytes;
  const BackwardShape& shape = params->shape;
  const auto add = [&](std::string kernel, auto run, int64_t grid, int64_t scratch_floats) {
    BackwardStep step;
    step.kernel = std::move(kernel);
    step.run = run;
    step.grid = grid;
    step.scratch_bytes = sizeof(float) * static_cast<size_t>(scratch_floats);
    step.workspace_bytes = params->workspace.bytes;
    step.params = params;
    plan.steps.push_back(std::move(step));
  };
  const int64_t rows_k = p.packed_k() ? p.total_k : p.seqlen_k;
  const int64_t key_blocks =
      p.nheads_kv * (p.packed_k() ? rows_k / shape.key_block + p.batch
                                  : p.batch * ((rows_k + shape.key_block - 1) / shape.key_block));
  add("attention_bwd delta and zeroes", run_prologue, p.batch * p.nheads_q, 0);
  add(heed::format("attention_bwd {} q{} k{}", kSet.name, shape.query_block, shape.key_block), run_key_blocks,
      key_blocks, params->layout.floats);
  if (dbias_is_summed(p)) {
    const std::array<int64_t, 4> grid = bias_grid(p, shape);
    add(heed::format("attention_bwd dbias {}", kSet.name), run_bias_parts, grid[0] * grid[1] * grid[2] * grid[3],
        params->layout.floats);
  }
  if ((p.dq && p.dtype != Dtype::kF32) || p.dsinks || p.dalibi) {
    add("attention_bwd sums", run_epilogue, p.batch * p.nheads_q, 0);
  }
  return {};
}

template <const InstructionSet& kSet>
constexpr Impl<AttentionProblem> row(std::string_view name, std::string_view summary) {
  return {name, summary, false, check<kSet>, cost_us<kSet>, prepare<kSet>};
}

}  // namespace

BackwardShape backward_shape(const AttentionProblem& p) {
  BackwardShape shape;
  shape.head_dim = p.head_dim;
  shape.head_dim_v = p.head_dim_v;
  shape.d_pad = round_to(p.head_dim, kVectorPad);
  shape.dv_pad = round_to(p.head_dim_v, kVectorPad);
  // A task keeps some 5 x key_block + 3 x query_block rows of head_dim floats, which are to stay in a second-level
  // cache of 1 MiB; within that, speed hardly depends on the blocks.
  const int64_t widest = std::max(shape.d_pad, shape.dv_pad);
  shape.key_block = widest <= 256 ? 128 : 64;
  shape.query_block = widest <= 128 ? 96 : 48;
  shape.tile_stride = shape.key_block + kVectorPad;
  return shape;
}

BackwardScratch lay_out_scratch(const BackwardShape& shape, bool bias_sums) {
  BackwardScratch at;
  const auto take = [&](int64_t floats) {
    const int64_t begin = at.floats;
    at.floats += round_to(floats, kVectorPad);
    return begin;
  };
  at.k_rows = take(shape.key_block * shape.d_pad);
  at.k_lanes = take(shape.key_block * shape.head_dim);
  at.v_lanes = take(shape.key_block * shape.head_dim_v);
  at.dk = take(shape.key_block * shape.d_pad);
  at.dv = take(shape.key_block * shape.dv_pad);
  at.q = take(shape.query_block * shape.d_pad);
  at.dout = take(shape.query_block * shape.dv_pad);
  at.dq = take(shape.query_block * shape.d_pad);
  at.s = take(shape.query_block * shape.tile_stride);
  at.dp = take(shape.query_block * shape.tile_stride);
  at.row = take(4 * shape.key_block + kKeepBefore + kKeepAfter);
  at.shown = take(shape.query_block * shape.key_block / 4);
  at.bias_sums = take(bias_sums ? shape.query_block * shape.tile_stride : 0);
  return at;
}

void await_turn(int32_t* turn, int32_t mine) {
  const std::atomic_ref<int32_t> counter(*turn);
  for (int32_t spins = 0; counter.load(std::memory_order_acquire) != mine; ++spins) {
    if (spins < 2000) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    } else {
      std::this_thread::yield();
    }
  }
}

void pass_turn(int32_t* turn, int32_t next) { std::atomic_ref<int32_t>(*turn).store(next, std::memory_order_release); }

}  // namespace heed::cpu

namespace heed {

extern const Impl<AttentionProblem> kCpuAttentionBwdAvx512, kCpuAttentionBwdAvx2, kCpuAttentionBwdNeon,
    kCpuAttentionBwdGeneric;
const Impl<AttentionProblem> kCpuAttentionBwdAvx512 = cpu::row<cpu::kAvx512>(
    "cpu/attention_bwd_avx512", "gradients with AVX-512: f32 products, f32 sums in a fixed order");
const Impl<AttentionProblem> kCpuAttentionBwdAvx2 =
    cpu::row<cpu::kAvx2>("cpu/attention_bwd_avx2", "gradients with AVX2: f32 products, f32 sums in a fixed order");
const Impl<AttentionProblem> kCpuAttentionBwdNeon =
    cpu::row<cpu::kNeon>("cpu/attention_bwd_neon", "gradients with NEON: f32 products, f32 sums in a fixed order");
const Impl<AttentionProblem> kCpuAttentionBwdGeneric = cpu::row<cpu::kGeneric>(
    "cpu/attention_bwd_generic", "gradients in plain C++ for any CPU: f32 products, f32 sums in a fixed order");

}  // namespace heed
