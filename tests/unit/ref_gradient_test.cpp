// The reference's gradients against central differences of its own forward pass, in double precision, all features of a
// line together. (tests/python/test_reference_numpy.py compares both passes with an independent formula.)
#include <gtest/gtest.h>

#include <cmath>

#include "base/dtype.h"
#include "heed/heed.h"

namespace heed {
namespace {

struct Element {
  const heed_tensor& tensor;
  int64_t offset;
  double get() const { return load_as_double(tensor.data, static_cast<Dtype>(tensor.dtype), offset); }
  void set(double x) const { store_from_double(tensor.data, static_cast<Dtype>(tensor.dtype), offset, x); }
};

template <class Body>
void for_each_element(const heed_tensor& t, Body&& body) {
  int64_t shape[4] = {1, 1, 1, 1};
  for (int32_t dim = 0; dim < t.ndim; ++dim) shape[dim] = t.shape[dim];
  for (int64_t a = 0; a < shape[0]; ++a) {
    for (int64_t b = 0; b < shape[1]; ++b) {
      for (int64_t c = 0; c < shape[2]; ++c) {
        for (int64_t d = 0; d < shape[3]; ++d) body(a, b, c, d);
      }
    }
  }
}

Element at(const heed_tensor& t, int64_t a, int64_t b, int64_t c, int64_t d) {
  return {t, a * t.stride[0] + b * t.stride[1] + c * t.stride[2] + d * t.stride[3]};
}

class Gradients {
 public:
  explicit Gradients(const std::string& line) {
    EXPECT_EQ(heed_inputs_create(line.c_str(), &inputs_), HEED_OK) << heed_last_error();
    args_ = heed_inputs_attention(inputs_);
    EXPECT_EQ(heed_attention(args_, &kRef), HEED_OK) << heed_last_error();
    forward_ = *args_;
    forward_.pass = HEED_PASS_FORWARD;
    forward_.dout = forward_.dlse = forward_.dq = forward_.dk = forward_.dv = {};
    forward_.dbias = forward_.dsinks = forward_.dalibi_slopes = forward_.status = {};
  }
  ~Gradients() { heed_inputs_destroy(inputs_); }
  const heed_attention_args& args() const { return *args_; }

  // sum of out * dout + lse * dlse over what some row shows
  double loss() {
    EXPECT_EQ(heed_attention(&forward_, &kRef), HEED_OK) << heed_last_error();
    return product(forward_.out, args_->dout) + product(forward_.lse, args_->dlse);
  }

  void expect(const heed_tensor& input, const heed_tensor& gradient, double step) {
    for_each_element(input, [&](int64_t a, int64_t b, int64_t c, int64_t d) {
      const Element x = at(input, a, b, c, d);
      const double kept = x.get();
      if (std::isnan(kept)) return;  // no sequence shows it
      x.set(kept + step);
      const double up = x.get(), above = loss();
      x.set(kept - step);
      const double down = x.get(), below = loss();
      x.set(kept);
      const double want = (above - below) / (up - down);
      ASSERT_NEAR(at(gradient, a, b, c, d).get(), want, 1e-6 * (1 + std::fabs(want)))
          << "[" << a << "," << b << "," << c << "," << d << "]";
    });
  }

 private:
  static double product(const heed_tensor& x, const heed_tensor& y) {
    double sum = 0;
    if (y.dtype == HEED_DTYPE_NONE) return sum;
    for_each_element(x, [&](int64_t a, int64_t b, int64_t c, int64_t d) {
      const double term = at(x, a, b, c, d).get() * at(y, a, b, c, d).get();
      if (std::isfinite(term)) sum += term;
    });
    return sum;
  }

  static constexpr heed_plan_options kRef = {sizeof(heed_plan_options), "ref"};
  heed_inputs* inputs_ = nullptr;
  heed_attention_args* args_ = nullptr;
  heed_attention_args forward_;
};

class RefGradient : public ::testing::TestWithParam<const char*> {};

TEST_P(RefGradient, IsTheDerivativeOfTheForwardPass) {
  Gradients g(std::string("attention f64 pass=bwd dlse ") + GetParam());
  const heed_attention_args& a = g.args();
  g.expect(a.q, a.dq, 1e-5);
  g.expect(a.k, a.dk, 1e-5);
  g.expect(a.v, a.dv, 1e-5);
  if (a.bias.dtype != HEED_DTYPE_NONE) g.expect(a.bias, a.dbias, 1e-5);
  if (a.sinks.dtype != HEED_DTYPE_NONE) g.expect(a.sinks, a.dsinks, 1e-3);  // f32: steps that it can hold
  if (a.alibi_slopes.dtype != HEED_DTYPE_NONE) g.expect(a.alibi_slopes, a.dalibi_slopes, 1e-4);
}

INSTANTIATE_TEST_SUITE_P(
    Lines, RefGradient,
    ::testing::Values(
        "b=2 hq=2 hkv=1 sq=3 sk=4 d=3 dv=2", "b=1 hq=2 sq=5 sk=3 d=3 causal sinks",
        "b=2 hq=4 hkv=2 sq=4 sk=5 d=3 dv=4 window=3,1 softcap softcap_value=2 alibi bias=f64:hij sinks dropout p=0.2 "
        "mask=bij",
        "b=2 hq=2 sq=4 sk=6 d=3 layout_q=bhsd layout_kv=bhsd causal chunk=4 alibi=bh bias=f64:j sinks dropout p=0.3 "
        "used_q used_k leftpad lq=4,3 lk=6,5 lpad=1,2",
        "b=3 hq=4 hkv=2 tq=9 tk=11 sq=5 sk=5 d=4 layout_q=thd layout_kv=thd lq=3,0,5 lk=2,4,5 causal softcap "
        "softcap_value=1.5 scale=-0.8 bias=f64:hi sinks"));

}  // namespace
}  // namespace heed
