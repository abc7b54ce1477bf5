// A small attention call over memory of its own, for tests of what surrounds the kernels.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "heed/heed.h"

namespace heed {

inline heed_tensor tensor_of(void* data, heed_dtype dtype, std::initializer_list<int64_t> shape) {
  heed_tensor tensor = {};
  tensor.data = data;
  tensor.dtype = dtype;
  tensor.ndim = static_cast<int32_t>(shape.size());
  int64_t stride = 1;
  for (int32_t i = tensor.ndim - 1; i >= 0; --i) {
    tensor.shape[i] = shape.begin()[i];
    tensor.stride[i] = stride;
    stride *= tensor.shape[i];
  }
  return tensor;
}

// bshd, f32. Row r of q and k holds r % 5 - 2, of v r % 7, so that no two heads have the same result.
struct SmallAttention {
  static constexpr int64_t kBatch = 2, kSeqlenQ = 3, kSeqlenK = 5, kHeadsQ = 4, kHeadsKv = 2, kHeadDim = 8,
                           kHeadDimV = 16;

  std::vector<float> q = std::vector<float>(kBatch * kSeqlenQ * kHeadsQ * kHeadDim);
  std::vector<float> k = std::vector<float>(kBatch * kSeqlenK * kHeadsKv * kHeadDim);
  std::vector<float> v = std::vector<float>(kBatch * kSeqlenK * kHeadsKv * kHeadDimV);
  std::vector<float> out = std::vector<float>(kBatch * kSeqlenQ * kHeadsQ * kHeadDimV, -7.0f);
  std::vector<float> lse = std::vector<float>(kBatch * kHeadsQ * kSeqlenQ, -7.0f);
  heed_attention_args args;

  SmallAttention() {
    for (size_t i = 0; i < q.size(); ++i) q[i] = 0.25f * static_cast<float>(static_cast<int>(i / kHeadDim % 5) - 2);
    for (size_t i = 0; i < k.size(); ++i) k[i] = 0.25f * static_cast<float>(static_cast<int>(i / kHeadDim % 5) - 2);
    for (size_t i = 0; i < v.size(); ++i) v[i] = static_cast<float>(i / kHeadDimV % 7);
    heed_attention_args_init(&args);
    args.q = tensor_of(q.data(), HEED_DTYPE_F32, {kBatch, kSeqlenQ, kHeadsQ, kHeadDim});
    args.k = tensor_of(k.data(), HEED_DTYPE_F32, {kBatch, kSeqlenK, kHeadsKv, kHeadDim});
    args.v = tensor_of(v.data(), HEED_DTYPE_F32, {kBatch, kSeqlenK, kHeadsKv, kHeadDimV});
    args.out = tensor_of(out.data(), HEED_DTYPE_F32, {kBatch, kSeqlenQ, kHeadsQ, kHeadDimV});
  }
  SmallAttention(const SmallAttention&) = delete;
  SmallAttention& operator=(const SmallAttention&) = delete;

  bool out_untouched() const {
    for (const float x : out) {
      if (x != -7.0f) return false;
    }
    return true;
  }
};

}  // namespace heed
