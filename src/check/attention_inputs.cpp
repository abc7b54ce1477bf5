// Inputs of an attention line. Rows of q, k, v, bias and dout that no sequence shows stay NaN.
#include <algorithm>
#include <array>
#include <cmath>

#include "base/threads.h"
#include "check/inputs.h"
#include "plan/planner.h"
#include "ref/attention.h"

namespace heed::check {
namespace {

constexpr double kReferenceFlops = 2e9;  // the largest forward pass that the reference does for a backward line

class AttentionMaker {
 public:
  explicit AttentionMaker(Inputs& inputs)
      : inputs_(inputs), p_(std::get<AttentionProblem>(inputs.problem)), data_(inputs.data), args_(inputs.attention) {}

  Status make() {
    if (data_.p == 0) p_.dropout = false;  // arguments with dropout_p = 0 pose a problem without
    heed_attention_args_init(&args_);
    set_options();
    add_queries_lengths();
    add_keys_lengths();
    for (int slot = 0; slot < kNumSlots; ++slot) add_slot(static_cast<Slot>(slot));
    add_vectors();
    set_views();
    locate();
    fill_rows();
    fill_scores();
    return p_.pass == Pass::kBackward ? run_forward() : Status();
  }

 private:
  GuardedTensor& tensor(Slot slot) { return *slots_[static_cast<int>(slot)]; }

  void set_options() {
    args_.pass = static_cast<int32_t>(p_.pass);
    args_.layout_q = static_cast<int32_t>(p_.layout_q);
    args_.layout_kv = static_cast<int32_t>(p_.layout_kv);
    args_.device = static_cast<int32_t>(p_.device);
    args_.device_index = p_.device_index;
    args_.has_softmax_scale = data_.scale.has_value();
    args_.softmax_scale = static_cast<float>(data_.scale.value_or(0));
    args_.softcap = p_.softcap ? static_cast<float>(data_.softcap_value) : 0;
    args_.dropout_p = p_.dropout ? static_cast<float>(data_.p) : 0;
    args_.offset_kind = static_cast<int32_t>(p_.offset_kind);
    args_.q_offset = p_.q_offset;
    args_.window_left = p_.window_left;
    args_.window_right = p_.window_right;
    args_.chunk = p_.chunk;
    args_.max_seqlen_q = p_.packed_q() ? p_.seqlen_q : 0;
    args_.max_seqlen_k = p_.packed_k() ? p_.seqlen_k : 0;
    args_.num_splits = p_.splits;
    args_.deterministic = p_.deterministic;
    args_.batch_invariant = p_.batch_invariant;
    args_.num_threads = p_.threads;
    args_.dropout_seed = 0x9e3779b97f4a7c15u * data_.seed;
    args_.dropout_offset = data_.seed << 33 | 5;
  }

  std::vector<int64_t> half_to_all(std::string_view name, const std::vector<int64_t>& lengths) {
    Random random(data_.seed, name);
    std::vector<int64_t> used(lengths.size());
    for (size_t b = 0; b < used.size(); ++b) used[b] = random.integer(b, lengths[b] / 2, lengths[b]);
    return used;
  }

  // Packed: lq= is how the rows are divided, and the used part of each sequence is drawn. Dense: lq= is the used part.
  std::vector<int64_t> add_lengths(bool packed, bool used, const Lengths& given, int64_t total, int64_t capacity,
                                   const char* name, const char* cu_name, const char* used_name, heed_tensor& cu_view,
                                   heed_tensor& used_view) {
    std::vector<int64_t> lengths(p_.batch, capacity);
    if (packed) {
      lengths = packed_lengths(given, data_.seed, name, p_.batch, total);
      cu_view = leading(add_integers(inputs_, cu_name, offsets_of(lengths)), 1);
      if (used) lengths = half_to_all(used_name, lengths);
    } else if (used) {
      lengths = drawn(given, data_.seed, name, lengths, lengths);
    }
    if (used) used_view = leading(add_integers(inputs_, used_name, lengths), 1);
    return lengths;
  }

  void add_queries_lengths() {
    add_lengths(p_.packed_q(), p_.used_q, data_.lq, p_.total_q, p_.seqlen_q, "lq", "cu_seqlens_q", "seqused_q",
                args_.cu_seqlens_q, args_.seqused_q);
  }

