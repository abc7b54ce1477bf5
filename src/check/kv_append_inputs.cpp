// Inputs of a kv_append line: caches that hold cache_seqlens keys each, rows of their own for every sequence, NaN
// beyond.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "base/format.h"
#include "check/inputs.h"

namespace heed::check {
namespace {

class KvAppendMaker {
 public:
  explicit KvAppendMaker(Inputs& inputs)
      : inputs_(inputs), p_(std::get<KvAppendProblem>(inputs.problem)), data_(inputs.data), args_(inputs.kv_append) {}

  Status make() {
    heed_kv_append_args_init(&args_);
    args_.layout_new = static_cast<int32_t>(p_.layout_new);
    args_.layout_cache = static_cast<int32_t>(p_.layout_cache);
    args_.device = static_cast<int32_t>(p_.device);
    args_.device_index = p_.device_index;
    args_.rotary_style = static_cast<int32_t>(p_.rotary_style);
    args_.q_positions = p_.q_per_position;
    args_.num_threads = p_.threads;
    add_new_lengths();
    add_cache_lengths();
    HEED_RETURN_IF_ERROR(add_cache_rows());
    for (int slot = 0; slot < kNumKvSlots; ++slot) {
      if (static_cast<KvSlot>(slot) != KvSlot::kPageTable) add_slot(static_cast<KvSlot>(slot));
    }
    args_.status = leading(add_vector(inputs_, "status", Dtype::kI32, p_.batch, Role::kOutput), 1);
    set_views();
    fill_new();
    fill_caches();
    fill_tables();
    return {};
  }

 private:
  GuardedTensor& tensor(KvSlot slot) { return *slots_[static_cast<int>(slot)]; }

  void add_new_lengths() {
    new_lengths_.assign(p_.batch, p_.append ? p_.seqlen_new : 0);
    q_lengths_.assign(p_.batch, p_.has_q() ? p_.seqlen_q : 0);
    if (!p_.packed()) return;
    if (p_.append) {
      new_lengths_ = packed_lengths(data_.lq, data_.seed, "lq", p_.batch, p_.total_new);
      args_.cu_seqlens_new = leading(add_integers(inputs_, "cu_seqlens_new", offsets_of(new_lengths_)), 1);
    }
    if (p_.has_q()) {
      const bool alike = p_.append && p_.total_q == p_.total_new;
      q_lengths_ = alike ? new_lengths_ : packed_lengths({}, data_.seed, "tq", p_.batch, p_.total_q);
      args_.cu_seqlens_q = leading(add_integers(inputs_, "cu_seqlens_q", offsets_of(q_lengths_)), 1);
    }
  }

  // Positions that sequence b takes in the rotary table.
  int64_t positions(int64_t b) const {
    const int64_t queries = p_.q_per_position ? q_lengths_[b] : std::min<int64_t>(q_lengths_[b], 1);
    return std::max(new_lengths_[b], queries);
  }

  void add_cache_lengths() {
    std::vector<int64_t> limits(p_.batch), standard(p_.batch);
    Random random(data_.seed, "lk");
    for (int64_t b = 0; b < p_.batch; ++b) {
      limits[b] = p_.seqlen_k - new_lengths_[b];
      if (p_.rotary() && !p_.rotary_seqlens) limits[b] = std::min(limits[b], p_.rotary_rows - positions(b));
      limits[b] = std::max<int64_t>(limits[b], 0);
      standard[b] = random.integer(b, 0, limits[b]);
    }
    starts_ = drawn(data_.lk, data_.seed, "lk", limits, standard);
    args_.cache_seqlens = leading(add_integers(inputs_, "cache_seqlens", starts_), 1);

    leftpad_.assign(p_.batch, 0);
    if (p_.leftpad) {
      Random pad(data_.seed, "leftpad");
      for (int64_t b = 0; b < p_.batch; ++b) standard[b] = pad.integer(b, 0, starts_[b] / 4);
      leftpad_ = drawn(data_.leftpad, data_.seed, "lpad", starts_, standard);
      args_.leftpad_k = leading(add_integers(inputs_, "leftpad_k", leftpad_), 1);
    }
    if (p_.rotary_seqlens) {
      Random rotary(data_.seed, "rotary_seqlens");
      std::vector<int64_t> first(p_.batch);
      for (int64_t b = 0; b < p_.batch; ++b) first[b] = rotary.integer(b, 0, p_.rotary_rows - positions(b));
      args_.rotary_seqlens = leading(add_integers(inputs_, "rotary_seqlens", first), 1);
    }
  }

  // No two sequences write one cache row or page.
  Status add_cache_rows() {
    const int64_t num_rows = p_.cache_batch > 0 ? p_.cache_batch : p_.batch;
    rows_.resize(p_.batch);
    for (int64_t b = 0; b < p_.batch; ++b) rows_[b] = b;
    if (p_.cache_batch > 0) {
      if (p_.cache_batch < p_.batch) {
        return invalid_argument(heed::format(
            "problem line: cache_batch={} must be at least b={}: every sequence appends to a cache row of its own",
            p_.cache_batch, p_.batch));
      }
      const std::vector<int64_t> order = permutation(p_.cache_batch, data_.seed, "cache_batch_idx");
      rows_.assign(order.begin(), order.begin() + p_.batch);
      args_.cache_batch_idx = leading(add_integers(inputs_, "cache_batch_idx", rows_), 1);
    }
    if (!p_.paged()) return {};
    std::vector<PageRange> needed(num_rows);
    int64_t num_needed = 0;
    for (int64_t b = 0; b < p_.batch; ++b) {
      const int64_t end = std::min(starts_[b] + new_lengths_[b], p_.seqlen_k);
      if (end <= leftpad_[b]) continue;
      needed[rows_[b]] = {leftpad_[b] / p_.page_size, (end + p_.page_size - 1) / p_.page_size};
      num_needed += needed[rows_[b]].last - needed[rows_[b]].first;
    }
    if (num_needed > p_.num_pages) {
      return invalid_argument(
          heed::format("problem line: num_pages={} must be at least {}: every sequence appends to "
                       "pages of its own",
                       p_.num_pages, num_needed));
    }
    add_slot(KvSlot::kPageTable);
    GuardedTensor& table = tensor(KvSlot::kPageTable);
    const std::vector<int64_t> entries =
        page_entries(needed, table.shape()[1], p_.num_pages, data_.pages_shuffled, data_.seed);
    for_each_element(table, [&](int64_t index, int64_t offset, int64_t, int64_t, int64_t, int64_t) {
      table.store(offset, static_cast<double>(entries[index]));
    });
    args_.page_table = leading(table, 2);
    return {};
  }

