#include "cuda/attention_fwd.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>

#include "base/format.h"
#include "base/philox.h"
#include "cuda/kernels/work_sm90.h"
#include "cuda/launch.h"
#include "cuda/tensor_maps.h"

namespace heed::cuda {
namespace {

constexpr int64_t kMost31 = INT32_MAX;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool multiply_fits(int64_t a, int64_t b, int64_t limit) {
  int64_t product = 0;
  return !__builtin_mul_overflow(a, b, &product) && product <= limit;
}

Strides4 strides4(const std::array<int64_t, 4>& s) { return {s[0], s[1], s[2], s[3]}; }

// Data that the host never sees decides which rows and pages are read: looked at once, before attention, where that does not look
// itself.
bool needs_check(const AttentionProblem& p, const Configurations& configurations) {
  const auto finds = [](const Configuration& c) { return c.finds_bad_pages; };
  return p.packed_q() || (p.paged() && !std::all_of(configurations.begin(), configurations.end(), finds));
}
// Rows of each head that partials hold.
int64_t partial_rows(const AttentionProblem& p, const Configuration& c) {
  return c.partial_queries > 0 ? p.batch * c.partial_queries : total_rows(p);
}

// A warp merges a row where it has few splits, else a block.
int combine_rows(const Configuration& c) { return c.max_splits <= kCombineWarps ? kCombineWarps : 1; }
int64_t combine_blocks(const AttentionProblem& p, const Configuration& c) {
  return ceil_div(partial_rows(p, c) * p.nheads_q, combine_rows(c));
}

// The kernel of the list whose partials are merged; the first where none is.
const Configuration& merged(const Configurations& configurations) {
  for (const Configuration& c : configurations)
    if (c.split) return c;
  return configurations.front();
}

// A long page table is looked at by several blocks.
int64_t check_slices(const AttentionProblem& p, const DeviceFacts& facts) {
  constexpr int64_t kPagesPerBlock = 1024;
  if (!p.paged() || p.batch == 0) return 1;
  const int64_t most = std::max<int64_t>(1, int64_t{2} * facts.multiprocessors / p.batch);
  return std::clamp<int64_t>(p.seqlen_k / p.page_size / kPagesPerBlock, 1, most);
}

struct WorkspaceLayout {
  int64_t counter_offset = 0, mask_offset = 0, partial_out_offset = 0, partial_lse_offset = 0, bytes = 0;
  bool fits = true;
};

// At most one kernel of the list splits, and one counts tiles or reads bits of a mask.
WorkspaceLayout workspace_of(const AttentionProblem& p, const Configurations& configurations) {
  constexpr int64_t kAlign = 256;
  WorkspaceLayout layout;
  const auto add = [&layout](int64_t count, int64_t bytes_each) {
    const int64_t offset = layout.bytes;
    int64_t bytes = 0;
    layout.fits = layout.fits && !__builtin_mul_overflow(count, bytes_each, &bytes) && bytes < int64_t{1} << 60;
    layout.bytes += ceil_div(layout.fits ? bytes : 0, kAlign) * kAlign;
    return offset;
  };
  if (needs_check(p, configurations)) add(p.batch + 1, 4);
  for (const Configuration& c : configurations) {
    if (c.counts_tiles) layout.counter_offset = add(1, 8);
    if (MaskBits bits; c.packs_mask && mask_bits(p, c.tile_k, bits)) layout.mask_offset = add(bits.total, 4);
  }
  if (const Configuration& c = merged(configurations); c.split) {
    int64_t partials = 2 * c.grid * c.tile_q;  // shares
    if (!c.shares) {
      layout.fits = !__builtin_mul_overflow(partial_rows(p, c), p.nheads_q, &partials) &&
                    !__builtin_mul_overflow(partials, int64_t{c.max_splits}, &partials);
    }
    layout.partial_out_offset = add(partials, p.head_dim_v * 4);
    layout.partial_lse_offset = add(partials, 4);
    if (c.shares) layout.counter_offset = add(c.grid * c.tile_q, 8);
  }
  return layout;
}

// Everything but pointers and the numbers of one run.
AttentionFwdParams planned_params(const AttentionProblem& p, const DeviceFacts& facts, const Configuration& c) {
  AttentionFwdParams params = {};
  params.q_stride = strides3(p.strides(Slot::kQ));
  params.k_stride = strides3(p.strides(Slot::kK));
  params.v_stride = strides3(p.strides(Slot::kV));
  params.out_stride = strides3(p.strides(Slot::kOut));
  params.lse_stride = strides3(p.strides(Slot::kLse));
  params.bias_stride = strides4(p.strides(Slot::kBias));
  params.mask_stride = strides4(p.strides(Slot::kMask));
  params.alibi_stride_b = p.strides(Slot::kAlibi)[0];
  params.batch = p.batch;
  params.seqlen_q = p.seqlen_q;
  params.seqlen_k = p.seqlen_k;
  params.total_q = p.total_q;
  params.total_k = p.total_k;
  params.num_tiles_q = c.num_tiles_q;
  params.nheads_q = static_cast<i32>(p.nheads_q);
  params.nheads_kv = static_cast<i32>(p.nheads_kv);
  params.gqa_ratio = static_cast<i32>(p.gqa_ratio());
  params.rows_per_query = c.rows_per_query;
  params.head_dim = static_cast<i32>(p.head_dim);
  params.head_dim_v = static_cast<i32>(p.head_dim_v);
  params.page_size = static_cast<i32>(p.page_size);
  params.num_pages = static_cast<i32>(p.num_pages);
  params.page_table_stride = p.strides(Slot::kPageTable)[0];
  params.page_table_step = p.strides(Slot::kPageTable)[1];
  params.cache_rows = p.cache_batch;
  params.window_left = p.window_left;
  params.window_right = p.window_right;
  params.chunk = p.chunk;
  params.q_offset = p.q_offset;
  params.offset_kind = static_cast<i32>(p.offset_kind);
  params.out_is_f32 = p.out_dtype == Dtype::kF32;
  params.bias_is_f32 = p.bias_dtype == Dtype::kF32;
  params.longest_first = p.window_right >= 0 && p.window_left < 0;
  params.aligned = row_align(p) >= 16;
  params.max_splits = c.max_splits;
  params.split_tiles = c.split_tiles;
  params.check_slices = static_cast<i32>(check_slices(p, facts));
  params.min_rows = c.min_rows;
  params.max_rows = c.max_rows;
  params.partial_queries = c.partial_queries;
  // Packed sequences have no length that the host knows; a bias or mask states the longest that it covers.
  const int letters = (p.bias() ? p.bias_dims : 0) | (p.mask ? p.mask_dims : 0);
  if (p.packed_q() && (letters & kDimI) != 0) params.q_limit = p.seqlen_q;
  if (p.packed_k() && (letters & kDimJ) != 0) params.k_limit = p.seqlen_k;
  // So many heads at a time that their K and V stay in half the L2 cache, heads of a group being one there.
  const int64_t kv_bytes = std::max<int64_t>(1, usual_keys(p) * (p.head_dim + p.head_dim_v) * dtype_bytes(p.dtype));
  const int64_t sharing = c.rows_per_query > 1 ? 1 : p.gqa_ratio();
  int64_t sections = std::max<int64_t>(1, facts.l2_bytes / 2 / kv_bytes) * sharing;
  const int64_t heads = c.rows_per_query > 1 ? p.nheads_kv : p.nheads_q;
  if (c.section_heads > 0) sections = c.section_heads;
  params.heads_per_section = static_cast<i32>(std::min(sections, std::max<int64_t>(1, heads * p.batch)));
  return params;
}

// One launch of a plan, and what of the workspace it uses.
struct ForwardStep {
  Launch launch;
  std::unique_ptr<const AttentionFwdSm90Params> mapped;  // with maps that runs write their addresses into
  AttentionFwdParams params;
  WorkspaceLayout workspace;
  Mapping mapping;
  bool counts_tiles = false;
  bool checks = false;  // the workspace starts with the sequences' status
  bool shares = false;
  int32_t heads_together = 1;
  bool split = false;
};

float log2e_times(float x) { return static_cast<float>(static_cast<double>(x) * 1.4426950408889634); }

// The pointers and numbers of this run, into what the plan knows.
void bind(const ForwardStep& step, const AttentionArgs& args, AttentionFwdParams& p) {
  p.q = args.q;
  p.k = args.k;
  p.v = args.v;
  p.out = args.out;
  p.lse = static_cast<float*>(args.lse);
  p.bias = args.bias;
  p.mask = args.mask;
  p.alibi_slopes = args.alibi_slopes;
  p.sinks = args.sinks;
  p.cu_seqlens_q = args.cu_seqlens_q;
  p.cu_seqlens_k = args.cu_seqlens_k;
  p.seqused_q = args.seqused_q;
  p.seqused_k = args.seqused_k;
  p.leftpad_k = args.leftpad_k;
  p.page_table = args.page_table;
  p.cache_batch_idx = args.cache_batch_idx;
  p.status = args.status;
  p.softmax_scale_log2 = log2e_times(args.softmax_scale);
  p.softcap = args.softcap;
  p.dropout_on = args.dropout_p > 0.0f;
  p.dropout_scale = args.dropout_p < 1.0f ? 1.0f / (1.0f - args.dropout_p) : 0.0f;
  p.dropout_threshold = dropout_threshold(args.dropout_p);
  p.dropout_seed = args.dropout_seed;
  p.dropout_offset = args.dropout_offset;
  p.dropout_seed_ptr = reinterpret_cast<const u64*>(args.dropout_seed_ptr);
  p.dropout_offset_ptr = reinterpret_cast<const u64*>(args.dropout_offset_ptr);
  std::copy(args.index_base.begin(), args.index_base.end(), p.index_base);
  char* const workspace = static_cast<char*>(args.workspace);
  if (step.checks) p.sequence_status = reinterpret_cast<i32*>(workspace);
  if (step.split) {
    p.partial_out = reinterpret_cast<float*>(workspace + step.workspace.partial_out_offset);
    p.partial_lse = reinterpret_cast<float*>(workspace + step.workspace.partial_lse_offset);
  }
}

// Parameters whose maps a run need not encode; null where the driver's maps do not allow that.
std::unique_ptr<const AttentionFwdSm90Params> map_once(const AttentionProblem& problem, const ForwardStep& step) {
  auto made = std::make_unique<AttentionFwdSm90Params>();
  made->common = step.params;
  const auto encode = [&](const MapAddresses& at, TensorMaps& maps) -> Status {
    made->common.q = at[0], made->common.k = at[1], made->common.v = at[2], made->common.out = const_cast<void*>(at[3]);
    HEED_RETURN_IF_ERROR(map_tensors(problem, step.mapping, *made));
    maps = {made->q_map, made->k_map, made->v_map, made->out_map};
    return {};
  };
  return address_is_first_word(encode) ? std::move(made) : nullptr;
}

Status run_step(const Plan<AttentionProblem>& plan, const Step<AttentionProblem>& step, const AttentionArgs& args) {
  const auto& mine = *static_cast<const ForwardStep*>(step.params.get());
  const ContextScope scope(plan.problem.device_index);
  HEED_RETURN_IF_ERROR(scope.status());
  AttentionFwdParams params = mine.params;
  bind(mine, args, params);
  return launch(mine.launch, &params, static_cast<CUstream>(args.stream));
}

Status run_mapped_step(const Plan<AttentionProblem>& plan, const Step<AttentionProblem>& step,
                       const AttentionArgs& args) {
  const auto& mine = *static_cast<const ForwardStep*>(step.params.get());
  const ContextScope scope(plan.problem.device_index);
  HEED_RETURN_IF_ERROR(scope.status());
  AttentionFwdSm90Params params = {};
  if (mine.mapped != nullptr) {
    params = *mine.mapped;
    set_address(params.q_map, args.q);
    set_address(params.k_map, args.k);
    set_address(params.v_map, args.v);
    set_address(params.out_map, args.out);
  } else {
    params.common = mine.params;
  }
  bind(mine, args, params.common);
  // A hidden score times the scale must be -inf: 0 becomes the least number above it.
  float& scale = params.common.softmax_scale_log2;
  if (scale == 0.0f) scale = std::numeric_limits<float>::denorm_min();
  if (mine.mapped == nullptr) HEED_RETURN_IF_ERROR(map_tensors(plan.problem, mine.mapping, params));
  if (params.common.mask != nullptr)
    params.mask_bits = reinterpret_cast<const u32*>(static_cast<char*>(args.workspace) + mine.workspace.mask_offset);
  if (params.common.softcap > 0.0f) set_softcap(params);
  if (mine.counts_tiles)
    params.next_tile = reinterpret_cast<u64*>(static_cast<char*>(args.workspace) + mine.workspace.counter_offset);
  if (mine.shares) {
    params.arrived = reinterpret_cast<u64*>(static_cast<char*>(args.workspace) + mine.workspace.counter_offset);
    params.heads_together = mine.heads_together;
  }
  return launch(mine.launch, &params, static_cast<CUstream>(args.stream));
}

int64_t pack_blocks(const AttentionProblem& p, int32_t tile_k) {
  MaskBits bits;
  if (!mask_bits(p, tile_k, bits)) return 0;
  return ceil_div(bits.total, pack_mask_variant().threads);
}

Status run_pack_mask(const Plan<AttentionProblem>& plan, const Step<AttentionProblem>& step,
                     const AttentionArgs& args) {
  const auto& mine = *static_cast<const ForwardStep*>(step.params.get());
  const ContextScope scope(plan.problem.device_index);
  HEED_RETURN_IF_ERROR(scope.status());
  MaskBits bits;
  mask_bits(plan.problem, mine.mapping.tile_k, bits);
  PackMaskParams params = {};
  params.mask = args.mask;
  params.bits = reinterpret_cast<u32*>(static_cast<char*>(args.workspace) + mine.workspace.mask_offset);
  params.stride = mine.params.mask_stride;
  params.heads = bits.heads, params.rows = bits.rows, params.keys = bits.keys, params.words = bits.words;
  params.total = bits.total;
  return launch(mine.launch, &params, static_cast<CUstream>(args.stream));
}

Status clear(void* words, int64_t count, const char* what, const AttentionArgs& args) {
  const size_t bytes = static_cast<size_t>(count) * 4;
  const CUresult result = driver().value()->memset_d8_async(reinterpret_cast<CUdeviceptr>(words), 0, bytes,
                                                            static_cast<CUstream>(args.stream));
  if (result == kCudaSuccess) return {};
  return driver_error(result, heed::format("cuMemsetD8Async({}, 0, {} bytes)", what, bytes));
}

// Blocks that share a sequence add their findings to words that are 0.
Status run_shared_check(const Plan<AttentionProblem>& plan, const Step<AttentionProblem>& step,
                        const AttentionArgs& args) {
  const ContextScope scope(plan.problem.device_index);
  HEED_RETURN_IF_ERROR(scope.status());
  if (static_cast<const ForwardStep*>(step.params.get())->checks)
    HEED_RETURN_IF_ERROR(clear(args.workspace, plan.problem.batch + 1, "workspace", args));
  if (args.status != nullptr) HEED_RETURN_IF_ERROR(clear(args.status, plan.problem.batch, "status", args));
  return run_step(plan, step, args);
}

template <Status (*kRun)(const Plan<AttentionProblem>&, const Step<AttentionProblem>&, const AttentionArgs&)>
Status run_if_asked(const Plan<AttentionProblem>& plan, const Step<AttentionProblem>& step, const AttentionArgs& args) {
  return args.status == nullptr ? Status() : kRun(plan, step, args);
}

// Nothing can be wrong with a problem whose lengths the host states.
Status run_clear_status(const Plan<AttentionProblem>& plan, const Step<AttentionProblem>&, const AttentionArgs& args) {
  if (args.status == nullptr) return {};
  const ContextScope scope(plan.problem.device_index);
  HEED_RETURN_IF_ERROR(scope.status());
  return clear(args.status, plan.problem.batch, "status", args);
}

using RunStep = Status (*)(const Plan<AttentionProblem>&, const Step<AttentionProblem>&, const AttentionArgs&);

// Collects the steps of one plan.
class Steps {
 public:
  Steps(const AttentionProblem& problem, const DeviceFacts& facts, const WorkspaceLayout& workspace, bool checked,
        Plan<AttentionProblem>& plan)
      : problem_(problem), facts_(facts), workspace_(workspace), checked_(checked), plan_(plan) {}