  void add_keys_lengths() {
    const std::vector<int64_t> lengths = add_lengths(p_.packed_k(), p_.used_k, data_.lk, p_.total_k, p_.seqlen_k, "lk",
                                                     "cu_seqlens_k", "seqused_k", args_.cu_seqlens_k, args_.seqused_k);
    std::vector<int64_t> leftpad(p_.batch, 0);
    if (p_.leftpad) {
      Random random(data_.seed, "leftpad");
      std::vector<int64_t> standard(p_.batch);
      for (int64_t b = 0; b < p_.batch; ++b) standard[b] = random.integer(b, 0, lengths[b] / 4);
      leftpad = drawn(data_.leftpad, data_.seed, "lpad", lengths, standard);
      args_.leftpad_k = leading(add_integers(inputs_, "leftpad_k", leftpad), 1);
    }
    std::vector<int64_t> rows(p_.batch);
    for (int64_t b = 0; b < p_.batch; ++b) rows[b] = b;
    if (p_.cache_batch > 0) {
      Random random(data_.seed, "cache_batch_idx");
      for (int64_t b = 0; b < p_.batch; ++b) rows[b] = random.integer(b, 0, p_.cache_batch - 1);
      args_.cache_batch_idx = leading(add_integers(inputs_, "cache_batch_idx", rows), 1);
    }
    if (!p_.paged()) return;
    pages_.resize(p_.cache_batch > 0 ? p_.cache_batch : p_.batch);
    for (int64_t b = 0; b < p_.batch; ++b) {
      if (lengths[b] <= leftpad[b]) continue;
      const int64_t first = leftpad[b] / p_.page_size, last = (lengths[b] + p_.page_size - 1) / p_.page_size;
      PageRange& range = pages_[rows[b]];
      range = range.last == 0 ? PageRange{first, last}
                              : PageRange{std::min(range.first, first), std::max(range.last, last)};
    }
  }

  void add_slot(Slot slot) {
    if (!has_slot(p_, slot)) return;
    const bool result = slot == Slot::kOut || slot == Slot::kLse;
    const bool gradient = slot == Slot::kDq || slot == Slot::kDk || slot == Slot::kDv || slot == Slot::kDbias;
    const bool output = gradient || (result && p_.pass == Pass::kForward);
    slots_[static_cast<int>(slot)] = &inputs_.tensors.emplace_back(
        std::string(slot_name(slot)), slot_dtype(p_, slot), slot_shape(p_, slot), p_.strides(slot),
        p_.align[static_cast<int>(slot)], output ? Role::kOutput : Role::kInput);
    if (slot != Slot::kPageTable) return;
    GuardedTensor& table = tensor(slot);
    const int64_t max_pages = table.shape()[1];
    const std::vector<int64_t> entries =
        page_entries(pages_, max_pages, p_.num_pages, data_.pages_shuffled, data_.seed);
    for_each_element(table, [&](int64_t index, int64_t offset, int64_t, int64_t, int64_t, int64_t) {
      table.store(offset, static_cast<double>(entries[index]));
    });
  }

  void add_vectors() {
    const Dtype gradient_dtype = p_.out_dtype == Dtype::kF64 ? Dtype::kF64 : Dtype::kF32;
    if (p_.sinks) {
      GuardedTensor& sinks = add_vector(inputs_, "sinks", Dtype::kF32, p_.nheads_q, Role::kInput);
      Random random(data_.seed, "sinks");
      for (int64_t h = 0; h < p_.nheads_q; ++h) sinks.store(h, random.normal(h));
      args_.sinks = leading(sinks, 1);
    }
    if (p_.dsinks) {
      args_.dsinks = leading(add_vector(inputs_, "dsinks", gradient_dtype, p_.nheads_q, Role::kOutput), 1);
    }
    if (p_.dalibi) {
      const std::array<int64_t, 4> shape = {p_.alibi_per_batch ? p_.batch : 1, p_.nheads_q, 1, 1};
      GuardedTensor& slopes = inputs_.tensors.emplace_back(
          "dalibi_slopes", gradient_dtype, shape, std::array<int64_t, 4>{p_.alibi_per_batch ? p_.nheads_q : 0, 1, 0, 0},
          dtype_bytes(gradient_dtype), Role::kOutput);
      args_.dalibi_slopes = per_head(slopes);
    }
    args_.status = leading(add_vector(inputs_, "status", Dtype::kI32, p_.batch, Role::kOutput), 1);
  }

  heed_tensor per_head(const GuardedTensor& slopes) const {
    heed_tensor view = leading(slopes, 2);
    if (p_.alibi_per_batch) return view;
    view.ndim = 1;
    view.shape[0] = view.shape[1];
    view.stride[0] = view.stride[1];
    view.shape[1] = view.stride[1] = 0;
    return view;
  }

