// The backward kernels, compiled once per instruction set.
#include "cpu/kernels/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/attention_bwd_kernels.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "cpu/kernels/attention_bwd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::cpu::HWY_NAMESPACE {

extern const BackwardKernels kBackward;
const BackwardKernels kBackward = {delta_rows, key_block, bias_part, narrow_dq};

}  // namespace heed::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed::cpu {

const BackwardKernels* backward_kernels_avx512() {
#if HWY_TARGETS & HWY_AVX3
  return &N_AVX3::kBackward;
#else
  return nullptr;
#endif
}

const BackwardKernels* backward_kernels_avx2() {
#if HWY_TARGETS & HWY_AVX2
  return &N_AVX2::kBackward;
#else
  return nullptr;
#endif
}

const BackwardKernels* backward_kernels_neon() {
#if HWY_TARGETS & HWY_NEON
  return &N_NEON::kBackward;
#else
  return nullptr;
#endif
}

const BackwardKernels* backward_kernels_generic() {
#if HWY_TARGETS & HWY_EMU128
  return &N_EMU128::kBackward;
#else
  return nullptr;
#endif
}

}  // namespace heed::cpu
#endif
