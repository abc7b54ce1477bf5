// What the tests of bad data share: where a line is computed, its tensors as the test can read them, their elements.
// HEED_TEST_DEVICE is the device of every line: the tests of the GPU compile those of bad data again.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <deque>
#include <functional>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "base/dtype.h"
#include "check/arg_tensors.h"
#include "unit/line_run.h"

#ifndef HEED_TEST_DEVICE
#define HEED_TEST_DEVICE "cpu"
#endif

namespace heed::testing {

constexpr int32_t kHuge = std::numeric_limits<int32_t>::max();
constexpr int32_t kLowest = std::numeric_limits<int32_t>::min();

class BadData : public ::testing::Test {
 protected:
  void SetUp() override {
    const heed_device device = std::string_view(HEED_TEST_DEVICE) == "cpu" ? HEED_DEVICE_CPU : HEED_DEVICE_CUDA;
    int32_t count = 0;
    if (heed_device_count(device, &count) != HEED_OK) GTEST_SKIP() << heed_last_error();
  }
};

inline std::string placed(const char* line) { return std::string(line) + " device=" HEED_TEST_DEVICE; }

// The arguments with tensors that this test can read: as they are now.
template <class Args>
struct OnHost {
  OnHost(const LineRun& problem, const Args& placed_args) : args(placed_args) {
    check::for_each_tensor(
        args, [&](const char*, heed_tensor& tensor) { tensor = problem.on_host(tensor, memory.emplace_back()); });
  }
  OnHost(const OnHost&) = delete;
  Args args;
  std::deque<std::vector<unsigned char>> memory;
};

inline int32_t* numbers(const heed_tensor& tensor) { return static_cast<int32_t*>(tensor.data); }

inline double element(const heed_tensor& tensor, int64_t offset) {
  return load_as_double(tensor.data, static_cast<Dtype>(tensor.dtype), offset);
}

// Every element of a tensor whose dimension `dim` is in [begin, end).
inline void for_each(const heed_tensor& tensor, int dim, int64_t begin, int64_t end,
                     const std::function<void(double)>& body) {
  int64_t shape[4] = {1, 1, 1, 1}, stride[4] = {};
  for (int32_t d = 0; d < tensor.ndim; ++d) shape[d] = tensor.shape[d], stride[d] = tensor.stride[d];
  for (int64_t a = 0; a < shape[0]; ++a) {
    for (int64_t b = 0; b < shape[1]; ++b) {
      for (int64_t c = 0; c < shape[2]; ++c) {
        for (int64_t d = 0; d < shape[3]; ++d) {
          const int64_t index[4] = {a, b, c, d};
          if (index[dim] < begin || index[dim] >= end) continue;
          body(element(tensor, a * stride[0] + b * stride[1] + c * stride[2] + d * stride[3]));
        }
      }
    }
  }
}

inline std::vector<double> elements(const heed_tensor& tensor, int dim, int64_t begin, int64_t end) {
  std::vector<double> found;
  if (tensor.dtype == HEED_DTYPE_NONE) return found;
  for_each(tensor, dim, begin, end, [&](double value) { found.push_back(value); });
  return found;
}

// NaN is the same as NaN: parts of a cache that nobody has written hold it.
inline bool same(const std::vector<double>& a, const std::vector<double>& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] != b[i] && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  }
  return true;
}

inline void expect_all(const heed_tensor& tensor, int dim, int64_t begin, int64_t end, double value, const char* name) {
  for (const double x : elements(tensor, dim, begin, end)) {
    if (x != value) {
      ADD_FAILURE() << name << " holds " << x << " where " << value << " belongs";
      return;
    }
  }
}

}  // namespace heed::testing