  void set_views() {
    const std::pair<Slot, heed_tensor*> views[] = {
        {Slot::kQ, &args_.q},       {Slot::kK, &args_.k},   {Slot::kV, &args_.v},   {Slot::kOut, &args_.out},
        {Slot::kDout, &args_.dout}, {Slot::kDq, &args_.dq}, {Slot::kDk, &args_.dk}, {Slot::kDv, &args_.dv}};
    for (const auto& [slot, view] : views) {
      if (!has_slot(p_, slot)) continue;
      const bool keys = slot == Slot::kK || slot == Slot::kV || slot == Slot::kDk || slot == Slot::kDv;
      *view = in_layout(tensor(slot), keys ? p_.layout_kv : p_.layout_q);
    }
    for (const auto& [slot, view] : {std::pair(Slot::kLse, &args_.lse), std::pair(Slot::kDlse, &args_.dlse)}) {
      if (!has_slot(p_, slot)) continue;
      *view = leading(tensor(slot), 3);
      if (!p_.packed_q()) continue;
      for (int dim = 0; dim < 2; ++dim)
        view->shape[dim] = view->shape[dim + 1], view->stride[dim] = view->stride[dim + 1];
      view->shape[2] = view->stride[2] = 0;
      view->ndim = 2;
    }
    if (p_.bias()) args_.bias = leading(tensor(Slot::kBias), 4);
    if (p_.mask) args_.mask = leading(tensor(Slot::kMask), 4);
    if (p_.dbias) args_.dbias = leading(tensor(Slot::kDbias), 4);
    if (p_.paged()) args_.page_table = leading(tensor(Slot::kPageTable), 2);
    if (p_.alibi) args_.alibi_slopes = per_head(tensor(Slot::kAlibi));
  }

  // What a forward run reads and writes.
  AttentionArgs pointers() {
    const auto data = [this](Slot slot) { return has_slot(p_, slot) ? tensor(slot).data() : nullptr; };
    const auto numbers = [](const heed_tensor& t) { return static_cast<const int32_t*>(t.data); };
    AttentionArgs args;
    args.q = data(Slot::kQ);
    args.k = data(Slot::kK);
    args.v = data(Slot::kV);
    args.out = data(Slot::kOut);
    args.lse = data(Slot::kLse);
    args.bias = data(Slot::kBias);
    args.mask = static_cast<const uint8_t*>(data(Slot::kMask));
    args.alibi_slopes = static_cast<const float*>(data(Slot::kAlibi));
    args.page_table = static_cast<const int32_t*>(data(Slot::kPageTable));
    args.sinks = static_cast<const float*>(args_.sinks.data);
    args.cu_seqlens_q = numbers(args_.cu_seqlens_q);
    args.cu_seqlens_k = numbers(args_.cu_seqlens_k);
    args.seqused_q = numbers(args_.seqused_q);
    args.seqused_k = numbers(args_.seqused_k);
    args.leftpad_k = numbers(args_.leftpad_k);
    args.cache_batch_idx = numbers(args_.cache_batch_idx);
    args.softmax_scale =
        data_.scale ? args_.softmax_scale : static_cast<float>(1.0 / std::sqrt(static_cast<double>(p_.head_dim)));
    args.softcap = args_.softcap;
    args.dropout_p = args_.dropout_p;
    args.dropout_seed = args_.dropout_seed;
    args.dropout_offset = args_.dropout_offset;
    args.executor = &pool_executor();
    return args;
  }

  // Which rows of q and k (dimensions b and s) some sequence shows, and where a key stands in its sequence.
  void locate() {
    const AttentionArgs args = pointers();
    const auto& q = tensor(Slot::kQ).shape();
    const auto& k = tensor(Slot::kK).shape();
    q_along_.assign(q[0] * q[2], -1.0);
    k_along_.assign(k[0] * k[2], -1.0);
    sequences_ = ref::sequences_of(p_, args);
    for (const ref::Sequence& s : sequences_) {
      for (int64_t i = 0; i < s.num_rows; ++i) q_along_[s.q_batch * q[2] + s.first_row + i] = 1;
      for (int64_t j = 0; j < s.num_keys; ++j) {
        const int64_t key = s.first_key + j;
        const int64_t place =
            p_.paged() ? s.pages[key / p_.page_size * p_.strides(Slot::kPageTable)[1]] * k[2] + key % p_.page_size
                       : s.kv_batch * k[2] + key;
        k_along_[place] = static_cast<double>(j + 1) / static_cast<double>(s.num_keys);
      }
    }
  }

