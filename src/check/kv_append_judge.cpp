// The judge of kv_append: turned rows within the bound, everything else bit for bit, nothing else touched.
#include <algorithm>
#include <cstring>
#include <vector>

#include "check/bound.h"
#include "check/tensor_judge.h"
#include "ref/kv_append.h"

namespace heed::check {
namespace {

constexpr double kSmallest = 0x1p-20;

class KvAppendJudge {
 public:
  KvAppendJudge(const KvAppendProblem& before_problem, const KvAppendArgs& before, const KvAppendProblem& problem,
                const KvAppendArgs& args)
      : before_problem_(before_problem),
        before_(before),
        p_(problem),
        a_(args),
        appends_(ref::appends_of(before_problem, before)),
        keys_per_row_(keys_per_row(problem)) {
    written_.resize(slot_shape(p_, KvSlot::kKCache)[0] * keys_per_row_);
  }

  Report report() {
    Report report;
    for (const KvSlot slot : {KvSlot::kKCache, KvSlot::kVCache}) {
      TensorJudge verdict(std::string(slot_name(slot)), p_.dtype, p_.paged() ? "phsd" : "bhjd");
      if (p_.append) compare_new_keys(slot, verdict);
      compare_rest(slot, verdict);
      report.tensors.push_back(verdict.finish(kSmallest * largest_));
    }
    if (p_.has_q()) report.tensors.push_back(judge_queries());
    if (a_.status != nullptr) {
      TensorJudge verdict("status", Dtype::kI32, "b");
      for (const ref::Append& s : appends_) {
        verdict.compare_exact({s.b, 0, 0, 0}, a_.status[s.b], s.status, "for this sequence's data");
      }
      report.tensors.push_back(verdict.finish(0));
    }
    return report;
  }

 private:
  static int64_t keys_per_row(const KvAppendProblem& p) { return p.paged() ? p.page_size : p.seqlen_k; }

  // The row at `to` must be the row at `from`, turned.
  void compare_turned(TensorJudge& verdict, Place place, const void* from, int64_t from_offset, int64_t position,
                      const void* to, int64_t to_offset) {
    want_.resize(p_.head_dim);
    plain_.resize(p_.head_dim);
    ref::turned_row(before_problem_, before_, from, from_offset, position, want_);
    ref::turned_row(before_problem_, before_, from, from_offset, position, plain_);
    for (int64_t d = 0; d < p_.head_dim; ++d) {
      place[3] = d;
      const double got = load_as_double(to, p_.dtype, to_offset + d);
      if (d >= p_.rotary_dim) {
        verdict.compare_exact(place, got, want_[d], "as it was given");
        continue;
      }
      verdict.compare(place, got, want_[d], rounded_to(p_.dtype, plain_[d]));
      if (std::isfinite(want_[d])) largest_ = std::max(largest_, std::fabs(want_[d]));
    }
  }

  void compare_new_keys(KvSlot slot, TensorJudge& verdict) {
    const bool keys = slot == KvSlot::kKCache;
    const void* from = keys ? before_.k_new : before_.v_new;
    const void* to = keys ? a_.k_cache : a_.v_cache;
    const KvSlot new_slot = keys ? KvSlot::kKNew : KvSlot::kVNew;
    for (const ref::Append& s : appends_) {
      for (int64_t t = 0; t < s.num_new; ++t) {
        const int64_t key = s.start + t;
        const int64_t row = ref::cache_index(p_, a_, s, key);
        written_[row * keys_per_row_ + key % keys_per_row_] = true;
        for (int64_t hkv = 0; hkv < p_.nheads_kv; ++hkv) {
          const int64_t from_offset = ref::row_offset(before_problem_, s, new_slot, hkv, s.first_new + t);
          const int64_t to_offset = ref::cache_offset(p_, a_, s, slot, hkv, key);
          const Place place = {row, hkv, key % keys_per_row_, 0};
          if (keys) {
            compare_turned(verdict, place, from, from_offset, s.position + t, to, to_offset);
          } else {
            compare_bits(verdict, place, from, from_offset, to, to_offset, p_.head_dim_v, "as v_new has it");
          }
        }
      }
    }
  }