  Status add(const Configuration& c, std::string name, const KernelVariant& variant, int64_t blocks, RunStep run,
             bool overlaps = false) {
    KernelVariant launched = variant;
    if (c.alone && run == run_mapped_step)
      launched.shared_bytes = std::max(launched.shared_bytes, facts_.shared_per_block / 2 + 1024);
    Result<Launch> made = prepare_launch(launched, blocks, facts_.handle);
    if (!made.ok()) return made.status();
    auto params = std::make_shared<ForwardStep>();
    params->params = planned_params(problem_, facts_, c);
    params->workspace = workspace_;
    params->mapping = c.mapping, params->mapping.tile_k = c.tile_k;
    params->counts_tiles = c.counts_tiles;
    params->checks = checked_;
    // Rows that no sequence owns are marked for combine, or written where there is none.
    params->split = c.split && (run == run_mapped_step || !c.shares);
    params->shares = c.shares;
    params->heads_together = c.heads_together;
    params->launch = std::move(made).value();
    params->launch.overlaps_previous = overlaps;
    if (c.maps_tensors && run == run_mapped_step) params->mapped = map_once(problem_, *params);
    Step<AttentionProblem> step;
    step.kernel = std::move(name);
    step.run = run;
    step.grid = blocks;
    step.scratch_bytes = static_cast<size_t>(launched.shared_bytes);
    step.workspace_bytes = static_cast<size_t>(workspace_.bytes);
    step.params = std::move(params);
    plan_.steps.push_back(std::move(step));
    return {};
  }