  // Elements whose row is shown; the others stay NaN.
  template <class Value>
  void fill_shown(Slot slot, const std::vector<double>& along, Value&& value) {
    GuardedTensor& t = tensor(slot);
    for_each_element(t, [&](int64_t index, int64_t offset, int64_t a, int64_t, int64_t c, int64_t) {
      const double place = along[a * t.shape()[2] + c];
      if (place >= 0) t.store(offset, value(index, place));
    });
  }

  void fill_rows() {
    for (const Slot slot : {Slot::kQ, Slot::kK, Slot::kV}) {
      Fill fill(data_, slot_name(slot), p_.head_dim);
      fill_shown(slot, slot == Slot::kQ ? q_along_ : k_along_, fill);
    }
    for (const Slot slot : {Slot::kDout, Slot::kDlse}) {
      if (!has_slot(p_, slot)) continue;
      Random random(data_.seed, slot_name(slot));
      fill_shown(slot, q_along_, [&](int64_t index, double) { return random.normal(index); });
    }
  }

  // Rows and columns of the bias or mask that some sequence shows.
  bool score_shown(uint8_t dims, int64_t a, int64_t i, int64_t j) const {
    for (int64_t b = 0; b < p_.batch; ++b) {
      if ((dims & kDimB) != 0 && b != a) continue;
      const ref::Sequence& s = sequences_[b];
      if (((dims & kDimI) == 0 || i < s.num_rows) && ((dims & kDimJ) == 0 || j < s.num_keys)) return true;
    }
    return false;
  }

  void fill_scores() {
    if (p_.bias()) {
      Random random(data_.seed, "bias");
      GuardedTensor& bias = tensor(Slot::kBias);
      for_each_element(bias, [&](int64_t index, int64_t offset, int64_t a, int64_t, int64_t i, int64_t j) {
        if (score_shown(p_.bias_dims, a, i, j)) bias.store(offset, random.normal(index));
      });
    }
    if (p_.mask) {
      Random random(data_.seed, "mask");
      GuardedTensor& mask = tensor(Slot::kMask);
      for_each_element(mask, [&](int64_t index, int64_t offset, int64_t, int64_t, int64_t, int64_t) {
        mask.store(offset, random.uniform(index) < 0.8);
      });
    }
    if (p_.alibi) {
      GuardedTensor& slopes = tensor(Slot::kAlibi);
      for_each_element(slopes, [&](int64_t, int64_t offset, int64_t b, int64_t h, int64_t, int64_t) {
        const double slope = std::exp2(-8.0 * static_cast<double>(h + 1) / static_cast<double>(p_.nheads_q));
        slopes.store(offset, slope * (1 + 0.25 * static_cast<double>(b % 4)));
      });
    }
  }

  // out and lse of a backward line. A large one would keep the reference busy for minutes: the planner's choice then.
  Status run_forward() {
    AttentionProblem forward = p_;
    forward.pass = Pass::kForward;
    forward.device = Device::kCpu;  // where the tensors are being made
    forward.device_index = 0;
    forward.dlse = forward.dq = forward.dk = forward.dv = forward.dbias = forward.dsinks = forward.dalibi = false;
    for (const Slot slot : {Slot::kDout, Slot::kDlse, Slot::kDq, Slot::kDk, Slot::kDv, Slot::kDbias}) {
      forward.strides(slot) = {};
      forward.align[static_cast<int>(slot)] = 0;
    }
    AttentionArgs args = pointers();
    if (flops(forward) <= kReferenceFlops || p_.out_dtype == Dtype::kF64) {
      ref::attention_forward(forward, args);
      return {};
    }
    const Result<std::shared_ptr<const Plan<AttentionProblem>>> plan = make_plan(forward, "");
    if (!plan.ok()) return plan.status();
    std::vector<unsigned char> workspace(plan.value()->workspace_bytes + 64);
    args.workspace = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 63) / 64 * 64);
    args.workspace_bytes = plan.value()->workspace_bytes;
    return run(*plan.value(), args);
  }

  Inputs& inputs_;
  AttentionProblem& p_;
  const DataFields& data_;
  heed_attention_args& args_;
  std::array<GuardedTensor*, kNumSlots> slots_ = {};
  std::vector<PageRange> pages_;
  std::vector<ref::Sequence> sequences_;
  std::vector<double> q_along_, k_along_;  // per (b, s); -1: no sequence shows it
};

}  // namespace

Status make_attention_inputs(Inputs& inputs) { return AttentionMaker(inputs).make(); }

}  // namespace heed::check
