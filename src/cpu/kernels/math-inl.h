// exp2 and tanh on vectors of f32, made for softmax: NaN stays NaN, no denormal ever comes out of exp2.
// Compiled once per instruction set: include inside a foreach_target file, after hwy/highway.h.
#if defined(HEED_CPU_KERNELS_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_CPU_KERNELS_MATH_INL_H_
#undef HEED_CPU_KERNELS_MATH_INL_H_
#else
#define HEED_CPU_KERNELS_MATH_INL_H_
#endif

#include "cpu/kernels/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::cpu::HWY_NAMESPACE {

// 2^x for x <= 127, relative error 1.2e-7. Exactly 0 below -126, -inf included: a denormal probability costs a
// multiply-add some 50 times its price on Intel. +inf gives NaN. 2^r on [-1/2, 1/2] is a degree-5 minimax polynomial
// with constant term 1, so x = 0 gives exactly 1.
HWY_INLINE F32 exp2_score(F32 x) {
  const F32Tag f;
  const I32Tag i;
  // 1.5 * 2^23 + 127: adding it rounds to an integer n, and n + 127 stands in the low bits: the exponent of 2^n.
  const F32 magic = hn::Set(f, 12583039.0f);
  const F32 shifted = hn::Add(x, magic);
  const F32 r = hn::Sub(x, hn::Sub(shifted, magic));
  F32 y = hn::MulAdd(hn::Set(f, 1.326472721e-3f), r, hn::Set(f, 9.671512812e-3f));
  y = hn::MulAdd(y, r, hn::Set(f, 5.550733745e-2f));
  y = hn::MulAdd(y, r, hn::Set(f, 2.402224208e-1f));
  y = hn::MulAdd(y, r, hn::Set(f, 6.931469776e-1f));
  y = hn::MulAdd(y, r, hn::Set(f, 1.0f));
  // 2^n as a factor, not added into y's exponent: NaN times anything stays NaN, whatever its payload.
  const auto exponent = hn::ShiftLeft<23>(hn::BitCast(i, shifted));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(f, -126.0f)), hn::Mul(y, hn::BitCast(f, exponent)));
}

// tanh(x), relative error 3e-7: an odd polynomial near 0, where 1 - 2/(e^2x + 1) would cancel, else that form.
HWY_INLINE F32 tanh_score(F32 x) {
  const F32Tag f;
  const F32 a = hn::Abs(x), a2 = hn::Mul(x, x);
  F32 p = hn::MulAdd(hn::Set(f, -5.717042986e-3f), a2, hn::Set(f, 2.065058560e-2f));
  p = hn::MulAdd(p, a2, hn::Set(f, -5.374349762e-2f));
  p = hn::MulAdd(p, a2, hn::Set(f, 1.333149128e-1f));
  p = hn::MulAdd(p, a2, hn::Set(f, -3.333328393e-1f));
  const F32 near = hn::MulAdd(hn::Mul(p, a2), a, a);
  // From e^-2|x|, which does not overflow: (1 - e) / (1 + e).
  const F32 e = exp2_score(hn::Mul(a, hn::Set(f, -2.885390082f)));
  const F32 far = hn::Div(hn::Sub(hn::Set(f, 1.0f), e), hn::Add(hn::Set(f, 1.0f), e));
  return hn::CopySign(hn::IfThenElse(hn::Lt(a, hn::Set(f, 0.625f)), near, far), x);
}

}  // namespace heed::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include guard, flipped per target
