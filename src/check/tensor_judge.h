// One output tensor against the reference, element by element.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "base/dtype.h"
#include "heed/check.h"

namespace heed::check {

using Place = std::array<int64_t, 4>;

// A number as `dtype` holds it.
double rounded_to(Dtype dtype, double x);
// The gap between `x` and the next larger magnitude in `dtype`.
double ulp(Dtype dtype, double x);

class TensorJudge {
 public:
  // `index_names`: what the four numbers of a place are, one letter each ("bhid"), as many as the tensor has.
  TensorJudge(std::string name, Dtype dtype, std::string index_names);

  // `plain` is the plain formula's result, already rounded to the tensor's dtype.
  void compare(const Place& place, double got, double want, double plain);
  // An element with a bound of its own (lse).
  void compare_within(const Place& place, double got, double want, double bound);
  // An element whose value is prescribed: padding, integers, what must not change.
  void compare_exact(const Place& place, double got, double want, const char* why);
  // An element that still holds the NaN that outputs are filled with before a run (every bit 1).
  void never_written(const Place& place);

  bool failed() const { return !reason_.empty(); }
  // `smallest`: 2^-20 times the largest factor entering the sums. `of_one`: what one rounding of a factor to 16 bits is worth
  // in the elements of one row, which are `row_size`.
  heed_check_tensor finish(double smallest, double of_one = 0, int64_t row_size = 0);

 private:
  bool compare_special(const Place& place, double got, double want);
  void note(const Place& place, double got, double want, double error, double excess);
  std::string text(const Place& place) const;
  void fail(std::string reason);

  std::string name_;
  Dtype dtype_;
  std::string index_names_;
  std::string reason_;
  bool own_bounds_ = false;
  int64_t count_ = 0, num_finite_ = 0;
  double max_error_ = 0, max_plain_ = 0, max_want_ = 0;
  double sum_error_ = 0, sum_plain_ = 0, sum_bound_ = 0;  // of squares
  double worst_excess_ = -1, worst_bound_ = 0;
  Place worst_ = {};
  double worst_got_ = 0, worst_want_ = 0;
};

// Does the element hold the outputs' poison?
bool is_poison(const void* data, Dtype dtype, int64_t offset);

}  // namespace heed::check
