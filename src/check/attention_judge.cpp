// The judge of attention: the reference and the plain formula, row by row, beside what the run wrote.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <set>

#include "check/bound.h"
#include "check/random.h"
#include "check/tensor_judge.h"
#include "ref/attention.h"

namespace heed::check {
namespace {

constexpr int64_t kSampledRows = 256;
constexpr int64_t kSampledSequences = 64;  // of which the first and last row are judged
constexpr int64_t kTileEdges = 128;        // rows beside multiples of 64, in one sequence and head
constexpr double kSmallest = 0x1p-20;
constexpr size_t kMostKept = size_t{32} << 20;  // numbers that are kept for the next run, 12 bytes each

using ref::AttentionRows;
using ref::Sequence;

class AttentionJudge {
 public:
  // `keeps`: `expected` is for later runs too.
  AttentionJudge(const AttentionProblem& problem, const AttentionArgs& args, Expected& expected, bool keeps)
      : p_(problem),
        a_(args),
        sequences_(ref::sequences_of(problem, args)),
        exact_(problem, args),
        plain_(problem, args),
        expected_(expected),
        keeps_(keeps) {
    for (const Slot slot : {Slot::kOut, Slot::kLse, Slot::kDq, Slot::kDk, Slot::kDv, Slot::kDbias}) {
      if (is_output(slot)) judge(slot).emplace(std::string(slot_name(slot)), slot_dtype(p_, slot), index_names(slot));
    }
  }

  Report report() {
    check_everywhere();
    if (p_.pass == Pass::kForward) {
      compare_forward();
    } else {
      compare_backward();
    }
    if (!expected_.complete) expected_.magnitudes = exact_.magnitudes();
    expected_.complete = expected_.complete || keeps_;
    return finish();
  }

 private:
  std::optional<TensorJudge>& judge(Slot slot) { return judges_[static_cast<int>(slot)]; }

  bool is_output(Slot slot) const {
    if (!has_slot(p_, slot)) return false;
    return (slot == Slot::kOut || slot == Slot::kLse) == (p_.pass == Pass::kForward);
  }

  static std::string index_names(Slot slot) {
    if (slot == Slot::kLse) return "bhi";
    if (slot == Slot::kDbias) return "bhij";
    return slot == Slot::kDk || slot == Slot::kDv ? "bhjd" : "bhid";
  }

  const void* data(Slot slot) const {
    switch (slot) {
      case Slot::kOut: return a_.out;
      case Slot::kLse: return a_.lse;
      case Slot::kDq: return a_.dq;
      case Slot::kDk: return a_.dk;
      case Slot::kDv: return a_.dv;
      default: return a_.dbias;
    }
  }

  // ---- every element: written, and padding 0 or -inf --------------------------------------------------------------

  // Rows (of b and s, as q or k has them) that belong to a sequence.
  std::vector<bool> owned_rows(bool keys) const {
    const std::array<int64_t, 4> shape = slot_shape(p_, keys ? Slot::kK : Slot::kQ);
    std::vector<bool> owned(shape[0] * shape[2]);
    for (const Sequence& s : sequences_) {
      const int64_t first = keys ? s.kv_batch * shape[2] + s.first_key : s.q_batch * shape[2] + s.first_row;
      for (int64_t n = 0; n < (keys ? s.num_keys : s.num_rows); ++n) owned[first + n] = true;
    }
    return owned;
  }

  void check_everywhere() {
    std::vector<bool> owned;
    for (const Slot slot : {Slot::kOut, Slot::kLse, Slot::kDq, Slot::kDk, Slot::kDv, Slot::kDbias}) {
      if (!is_output(slot)) continue;
      if (slot != Slot::kDbias) owned = owned_rows(slot == Slot::kDk || slot == Slot::kDv);
      check_slot(slot, owned);
    }
  }

  void check_slot(Slot slot, const std::vector<bool>& owned) {
    const std::array<int64_t, 4> shape = slot_shape(p_, slot);
    const auto& stride = p_.strides(slot);
    const Dtype dtype = slot_dtype(p_, slot);
    const double empty = slot == Slot::kLse ? -std::numeric_limits<double>::infinity() : 0.0;
    TensorJudge& verdict = *judge(slot);
    for (int64_t b = 0; b < shape[0]; ++b) {
      for (int64_t h = 0; h < shape[1]; ++h) {
        for (int64_t s = 0; s < shape[2]; ++s) {
          const bool padding = slot != Slot::kDbias && !owned[b * shape[2] + s];
          for (int64_t d = 0; d < shape[3]; ++d) {
            const int64_t offset = b * stride[0] + h * stride[1] + s * stride[2] + d * stride[3];
            if (is_poison(data(slot), dtype, offset)) verdict.never_written({b, h, s, d});
            if (!padding) continue;
            verdict.compare_exact({b, h, s, d}, load_as_double(data(slot), dtype, offset), empty,
                                  "as no sequence has this row");
          }
        }
      }
    }
  }