  void compare_bits(TensorJudge& verdict, Place place, const void* from, int64_t from_offset, const void* to,
                    int64_t to_offset, int64_t count, const char* why) {
    const int64_t width = dtype_bytes(p_.dtype);
    const auto* const x = static_cast<const unsigned char*>(from) + from_offset * width;
    const auto* const y = static_cast<const unsigned char*>(to) + to_offset * width;
    for (int64_t d = 0; d < count; ++d) {
      place[3] = d;
      const double want = load_as_double(x, p_.dtype, d), got = load_as_double(y, p_.dtype, d);
      if (std::memcmp(x + d * width, y + d * width, width) != 0 && !(std::isnan(want) && std::isnan(got))) {
        verdict.compare_exact(place, got, want, why);
      }
    }
  }

  // What nothing was appended to is as it was.
  void compare_rest(KvSlot slot, TensorJudge& verdict) {
    const std::array<int64_t, 4> shape = slot_shape(p_, slot);
    const void* from = slot == KvSlot::kKCache ? before_.k_cache : before_.v_cache;
    const void* to = slot == KvSlot::kKCache ? a_.k_cache : a_.v_cache;
    const auto& from_stride = before_problem_.strides(slot);
    const auto& to_stride = p_.strides(slot);
    for (int64_t row = 0; row < shape[0]; ++row) {
      for (int64_t key = 0; key < shape[2]; ++key) {
        if (written_[row * shape[2] + key]) continue;
        for (int64_t hkv = 0; hkv < shape[1]; ++hkv) {
          compare_bits(verdict, {row, hkv, key, 0}, from,
                       row * from_stride[0] + hkv * from_stride[1] + key * from_stride[2], to,
                       row * to_stride[0] + hkv * to_stride[1] + key * to_stride[2], shape[3], "as before the call");
        }
      }
    }
  }

  heed_check_tensor judge_queries() {
    TensorJudge verdict("q_out", p_.dtype, "bhid");
    const std::array<int64_t, 4> shape = slot_shape(p_, KvSlot::kQOut);
    std::vector<bool> filled(shape[0] * shape[2]);
    largest_ = 0;
    for (const ref::Append& s : appends_) {
      for (int64_t i = 0; i < s.num_rows; ++i) {
        filled[(p_.packed() ? 0 : s.b * shape[2]) + s.first_row + i] = true;
        for (int64_t h = 0; h < p_.nheads_q; ++h) {
          compare_turned(verdict, {s.b, h, i, 0}, before_.q,
                         ref::row_offset(before_problem_, s, KvSlot::kQ, h, s.first_row + i),
                         s.position + (p_.q_per_position ? i : 0), a_.q_out,
                         ref::row_offset(p_, s, KvSlot::kQOut, h, s.first_row + i));
        }
      }
    }
    const auto& stride = p_.strides(KvSlot::kQOut);
    for (int64_t b = 0; b < shape[0]; ++b) {
      for (int64_t i = 0; i < shape[2]; ++i) {
        if (filled[b * shape[2] + i]) continue;
        for (int64_t n = 0; n < shape[1] * shape[3]; ++n) {
          const int64_t h = n / shape[3], d = n % shape[3];
          const double got = load_as_double(a_.q_out, p_.dtype, b * stride[0] + h * stride[1] + i * stride[2] + d);
          verdict.compare_exact({b, h, i, d}, got, 0, "as no sequence has this row");
        }
      }
    }
    return verdict.finish(kSmallest * largest_);
  }

  const KvAppendProblem& before_problem_;
  const KvAppendArgs& before_;
  const KvAppendProblem& p_;
  const KvAppendArgs& a_;
  std::vector<ref::Append> appends_;
  int64_t keys_per_row_;
  std::vector<bool> written_;  // (cache row or page, key in it)
  double largest_ = 0;
  std::vector<double> want_;
  std::vector<float> plain_;
};

}  // namespace

Report judge_kv_append(const KvAppendProblem& before_problem, const KvAppendArgs& before,
                       const KvAppendProblem& after_problem, const KvAppendArgs& after) {
  return KvAppendJudge(before_problem, before, after_problem, after).report();
}

}  // namespace heed::check
