#include "plan/registry.h"

namespace heed {

// The rows are defined by their backends; every row exists on every architecture and declines where it cannot run.
extern const Impl<AttentionProblem> kCpuAttentionFwdAmx;
extern const Impl<AttentionProblem> kCpuAttentionFwdAvx512Bf16;
extern const Impl<AttentionProblem> kCpuAttentionFwdAvx512;
extern const Impl<AttentionProblem> kCpuAttentionFwdAvx2;
extern const Impl<AttentionProblem> kCpuAttentionFwdNeon;
extern const Impl<AttentionProblem> kCpuAttentionFwdGeneric;
extern const Impl<AttentionProblem> kCpuAttentionBwdAvx512;
extern const Impl<AttentionProblem> kCpuAttentionBwdAvx2;
extern const Impl<AttentionProblem> kCpuAttentionBwdNeon;
extern const Impl<AttentionProblem> kCpuAttentionBwdGeneric;
extern const Impl<AttentionProblem> kCudaAttentionDecodeSm90;
extern const Impl<AttentionProblem> kCudaAttentionDecodeSm80;
extern const Impl<AttentionProblem> kCudaAttentionFwdSm90;
extern const Impl<AttentionProblem> kCudaAttentionFwdSm80;
extern const Impl<AttentionProblem> kCudaAttentionFwdPortable;
extern const Impl<AttentionProblem> kRefAttention;

extern const Impl<KvAppendProblem> kCpuKvAppend;
extern const Impl<KvAppendProblem> kCudaKvAppend;
extern const Impl<KvAppendProblem> kRefKvAppend;

template <>
std::span<const Impl<AttentionProblem>* const> impls<AttentionProblem>() {
  static constexpr const Impl<AttentionProblem>* kRows[] = {
      &kCpuAttentionFwdAmx,   &kCpuAttentionFwdAvx512Bf16, &kCpuAttentionFwdAvx512,    &kCpuAttentionFwdAvx2,
      &kCpuAttentionFwdNeon,  &kCpuAttentionFwdGeneric,    &kCpuAttentionBwdAvx512,    &kCpuAttentionBwdAvx2,
      &kCpuAttentionBwdNeon,  &kCpuAttentionBwdGeneric,    &kCudaAttentionDecodeSm90,  &kCudaAttentionDecodeSm80,
      &kCudaAttentionFwdSm90, &kCudaAttentionFwdSm80,      &kCudaAttentionFwdPortable, &kRefAttention,
  };
  return kRows;
}

template <>
std::span<const Impl<KvAppendProblem>* const> impls<KvAppendProblem>() {
  static constexpr const Impl<KvAppendProblem>* kRows[] = {&kCpuKvAppend, &kCudaKvAppend, &kRefKvAppend};
  return kRows;
}

}  // namespace heed