  void add_slot(KvSlot slot) {
    if (!has_slot(p_, slot)) return;
    const bool cache = slot == KvSlot::kKCache || slot == KvSlot::kVCache;
    const Role role = cache ? Role::kUpdated : slot == KvSlot::kQOut ? Role::kOutput : Role::kInput;
    slots_[static_cast<int>(slot)] =
        &inputs_.tensors.emplace_back(std::string(slot_name(slot)), slot_dtype(p_, slot), slot_shape(p_, slot),
                                      p_.strides(slot), p_.align[static_cast<int>(slot)], role);
  }

  void set_views() {
    args_.k_cache = in_layout(tensor(KvSlot::kKCache), p_.layout_cache);
    args_.v_cache = in_layout(tensor(KvSlot::kVCache), p_.layout_cache);
    if (p_.append) {
      args_.k_new = in_layout(tensor(KvSlot::kKNew), p_.layout_new);
      args_.v_new = in_layout(tensor(KvSlot::kVNew), p_.layout_new);
    }
    if (p_.has_q()) {
      args_.q = in_layout(tensor(KvSlot::kQ), p_.layout_new);
      args_.q_out = in_layout(tensor(KvSlot::kQOut), p_.layout_new);
    }
    if (p_.rotary()) {
      args_.rotary_cos = trailing(tensor(KvSlot::kCos), 2);
      args_.rotary_sin = trailing(tensor(KvSlot::kSin), 2);
    }
  }

  // Rows after the last packed sequence stay NaN.
  void fill_new() {
    for (const KvSlot slot : {KvSlot::kKNew, KvSlot::kVNew, KvSlot::kQ}) {
      if (!has_slot(p_, slot)) continue;
      int64_t rows = 0;
      for (const int64_t length : slot == KvSlot::kQ ? q_lengths_ : new_lengths_) rows += length;
      GuardedTensor& t = tensor(slot);
      Fill fill(data_, slot_name(slot), p_.head_dim);
      for_each_element(t, [&](int64_t index, int64_t offset, int64_t, int64_t, int64_t c, int64_t) {
        if (!p_.packed() || c < rows) t.store(offset, fill(index, 0));
      });
    }
  }

  void fill_caches() {
    const int64_t keys_per_row = p_.paged() ? p_.page_size : p_.seqlen_k;
    std::vector<bool> held(tensor(KvSlot::kKCache).shape()[0] * keys_per_row);
    for (int64_t b = 0; b < p_.batch; ++b) {
      for (int64_t key = leftpad_[b]; key < std::min(starts_[b], p_.seqlen_k); ++key) held[place_of(b, key)] = true;
    }
    for (const KvSlot slot : {KvSlot::kKCache, KvSlot::kVCache}) {
      GuardedTensor& t = tensor(slot);
      Fill fill(data_, slot_name(slot), p_.head_dim);
      for_each_element(t, [&](int64_t index, int64_t offset, int64_t a, int64_t, int64_t c, int64_t) {
        if (held[a * keys_per_row + c]) {
          t.store(offset, fill(index, 0));
        } else {
          t.store(offset, std::numeric_limits<double>::quiet_NaN());
        }
      });
    }
  }

  int64_t place_of(int64_t b, int64_t key) {
    if (!p_.paged()) return rows_[b] * p_.seqlen_k + key;
    const GuardedTensor& table = tensor(KvSlot::kPageTable);
    const int64_t entry = table.offset(rows_[b], key / p_.page_size, 0, 0);
    return static_cast<const int32_t*>(table.data())[entry] * p_.page_size + key % p_.page_size;
  }

  void fill_tables() {
    if (!p_.rotary()) return;
    for (const KvSlot slot : {KvSlot::kCos, KvSlot::kSin}) {
      GuardedTensor& t = tensor(slot);
      for_each_element(t, [&](int64_t, int64_t offset, int64_t, int64_t, int64_t position, int64_t pair) {
        const double exponent = -2.0 * static_cast<double>(pair) / static_cast<double>(p_.rotary_dim);
        const double angle = static_cast<double>(position) * std::pow(10000.0, exponent);
        t.store(offset, slot == KvSlot::kCos ? std::cos(angle) : std::sin(angle));
      });
    }
  }

  Inputs& inputs_;
  KvAppendProblem& p_;
  const DataFields& data_;
  heed_kv_append_args& args_;
  std::array<GuardedTensor*, kNumKvSlots> slots_ = {};
  std::vector<int64_t> new_lengths_, q_lengths_, starts_, leftpad_, rows_;
};

}  // namespace

Status make_kv_append_inputs(Inputs& inputs) { return KvAppendMaker(inputs).make(); }

}  // namespace heed::check