  // ---- which rows -------------------------------------------------------------------------------------------------

  bool whole() const {
    AttentionProblem forward = p_;
    forward.pass = Pass::kForward;
    return flops(forward) <= kWholeFlops;
  }

  using Row = std::array<int64_t, 3>;  // (b, h, i)

  std::set<Row> sampled_rows() const {
    std::set<Row> rows;
    std::vector<int64_t> filled;
    for (const Sequence& s : sequences_) {
      if (s.num_rows > 0) filled.push_back(s.b);
    }
    if (filled.empty()) return rows;
    Random random(1, "rows");
    const auto last = static_cast<int64_t>(filled.size()) - 1;
    for (int64_t n = 0; n < kSampledRows; ++n) {
      const int64_t b = filled[random.integer(3 * n, 0, last)];
      rows.insert(
          {b, random.integer(3 * n + 1, 0, p_.nheads_q - 1), random.integer(3 * n + 2, 0, sequences_[b].num_rows - 1)});
    }
    for (int64_t n = 0; n < std::min(kSampledSequences, last + 1); ++n) {
      const int64_t b = filled[last < kSampledSequences ? n : random.integer(n, 0, last)];
      rows.insert({b, n % p_.nheads_q, 0});
      rows.insert({b, n % p_.nheads_q, sequences_[b].num_rows - 1});
    }
    const int64_t b = filled[random.integer(0, 0, last)], h = random.integer(1, 0, p_.nheads_q - 1);
    for (int64_t edge = 0; edge < kTileEdges; ++edge) {
      const int64_t i = 64 * ((edge + 1) / 2) - (edge % 2);
      if (i < sequences_[b].num_rows) rows.insert({b, h, i});
    }
    return rows;
  }

  template <class Body>
  void for_each_row(const Sequence& s, int64_t hkv, Body&& body) {
    for (int64_t h = hkv * p_.gqa_ratio(); h < (hkv + 1) * p_.gqa_ratio(); ++h) {
      for (int64_t i = 0; i < s.num_rows; ++i) body(h, i);
    }
  }

  void select(const Sequence& s, int64_t hkv) {
    if (expected_.complete) return;
    exact_.select(s, hkv);
    plain_.select(s, hkv);
  }

  // want_ and plain_want_, `size` numbers of each: as they were kept, or as work_out() leaves them there.
  template <class WorkOut>
  void next(int64_t size, WorkOut&& work_out) {
    const auto count = static_cast<size_t>(size);
    want_.resize(count);
    plain_want_.resize(count);
    if (expected_.complete) {
      std::copy_n(expected_.want.begin() + static_cast<std::ptrdiff_t>(place_), count, want_.begin());
      std::copy_n(expected_.plain.begin() + static_cast<std::ptrdiff_t>(place_), count, plain_want_.begin());
      place_ += count;
      return;
    }
    work_out();
    if (!keeps_) return;
    if (expected_.want.size() + count > kMostKept) {
      keeps_ = false;
      expected_.want = {}, expected_.plain = {};
      return;
    }
    expected_.want.insert(expected_.want.end(), want_.begin(), want_.end());
    expected_.plain.insert(expected_.plain.end(), plain_want_.begin(), plain_want_.end());
  }

  // ---- forward ----------------------------------------------------------------------------------------------------

  void compare_forward() {
    if (!whole()) {
      int64_t b = -1, hkv = -1;
      for (const auto& [row_b, h, i] : sampled_rows()) {
        if (row_b != b || h / p_.gqa_ratio() != hkv) {
          b = row_b;
          hkv = h / p_.gqa_ratio();
          select(sequences_[b], hkv);
        }
        compare_row(sequences_[b], h, i);
      }
      return;
    }
    for (const Sequence& s : sequences_) {
      for (int64_t hkv = 0; hkv < p_.nheads_kv && s.num_rows > 0; ++hkv) {
        select(s, hkv);
        for_each_row(s, hkv, [&](int64_t h, int64_t i) { compare_row(s, h, i); });
      }
    }
  }

