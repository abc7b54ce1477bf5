// The row cuda/kv_append: new keys and values into a cache, rotary embedding on the way.
#include <algorithm>
#include <memory>

#include "base/format.h"
#include "cuda/device.h"
#include "cuda/kernels/params.h"
#include "cuda/launch.h"
#include "plan/impl.h"

namespace heed::cuda {
namespace {

constexpr int64_t kMost31 = INT32_MAX;
constexpr int64_t kRowsPerBlock = 4;  // rows (token, head) that a block turns at once

struct AppendStep {
  Launch launch;
  KvAppendParams params;
};

// Rows of a sequence, the usual one.
int64_t usual_rows(const KvAppendProblem& p) {
  const int64_t sequences = std::max<int64_t>(1, p.batch);
  const int64_t fresh = p.packed() ? p.total_new / sequences + 1 : p.seqlen_new;
  const int64_t queries = p.packed() ? p.total_q / sequences + 1 : p.seqlen_q;
  return std::max(p.append ? fresh * p.nheads_kv : 0, queries * p.nheads_q);
}

// Blocks of a sequence: a row for every warp, but no more blocks than keep the device busy.
int64_t slices_of(const KvAppendProblem& p, const DeviceFacts& facts) {
  const int64_t most = std::max<int64_t>(1, int64_t{16} * facts.multiprocessors / std::max<int64_t>(1, p.batch));
  return std::clamp<int64_t>((usual_rows(p) + kRowsPerBlock - 1) / kRowsPerBlock, 1, most);
}

KvAppendParams planned_params(const KvAppendProblem& p, int64_t slices) {
  KvAppendParams params = {};
  params.k_new_stride = strides3(p.strides(KvSlot::kKNew));
  params.v_new_stride = strides3(p.strides(KvSlot::kVNew));
  params.q_stride = strides3(p.strides(KvSlot::kQ));
  params.k_cache_stride = strides3(p.strides(KvSlot::kKCache));
  params.v_cache_stride = strides3(p.strides(KvSlot::kVCache));
  params.q_out_stride = strides3(p.strides(KvSlot::kQOut));
  params.cos_stride = p.strides(KvSlot::kCos)[2];
  params.sin_stride = p.strides(KvSlot::kSin)[2];
  params.page_table_stride = p.strides(KvSlot::kPageTable)[0];
  params.page_table_step = p.strides(KvSlot::kPageTable)[1];
  params.batch = p.batch;
  params.seqlen_q = p.seqlen_q;
  params.seqlen_new = p.append ? p.seqlen_new : 0;
  params.seqlen_k = p.seqlen_k;
  params.total_q = p.total_q;
  params.total_new = p.total_new;
  params.cache_rows = p.cache_batch;
  params.rotary_rows = p.rotary_rows;
  params.num_pages = p.num_pages;
  params.nheads_q = static_cast<i32>(p.nheads_q);
  params.nheads_kv = static_cast<i32>(p.nheads_kv);
  params.head_dim = static_cast<i32>(p.head_dim);
  params.head_dim_v = static_cast<i32>(p.head_dim_v);
  params.page_size = static_cast<i32>(p.page_size);
  params.rotary_dim = static_cast<i32>(p.rotary_dim);
  params.rotary_interleaved = p.rotary_style == RotaryStyle::kInterleaved;
  params.rotary_is_f32 = p.rotary_dtype == Dtype::kF32;
  params.q_per_position = p.q_per_position;
  params.slices = static_cast<i32>(slices);
  return params;
}

Status run(const Plan<KvAppendProblem>& plan, const Step<KvAppendProblem>& step, const KvAppendArgs& args) {
  const auto& mine = *static_cast<const AppendStep*>(step.params.get());
  const ContextScope scope(plan.problem.device_index);
  HEED_RETURN_IF_ERROR(scope.status());
  KvAppendParams p = mine.params;
  p.k_new = args.k_new;
  p.v_new = args.v_new;
  p.q = args.q;
  p.k_cache = args.k_cache;
  p.v_cache = args.v_cache;
  p.q_out = args.q_out;
  p.rotary_cos = args.rotary_cos;
  p.rotary_sin = args.rotary_sin;
  p.cu_seqlens_new = args.cu_seqlens_new;
  p.cu_seqlens_q = args.cu_seqlens_q;
  p.cache_seqlens = args.cache_seqlens;
  p.rotary_seqlens = args.rotary_seqlens;
  p.leftpad_k = args.leftpad_k;
  p.page_table = args.page_table;
  p.cache_batch_idx = args.cache_batch_idx;
  p.status = args.status;
  return launch(mine.launch, &p, static_cast<CUstream>(args.stream));
}

Verdict check(const KvAppendProblem& p, const Machine&) {
  if (p.device != Device::kCuda) return decline("runs on a GPU only: device=cuda");
  const Result<const DeviceFacts*> facts = device_facts(p.device_index);
  if (!facts.ok()) return decline(facts.status().message());
  if (facts.value()->major < 8) {
    return decline(heed::format("needs a GPU of compute capability 8.0 or later; device {} ({}) has {}.{}",
                                facts.value()->index, facts.value()->name, facts.value()->major, facts.value()->minor));
  }
  if (p.dtype == Dtype::kF64) return decline("takes f32, f16 and bf16, not f64; ref/kv_append takes f64");
  if (p.nheads_q > kMost31 || p.nheads_kv > kMost31 || p.page_size > kMost31 || p.num_pages > kMost31) {
    return decline(heed::format("takes heads, page_size and num_pages of at most {}", kMost31));
  }
  if (p.batch > kMost31 / slices_of(p, *facts.value())) {
    return decline(heed::format("takes at most {} sequences, not {}", kMost31, p.batch));
  }
  return accept("a warp a row");
}

double cost_us(const KvAppendProblem& p, const Machine&) {
  return 2.0 + bytes(p) / (20e3 * std::max(1, device_facts(p.device_index).value()->multiprocessors));
}

Status prepare(const KvAppendProblem& p, const Machine&, Plan<KvAppendProblem>& plan) {
  if (p.batch == 0 && !(p.packed() && p.total_q > 0)) return {};
  const DeviceFacts& facts = *device_facts(p.device_index).value();
  const ContextScope scope(facts.index);
  HEED_RETURN_IF_ERROR(scope.status());
  const KernelVariant variant = kv_append_variant(p.dtype);
  const int64_t slices = slices_of(p, facts);
  Result<Launch> made = prepare_launch(variant, std::max<int64_t>(1, p.batch) * slices, facts.handle);
  if (!made.ok()) return made.status();
  auto params = std::make_shared<AppendStep>();
  params->launch = std::move(made).value();
  params->params = planned_params(p, slices);
  Step<KvAppendProblem> step;
  step.kernel = heed::format("kv_append {}", dtype_name(p.dtype));
  step.run = run;
  step.grid = std::max<int64_t>(1, p.batch) * slices;
  step.params = std::move(params);
  plan.steps.push_back(std::move(step));
  return {};
}

}  // namespace
}  // namespace heed::cuda

namespace heed {

extern const Impl<KvAppendProblem> kCudaKvAppend;
const Impl<KvAppendProblem> kCudaKvAppend = {
    "cuda/kv_append", "cache append with rotary embedding", false, cuda::check, cuda::cost_us, cuda::prepare};

}  // namespace heed
