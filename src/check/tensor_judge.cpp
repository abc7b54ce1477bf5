#include "check/tensor_judge.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/format.h"

namespace heed::check {

double rounded_to(Dtype dtype, double x) {
  alignas(8) unsigned char memory[8];
  store_from_double(memory, dtype, 0, x);
  return load_as_double(memory, dtype, 0);
}

double ulp(Dtype dtype, double x) {
  int mantissa_bits = 52, least_exponent = -1022;
  if (dtype == Dtype::kF32) mantissa_bits = 23, least_exponent = -126;
  if (dtype == Dtype::kF16) mantissa_bits = 10, least_exponent = -14;
  if (dtype == Dtype::kBf16) mantissa_bits = 7, least_exponent = -126;
  const int exponent = x != 0 && std::isfinite(x) ? std::max(std::ilogb(x), least_exponent) : least_exponent;
  return std::ldexp(1.0, exponent - mantissa_bits);
}

bool is_poison(const void* data, Dtype dtype, int64_t offset) {
  static constexpr unsigned char kOnes[8] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff};
  const int64_t width = dtype_bytes(dtype);
  return std::memcmp(static_cast<const unsigned char*>(data) + offset * width, kOnes, width) == 0;
}

TensorJudge::TensorJudge(std::string name, Dtype dtype, std::string index_names)
    : name_(std::move(name)), dtype_(dtype), index_names_(std::move(index_names)) {}

std::string TensorJudge::text(const Place& place) const {
  std::string result = name_ + "[";
  for (size_t n = 0; n < index_names_.size(); ++n) {
    result += heed::format("{}{}={}", n > 0 ? "," : "", index_names_[n], place[n]);
  }
  return result + "]";
}

void TensorJudge::fail(std::string reason) {
  if (reason_.empty()) reason_ = std::move(reason);
}

// NaN and Inf stand where the reference has them; where that is Inf, NaN may stand. True: nothing left to compare.
bool TensorJudge::compare_special(const Place& place, double got, double want) {
  ++count_;
  const bool overflows = std::isinf(rounded_to(dtype_, want));  // what the tensor's dtype cannot hold is Inf there
  const bool finite = std::isfinite(want) && !overflows;
  if (finite && std::isfinite(got)) return false;
  const bool good = std::isnan(want) ? std::isnan(got)
                    : finite         ? false
                                     : std::isnan(got) || got == rounded_to(dtype_, want) ||
                                   (std::isfinite(want) && std::fabs(got) > std::fabs(want) / 2);
  if (good) return true;
  fail(heed::format("{} = {:.6g}: want {:.6g}", text(place), got, want));
  note(place, got, want, std::numeric_limits<double>::infinity(), std::numeric_limits<double>::infinity());
  return true;
}

void TensorJudge::note(const Place& place, double got, double want, double error, double excess) {
  max_error_ = std::max(max_error_, error);
  if (excess <= worst_excess_) return;
  worst_excess_ = excess;
  worst_ = place;
  worst_got_ = got;
  worst_want_ = want;
}

void TensorJudge::compare(const Place& place, double got, double want, double plain) {
  if (compare_special(place, got, want)) return;
  ++num_finite_;
  const double error = std::fabs(got - want);
  max_want_ = std::max(max_want_, std::fabs(want));
  sum_error_ += error * error;
  if (std::isfinite(plain)) {  // f32 may overflow where f64 does not: then it is no measure
    const double plain_error = std::fabs(plain - want);
    max_plain_ = std::max(max_plain_, plain_error);
    sum_plain_ += plain_error * plain_error;
  }
  note(place, got, want, error, error);
}

void TensorJudge::compare_within(const Place& place, double got, double want, double bound) {
  own_bounds_ = true;
  if (compare_special(place, got, want)) return;
  ++num_finite_;
  const double error = std::fabs(got - want);
  sum_error_ += error * error;
  sum_bound_ += bound * bound;
  if (error / bound > worst_excess_) worst_bound_ = bound;
  note(place, got, want, error, error / bound);
}

void TensorJudge::compare_exact(const Place& place, double got, double want, const char* why) {
  ++count_;
  if (got == want || (std::isnan(got) && std::isnan(want))) return;
  fail(heed::format("{} = {:.6g}: want {:.6g}, {}", text(place), got, want, why));
  note(place, got, want, std::fabs(got - want), std::numeric_limits<double>::infinity());
}

void TensorJudge::never_written(const Place& place) {
  fail(heed::format("{}: never written", text(place)));
  worst_ = place;
}

heed_check_tensor TensorJudge::finish(double smallest, double of_one, int64_t row_size) {
  heed_check_tensor result = {};
  result.struct_size = sizeof result;
  const double slack = ulp(dtype_, max_want_) + smallest;
  result.max_error = max_error_;
  result.max_bound = own_bounds_ ? worst_bound_ : 2 * max_plain_ + slack + of_one;
  result.norm_error = std::sqrt(sum_error_);
  result.norm_bound = own_bounds_ ? std::sqrt(sum_bound_)
                                  : 2 * std::sqrt(sum_plain_) + std::sqrt(static_cast<double>(num_finite_)) * slack +
                                        std::sqrt(static_cast<double>(row_size)) * of_one;
  const bool too_far = own_bounds_ ? worst_excess_ > 1 : max_error_ > result.max_bound;
  if (too_far) {
    const double worst_error = std::fabs(worst_got_ - worst_want_);
    fail(heed::format("{} = {:.6g}: want {:.6g}, error {:.2g} > bound {:.2g}", text(worst_), worst_got_, worst_want_,
                      worst_error, result.max_bound));
  }
  if (result.norm_error > result.norm_bound) {
    fail(heed::format("{}: error norm {:.3g} > bound {:.3g} over {} elements", name_, result.norm_error,
                      result.norm_bound, num_finite_));
  }
  result.passed = !failed();
  result.num_checked = count_;
  std::copy(worst_.begin(), worst_.end(), result.worst);
  result.worst_got = worst_got_;
  result.worst_want = worst_want_;
  name_.copy(result.name, sizeof result.name - 1);
  reason_.copy(result.reason, sizeof result.reason - 1);
  return result;
}

}  // namespace heed::check