  void compare_row(const Sequence& s, int64_t h, int64_t i) {
    next(p_.head_dim_v + 1, [&] {
      want_[p_.head_dim_v] = exact_.forward(h, i, want_.data());
      plain_.forward(h, i, plain_want_.data());
    });
    const double lse = want_[p_.head_dim_v];
    compare_vector(Slot::kOut, row_offset(p_, s, Slot::kOut, h, i), {s.b, h, i, 0}, want_.data(), plain_want_.data());
    if (!p_.lse) return;
    const double got = load_as_double(a_.lse, slot_dtype(p_, Slot::kLse), row_offset(p_, s, Slot::kLse, h, i));
    judge(Slot::kLse)->compare_within({s.b, h, i, 0}, got, lse, 1e-4 + 1e-5 * std::fabs(lse));
  }

  void compare_vector(Slot slot, int64_t offset, Place place, const double* want, const float* plain) {
    const Dtype dtype = slot_dtype(p_, slot);
    const int64_t width = slot_shape(p_, slot)[3];
    for (int64_t d = 0; d < width; ++d) {
      place[3] = d;
      judge(slot)->compare(place, load_as_double(data(slot), dtype, offset + d), want[d], rounded_to(dtype, plain[d]));
    }
  }

  // ---- backward ---------------------------------------------------------------------------------------------------

  // A column of dk or dv needs every row of its kv head: a sample is whole (sequence, kv head) pairs. Sums over the
  // batch need all.
  std::vector<std::pair<int64_t, int64_t>> groups() const {
    std::vector<std::pair<int64_t, int64_t>> all;
    for (const Sequence& s : sequences_) {
      for (int64_t hkv = 0; hkv < p_.nheads_kv; ++hkv) {
        if (s.num_rows > 0 || s.num_keys > 0) all.emplace_back(s.b, hkv);
      }
    }
    if (whole() || p_.dbias || p_.dsinks || p_.dalibi || all.size() <= 1) return all;
    AttentionProblem forward = p_;
    forward.pass = Pass::kForward;
    const auto wanted = static_cast<size_t>(kWholeFlops / flops(forward) * static_cast<double>(all.size()));
    std::set<std::pair<int64_t, int64_t>> some = {all.front()};
    if (wanted > 1) some.insert(all.back());
    Random random(1, "groups");
    for (size_t n = 0; some.size() < wanted && n < 4 * all.size(); ++n) {
      some.insert(all[random.integer(static_cast<int64_t>(n), 0, static_cast<int64_t>(all.size()) - 1)]);
    }
    return {some.begin(), some.end()};
  }

  void compare_backward() {
    for (const auto& [b, hkv] : groups()) {
      const Sequence& s = sequences_[b];
      select(s, hkv);
      for_each_row(s, hkv, [&](int64_t h, int64_t i) {
        next(p_.head_dim, [&] {
          exact_.backward(h, i, want_.data(), expected_.sums);
          plain_.backward(h, i, plain_want_.data(), expected_.plain_sums);
        });
        if (!p_.dq) return;
        compare_vector(Slot::kDq, row_offset(p_, s, Slot::kDq, h, i), {s.b, h, i, 0}, want_.data(), plain_want_.data());
      });
      for (int64_t j = 0; j < s.num_keys; ++j) {
        if (p_.dk) compare_key(s, Slot::kDk, hkv, j);
        if (p_.dv) compare_key(s, Slot::kDv, hkv, j);
      }
    }
    if (p_.dbias) compare_dbias();
  }

  void compare_key(const Sequence& s, Slot slot, int64_t hkv, int64_t j) {
    next(slot_shape(p_, slot)[3], [&] {
      const auto rows = [&](const auto& of) { return slot == Slot::kDk ? of.dk(j) : of.dv(j); };
      std::copy_n(rows(exact_), want_.size(), want_.begin());
      std::copy_n(rows(plain_), plain_want_.size(), plain_want_.begin());
    });
    compare_vector(slot, key_offset(p_, s, slot, hkv, j), {s.b, hkv, j, 0}, want_.data(), plain_want_.data());
  }

  void compare_dbias() {
    const std::array<int64_t, 4> shape = slot_shape(p_, Slot::kDbias);
    const auto& stride = p_.strides(Slot::kDbias);
    const Dtype dtype = slot_dtype(p_, Slot::kDbias);
    for (size_t n = 0; n < expected_.sums.dbias.size(); ++n) {
      auto rest = static_cast<int64_t>(n);
      Place place = {};
      int64_t offset = 0;
      for (int dim = 3; dim >= 0; --dim) {
        place[dim] = rest % shape[dim];
        rest /= shape[dim];
        offset += place[dim] * stride[dim];
      }
      judge(Slot::kDbias)
          ->compare(place, load_as_double(a_.dbias, dtype, offset), expected_.sums.dbias[n],
                    rounded_to(dtype, expected_.plain_sums.dbias[n]));
    }
  }

