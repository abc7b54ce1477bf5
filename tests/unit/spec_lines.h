// What the tests of docs/conventions.md share: a line run on every row of the registry, elements of its tensors, and
// which keys a query sees.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "unit/line_run.h"

namespace heed::testing {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// Element (a, b, c, d) of a tensor in its own dimension order.
inline double get(const heed_tensor& t, int64_t a, int64_t b = 0, int64_t c = 0, int64_t d = 0) {
  const int64_t offset = a * t.stride[0] + b * t.stride[1] + c * t.stride[2] + d * t.stride[3];
  return load_as_double(t.data, static_cast<Dtype>(t.dtype), offset);
}

inline void set(const heed_tensor& t, double value, int64_t a, int64_t b = 0, int64_t c = 0, int64_t d = 0) {
  const int64_t offset = a * t.stride[0] + b * t.stride[1] + c * t.stride[2] + d * t.stride[3];
  store_from_double(t.data, static_cast<Dtype>(t.dtype), offset, value);
}

// Every element: value(a, b, c, d).
inline void fill(const heed_tensor& t, const std::function<double(int64_t, int64_t, int64_t, int64_t)>& value) {
  const auto extent = [&](int dim) { return dim < t.ndim ? t.shape[dim] : 1; };
  for (int64_t a = 0; a < extent(0); ++a) {
    for (int64_t b = 0; b < extent(1); ++b) {
      for (int64_t c = 0; c < extent(2); ++c) {
        for (int64_t d = 0; d < extent(3); ++d) set(t, value(a, b, c, d), a, b, c, d);
      }
    }
  }
}

inline std::vector<double> values(const heed_tensor& t) {
  std::vector<double> found;
  if (t.dtype == HEED_DTYPE_NONE) return found;
  heed_tensor copy = t;
  fill(copy, [&](int64_t a, int64_t b, int64_t c, int64_t d) {
    found.push_back(get(t, a, b, c, d));
    return found.back();
  });
  return found;
}

inline int32_t& number(const heed_tensor& t, int64_t n) { return static_cast<int32_t*>(t.data)[n]; }

using Args = heed_attention_args;

// out and lse of a backward line, again after its inputs were changed.
inline void redo_forward(Args& args) {
  Args forward = args;
  forward.pass = HEED_PASS_FORWARD;
  forward.dout = forward.dlse = forward.dq = forward.dk = forward.dv = {};
  forward.dbias = forward.dsinks = forward.dalibi_slopes = forward.status = {};
  const heed_plan_options options = {sizeof(heed_plan_options), "ref"};
  ASSERT_EQ(heed_attention(&forward, &options), HEED_OK) << heed_last_error();
}

// Runs `line`, its inputs changed by `prepare`, on every row that accepts it; `look` sees the results of each.
inline void on_every_row(const std::string& line, const std::function<void(Args&)>& prepare,
                         const std::function<void(Args&)>& look, bool judged = true, const RunStyle& style = {}) {
  SCOPED_TRACE(line);
  LineRun probe(line);
  ASSERT_EQ(probe.error(), "");
  const std::vector<std::string> rows = probe.accepting();
  ASSERT_GE(rows.size(), 2u) << "the reference and no other";
  for (const std::string& row : rows) {
    SCOPED_TRACE(row);
    LineRun run(line);
    if (prepare) prepare(*run.attention());
    if (run.attention()->pass == HEED_PASS_BACKWARD && prepare) redo_forward(*run.attention());
    ASSERT_EQ(run.run(row, style), "");
    if (judged) {
      EXPECT_EQ(run.judge(), "");
    }
    if (look) look(*run.attention());
  }
}

inline void all_zero(const heed_tensor& t) {
  fill(t, [](int64_t, int64_t, int64_t, int64_t) { return 0.0; });
}

// Scores all 0 and value j in v's element j (bshd, no pages): out is the mean of the keys that are visible, lse the log
// of how many there are. visible(b, h, i, j) says which, j counting from the sequence's first key.
inline void expect_visible(const std::string& line,
                           const std::function<bool(int64_t, int64_t, int64_t, int64_t)>& visible) {
  on_every_row(
      line + " lse",
      [](Args& a) {
        all_zero(a.q);
        fill(a.v, [&](int64_t b, int64_t j, int64_t, int64_t) {
          return static_cast<double>(j - (a.leftpad_k.data != nullptr ? number(a.leftpad_k, b) : 0));
        });
      },
      [&](Args& a) {
        const int64_t sk = a.k.shape[1];
        for (int64_t b = 0; b < a.q.shape[0]; ++b) {
          for (int64_t h = 0; h < a.q.shape[2]; ++h) {
            for (int64_t i = 0; i < a.q.shape[1]; ++i) {
              double count = 0, sum = 0;
              for (int64_t j = 0; j < sk; ++j) {
                if (visible(b, h, i, j)) count += 1, sum += static_cast<double>(j);
              }
              const double want = count > 0 ? sum / count : 0;
              ASSERT_NEAR(get(a.out, b, i, h), want, 1e-4 * (1 + want)) << "b=" << b << " h=" << h << " i=" << i;
              const double lse = get(a.lse, b, h, i);
              if (count == 0) {
                ASSERT_EQ(lse, -kInf) << "b=" << b << " h=" << h << " i=" << i;
              } else {
                ASSERT_NEAR(lse, std::log(count), 1e-4) << "b=" << b << " h=" << h << " i=" << i;
              }
            }
          }
        }
      });
}

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

}  // namespace heed::testing
