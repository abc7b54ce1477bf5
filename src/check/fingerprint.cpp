#include "check/fingerprint.h"

#include <bit>
#include <cstring>

namespace heed::check {
namespace {

class Mixer {
 public:
  void word(uint64_t x) {
    state_[0] = (state_[0] ^ x) * 0x9e3779b97f4a7c15;
    state_[0] ^= state_[0] >> 32;
    state_[1] = (state_[1] + x) * 0xd6e8feb86659fd93;
    state_[1] ^= state_[1] >> 29;
  }
  void bytes(const void* data, int64_t size) {
    const auto* at = static_cast<const unsigned char*>(data);
    for (; size > 0; at += 8, size -= 8) {
      uint64_t x = 0;
      std::memcpy(&x, at, static_cast<size_t>(size < 8 ? size : 8));
      word(x);
    }
  }
  template <class T>
  void array(const T* data, int64_t count) {
    word(data != nullptr);
    if (data != nullptr) bytes(data, count * static_cast<int64_t>(sizeof(T)));
  }
  void number(float x) { word(std::bit_cast<uint32_t>(x)); }
  Fingerprint value() const { return state_; }

 private:
  Fingerprint state_ = {1, 2};
};

void add_tensor(Mixer& mixer, const AttentionProblem& p, Slot slot, const void* data) {
  mixer.word(data != nullptr);
  if (data == nullptr || !has_slot(p, slot)) return;
  const std::array<int64_t, 4> shape = slot_shape(p, slot);
  const auto& stride = p.strides(slot);
  const int64_t size = dtype_bytes(slot_dtype(p, slot));
  const auto* from = static_cast<const unsigned char*>(data);
  for (int64_t b = 0; b < shape[0]; ++b) {
    for (int64_t h = 0; h < shape[1]; ++h) {
      for (int64_t s = 0; s < shape[2]; ++s) {
        const unsigned char* row = from + (b * stride[0] + h * stride[1] + s * stride[2]) * size;
        if (stride[3] == 1) {
          mixer.bytes(row, shape[3] * size);
          continue;
        }
        for (int64_t d = 0; d < shape[3]; ++d) mixer.bytes(row + d * stride[3] * size, size);
      }
    }
  }
}

}  // namespace

Fingerprint fingerprint(const AttentionProblem& p, const AttentionArgs& a) {
  Mixer mixer;
  mixer.bytes(&p, sizeof p);
  for (const float x : {a.softmax_scale, a.softcap, a.dropout_p}) mixer.number(x);
  mixer.word(a.dropout_seed_ptr != nullptr ? *a.dropout_seed_ptr : a.dropout_seed);
  mixer.word(a.dropout_offset_ptr != nullptr ? *a.dropout_offset_ptr : a.dropout_offset);
  mixer.array(a.index_base.data(), 4);
  add_tensor(mixer, p, Slot::kQ, a.q);
  add_tensor(mixer, p, Slot::kK, a.k);
  add_tensor(mixer, p, Slot::kV, a.v);
  add_tensor(mixer, p, Slot::kBias, a.bias);
  add_tensor(mixer, p, Slot::kMask, a.mask);
  add_tensor(mixer, p, Slot::kAlibi, a.alibi_slopes);
  add_tensor(mixer, p, Slot::kPageTable, a.page_table);
  mixer.array(a.sinks, p.nheads_q);
  for (const int32_t* starts : {a.cu_seqlens_q, a.cu_seqlens_k}) mixer.array(starts, p.batch + 1);
  for (const int32_t* each : {a.seqused_q, a.seqused_k, a.leftpad_k, a.cache_batch_idx}) mixer.array(each, p.batch);
  if (p.pass == Pass::kBackward) {
    add_tensor(mixer, p, Slot::kOut, a.out);
    add_tensor(mixer, p, Slot::kLse, a.lse);
    add_tensor(mixer, p, Slot::kDout, a.dout);
    add_tensor(mixer, p, Slot::kDlse, a.dlse);
  }
  return mixer.value();
}

}  // namespace heed::check