  // ---- the report -------------------------------------------------------------------------------------------------

  void finish_slot(Slot slot, double largest, Report& report, double of_one = 0) {
    if (judge(slot)) report.tensors.push_back(judge(slot)->finish(kSmallest * largest, of_one, p_.head_dim));
  }

  // dsinks, dalibi_slopes: [nheads_q] or [batch][nheads_q].
  void finish_vector(const char* name, const void* memory, const std::vector<double>& want,
                     const std::vector<float>& plain, double largest, Report& report) {
    if (memory == nullptr) return;
    const bool per_batch = static_cast<int64_t>(want.size()) > p_.nheads_q;
    const Dtype dtype = p_.out_dtype == Dtype::kF64 ? Dtype::kF64 : Dtype::kF32;
    TensorJudge verdict(name, dtype, per_batch ? "bh" : "h");
    for (int64_t n = 0; n < static_cast<int64_t>(want.size()); ++n) {
      const Place place = per_batch ? Place{n / p_.nheads_q, n % p_.nheads_q, 0, 0} : Place{n, 0, 0, 0};
      if (is_poison(memory, dtype, n)) verdict.never_written(place);
      verdict.compare(place, load_as_double(memory, dtype, n), want[n], rounded_to(dtype, plain[n]));
    }
    report.tensors.push_back(verdict.finish(kSmallest * largest));
  }

  Report finish() {
    Report report;
    const ref::Magnitudes& largest = expected_.magnitudes;
    const double scale = std::fabs(static_cast<double>(a_.softmax_scale));
    finish_slot(Slot::kOut, largest.v * (1 + largest.turn), report);
    finish_slot(Slot::kLse, 0, report);
    // dS is rounded to the inputs' dtype before it is multiplied.
    const double one = dtype_bytes(p_.dtype) == 2 ? scale * ulp(p_.dtype, largest.multiplied_ds) : 0.0;
    finish_slot(Slot::kDq, scale * largest.ds * largest.k, report, one * largest.k);
    finish_slot(Slot::kDk, scale * largest.ds * largest.q, report, one * largest.q);
    finish_slot(Slot::kDv, largest.p * largest.dout, report);
    finish_slot(Slot::kDbias, (p_.bias_dims & kDimJ) != 0 ? largest.ds : largest.ds_of_row, report);
    if (p_.dsinks) {
      finish_vector("dsinks", a_.dsinks, expected_.sums.dsinks, expected_.plain_sums.dsinks, largest.dsink, report);
    }
    if (p_.dalibi) {
      finish_vector("dalibi_slopes", a_.dalibi_slopes, expected_.sums.dalibi, expected_.plain_sums.dalibi,
                    largest.dalibi, report);
    }
    if (a_.status != nullptr) {
      TensorJudge verdict("status", Dtype::kI32, "b");
      for (const Sequence& s : sequences_) {
        verdict.compare_exact({s.b, 0, 0, 0}, a_.status[s.b], s.status, "for this sequence's data");
      }
      report.tensors.push_back(verdict.finish(0));
    }
    return report;
  }

  const AttentionProblem& p_;
  const AttentionArgs& a_;
  std::vector<Sequence> sequences_;
  AttentionRows<double> exact_;
  AttentionRows<float> plain_;
  Expected& expected_;
  bool keeps_;        // `expected_` has all there was so far
  size_t place_ = 0;  // of the next number in it
  std::array<std::optional<TensorJudge>, kNumSlots> judges_;
  std::vector<double> want_;
  std::vector<float> plain_want_;
};

}  // namespace

Report judge_attention(const AttentionProblem& problem, const AttentionArgs& args, std::optional<Expected>* kept) {
  if (kept == nullptr) {
    Expected once(problem);
    return AttentionJudge(problem, args, once, false).report();
  }
  const Fingerprint now = fingerprint(problem, args);
  if (!kept->has_value() || !(*kept)->complete || (*kept)->of != now) {
    kept->emplace(problem).of = now;  // what was too much to keep may have left a part
  }
  return AttentionJudge(problem, args, **kept, true).report();
}

}  // namespace heed::check