 private:
  const AttentionProblem& problem_;
  const DeviceFacts& facts_;
  const WorkspaceLayout& workspace_;
  const bool checked_;
  Plan<AttentionProblem>& plan_;
};

int64_t check_blocks(const AttentionProblem& p, const DeviceFacts& facts) {
  constexpr int64_t kRowsPerBlock = 16;  // of check_sequences, rows that lie in no sequence
  const int64_t checking = p.batch * check_slices(p, facts);
  if (!p.packed_q()) return checking;
  return checking + std::min(ceil_div(p.total_q, kRowsPerBlock), int64_t{4} * facts.multiprocessors);
}

}  // namespace

bool may_be_bad(const AttentionProblem& p) {
  return p.packed_q() || p.paged() || p.packed_k() || p.used_q || p.used_k || p.leftpad || p.cache_batch > 0;
}

int32_t row_align(const AttentionProblem& p) {
  int32_t align = 128;
  for (const Slot slot : {Slot::kQ, Slot::kK, Slot::kV, Slot::kOut})
    align = std::min(align, p.align[static_cast<size_t>(slot)]);
  return align;
}

int64_t total_rows(const AttentionProblem& p) { return p.packed_q() ? p.total_q : p.batch * p.seqlen_q; }
int64_t most_keys(const AttentionProblem& p) { return p.packed_k() ? p.total_k : p.seqlen_k; }

int64_t usual_queries(const AttentionProblem& p) {
  return p.packed_q() ? ceil_div(p.total_q, std::max<int64_t>(1, p.batch)) : p.seqlen_q;
}
int64_t usual_keys(const AttentionProblem& p) {
  return p.packed_k() ? ceil_div(p.total_k, std::max<int64_t>(1, p.batch)) : p.seqlen_k;
}

bool mask_bits(const AttentionProblem& p, int32_t tile_k, MaskBits& bits) {
  constexpr int kWordBits = 32;
  const auto extent = [&p](DimBit letter, int64_t size) { return (p.mask_dims & letter) != 0 ? size : 1; };
  bits.sequences = extent(kDimB, p.batch), bits.heads = extent(kDimH, p.nheads_q),
  bits.rows = extent(kDimI, p.seqlen_q);
  bits.words_of_tile = (p.mask_dims & kDimJ) != 0 ? tile_k / kWordBits : 0;
  bits.keys = bits.words_of_tile > 0 ? p.seqlen_k : tile_k;
  bits.words = ceil_div(bits.keys, tile_k) * (tile_k / kWordBits);
  return !__builtin_mul_overflow(bits.sequences * bits.heads, bits.rows, &bits.total) &&
         !__builtin_mul_overflow(bits.total, bits.words, &bits.total) && bits.total < int64_t{1} << 32;
}

std::string common_limits(const AttentionProblem& p, const DeviceFacts& facts) {
  if (p.device != Device::kCuda) return "runs on a GPU only: device=cuda";
  if (p.pass == Pass::kBackward) return "does the forward pass only; gradients are computed on the CPU (device=cpu)";
  if (facts.major < 8) {
    return heed::format("needs a GPU of compute capability 8.0 or later; device {} ({}) has {}.{}", facts.index,
                        facts.name, facts.major, facts.minor);
  }
  if (p.dtype == Dtype::kF64 || p.out_dtype == Dtype::kF64) return "computes in f32: f64 is for ref/attention";
  if (p.nheads_q > kMost31 || p.batch >= kMost31 || !multiply_fits(p.batch, p.nheads_q, kMost31)) {
    return heed::format("takes at most {} heads of all sequences together, not {} times {}", kMost31, p.batch,
                        p.nheads_q);
  }
  const int64_t queries = p.packed_q() ? p.total_q : p.seqlen_q;
  if (!multiply_fits(queries, p.gqa_ratio(), kMost31)) {
    return heed::format("takes at most {} queries of a sequence, heads of a group counted, not {} times {}", kMost31,
                        queries, p.gqa_ratio());
  }
  if (most_keys(p) > kMost31) return heed::format("takes at most {} keys of a sequence, not {}", kMost31, most_keys(p));
  if (p.page_size > kMost31 || p.num_pages > kMost31) {
    return heed::format("takes page_size and num_pages of at most {}, not {} and {}", kMost31, p.page_size,
                        p.num_pages);
  }
  return {};
}

Verdict accept_if_it_fits(const Configurations& configurations) {
  for (const Configuration& c : configurations)
    if (c.blocks > kMost31) return decline(heed::format("would need {} blocks; the grid takes {}", c.blocks, kMost31));
  return accept();
}

void cut_rows(const AttentionProblem& p, Configuration& c) {
  const int64_t heads = c.rows_per_query > 1 ? p.nheads_kv : p.nheads_q;
  if (p.packed_q()) {  // as many tiles as any lengths can need; those too many find nothing to do
    c.num_tiles_q = p.total_q * c.rows_per_query / c.tile_q + p.batch;
    c.blocks = p.total_q == 0 ? 0 : c.num_tiles_q * heads;
  } else {
    c.num_tiles_q = ceil_div(p.seqlen_q * c.rows_per_query, c.tile_q);
    c.blocks = c.num_tiles_q * heads * p.batch;
  }
}

void cut_keys(const AttentionProblem& p, int64_t slots, int64_t least_tiles, Configuration& c, double of_best) {
  const int64_t tiles = std::max<int64_t>(1, ceil_div(most_keys(p), c.tile_k));
  int64_t wanted = 1;
  if (p.splits > 0) {
    wanted = std::min(p.splits, tiles);
  } else if (p.batch_invariant) {
    wanted = ceil_div(tiles * c.tile_k, kInvariantSplitKeys);
    c.split = true;
  } else if (c.blocks > 0 && partial_rows(p, c) * p.nheads_q <= kMost31) {
    const int64_t usual_tiles = std::max<int64_t>(1, ceil_div(usual_keys(p), c.tile_k));
    const int64_t most = std::clamp<int64_t>(usual_tiles / std::max<int64_t>(1, least_tiles), 1, 128);
    const auto use = [&](int64_t n) {  // of the slots, over the waves that n splits take
      const double waves = static_cast<double>(c.blocks * n) / static_cast<double>(slots);
      return waves / std::ceil(waves);
    };
    double best = 0;
    for (int64_t n = 1; n <= most && (n == 1 || c.blocks * n <= 4 * slots); ++n) best = std::max(best, use(n));
    while (use(wanted) < of_best * best) ++wanted;
    if (p.packed_k()) wanted = std::min<int64_t>(wanted * ceil_div(tiles, usual_tiles), tiles);
  }
  c.split_tiles = static_cast<int32_t>(p.batch_invariant && p.splits == 0 ? kInvariantSplitKeys / c.tile_k
                                                                          : ceil_div(tiles, wanted));
  c.max_splits = static_cast<int32_t>(ceil_div(tiles, c.split_tiles));
  c.split = c.split || c.max_splits > 1;
  c.blocks *= c.max_splits;
}

double roofline_us(const AttentionProblem& p, const DeviceFacts& facts, const Rates& rates) {
  const double sms = std::max(1, facts.multiprocessors);
  return 2.0 + std::max(flops(p) / (rates.flops_per_us_sm * sms), bytes(p) / (rates.bytes_per_us_sm * sms));
}

double waste_of(const AttentionProblem& p, const Configuration& c, const DeviceFacts& facts) {
  constexpr double kFull = 4;  // blocks a multiprocessor from which on the last ones do not count
  const double rows = static_cast<double>(usual_queries(p) * c.rows_per_query);
  const double padded = std::max(1.0, std::ceil(rows / c.tile_q)) * c.tile_q / std::max(1.0, rows);
  const double of_each = static_cast<double>(c.blocks) / std::max(1, facts.multiprocessors);
  if (of_each <= 0) return padded;
  const double idle = of_each < kFull ? std::ceil(of_each) / of_each : 1.0;
  const double all = 2.0 * static_cast<double>(total_rows(p) * p.nheads_q) * static_cast<double>(usual_keys(p)) *
                     static_cast<double>(p.head_dim + p.head_dim_v);
  const double longest = p.causal() ? all / std::max(1.0, flops(p)) / c.max_splits / of_each : 0.0;
  return padded * std::max(idle, longest);
}

Status prepare_attention_fwd(const AttentionProblem& problem, const DeviceFacts& facts,
                             const Configurations& configurations, Plan<AttentionProblem>& plan) {
  const ContextScope scope(facts.index);
  HEED_RETURN_IF_ERROR(scope.status());
  const Configuration& splitting = merged(configurations);
  const WorkspaceLayout workspace = workspace_of(problem, configurations);
  if (!workspace.fits) {
    return not_supported(
        heed::format("splits = {}: partial results of {} rows, {} heads and {} splits overflow 64 bits", problem.splits,
                     partial_rows(problem, splitting), problem.nheads_q, splitting.max_splits));
  }
  plan.workspace_bytes = static_cast<size_t>(workspace.bytes);
  std::vector<KernelKey> keys;
  const bool all_run =
      std::all_of(configurations.begin(), configurations.end(), [](const auto& c) { return c.blocks > 0; });
  if (all_run)
    for (const KernelVariant& variant : variants_of(problem, configurations)) keys.push_back(variant.key);
  make_together(keys, facts.handle);
  const bool always = needs_check(problem, configurations);
  Steps steps(problem, facts, workspace, always, plan);
  if (may_be_bad(problem) && check_blocks(problem, facts) > 0) {
    const bool shared = check_slices(problem, facts) > 1;
    HEED_RETURN_IF_ERROR(steps.add(splitting, always ? "check_sequences" : "check_sequences, where status is asked for",
                                   check_sequences_variant(), check_blocks(problem, facts),
                                   always   ? shared ? run_shared_check : run_step
                                   : shared ? run_if_asked<run_shared_check>
                                            : run_if_asked<run_step>));
  } else if (!may_be_bad(problem) && problem.batch > 0) {
    Step<AttentionProblem> step;
    step.kernel = "status = 0, where it is asked for";
    step.run = run_clear_status;
    plan.steps.push_back(std::move(step));
  }
  for (const Configuration& c : configurations) {
    if (c.blocks == 0) continue;
    if (c.packs_mask && pack_blocks(problem, c.tile_k) > 0)
      HEED_RETURN_IF_ERROR(
          steps.add(c, "pack_mask", pack_mask_variant(), pack_blocks(problem, c.tile_k), run_pack_mask, true));
    // The kernel may take its places before what it is behind has ended: it waits by itself. Behind check_sequences that is
    // worth it for all; attention_fwd_sm90 lets the next one in early itself.
    const bool overlaps = facts.major >= 9 && ((always && &c == &configurations.front()) || c.maps_tensors);
    HEED_RETURN_IF_ERROR(steps.add(c, c.kernel, c.variant, c.grid > 0 ? c.grid : c.blocks,
                                   c.maps_tensors ? run_mapped_step : run_step, overlaps));
    if (!c.split || c.shares) continue;
    HEED_RETURN_IF_ERROR(steps.add(c, "combine", combine_variant(problem.dtype, combine_rows(c)),
                                   combine_blocks(problem, c), run_step, facts.major >= 9));
  }
  return {};
}

std::vector<KernelVariant> variants_of(const AttentionProblem& problem, const Configurations& configurations) {
  std::vector<KernelVariant> variants;
  for (const Configuration& c : configurations) {
    variants.push_back(c.variant);
    if (c.packs_mask) variants.push_back(pack_mask_variant());
    if (c.split && !c.shares) variants.push_back(combine_variant(problem.dtype, combine_rows(c)));
  }
  if (may_be_bad(problem)) variants.push_back(check_sequences_variant());
  return variants;
}

std::vector<KernelVariant> variants_of(const AttentionProblem& problem, const DeviceFacts& facts) {
  using Check = Verdict (*)(const AttentionProblem&, const DeviceFacts&);
  using Configure = Configurations (*)(const AttentionProblem&, const DeviceFacts&);
  constexpr std::pair<Check, Configure> kRows[] = {{check_attention_decode_sm90, configure_attention_decode_sm90},
                                                   {check_attention_decode_sm80, configure_attention_decode_sm80},
                                                   {check_attention_fwd_sm90, configure_attention_fwd_sm90},
                                                   {check_attention_fwd_sm80, configure_attention_fwd_sm80},
                                                   {check_attention_fwd_portable, configure_attention_fwd_portable}};
  Configurations best;
  for (const auto& [check, configure] : kRows) {
    if (!check(problem, facts).accepted) continue;
    Configurations mine = configure(problem, facts);
    if (best.empty() || mine.front().cost_us < best.front().cost_us) best = std::move(mine);
  }
  return best.empty() ? std::vector<KernelVariant>() : variants_of(problem, best);
}

Verdict check_on_device(const AttentionProblem& problem,
                        Verdict (*check)(const AttentionProblem&, const DeviceFacts&)) {
  if (problem.device != Device::kCuda) return decline("runs on a GPU only: device=cuda");
  const Result<const DeviceFacts*> facts = device_facts(problem.device_index);
  return facts.ok() ? check(problem, *facts.value()) : decline(facts.status().message());
}

}  // namespace heed::cuda
