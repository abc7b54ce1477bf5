// The kv_append op: new keys and values go to position cache_seqlens + t of a cache, rotary embedding turns the new keys
// (and queries, into q_out) on the way.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <type_traits>

#include "base/dtype.h"
#include "base/status.h"
#include "heed/core.h"
#include "ops/attention.h"

namespace heed {

enum class RotaryStyle : int32_t { kHalf = 0, kInterleaved = 1 };

// Dimension orders as in AttentionProblem: (b, h, s, d); caches with pages (page, h, s in page, d).
enum class KvSlot : int32_t { kKNew, kVNew, kKCache, kVCache, kQ, kQOut, kCos, kSin, kPageTable, kCount };
constexpr int kNumKvSlots = static_cast<int>(KvSlot::kCount);
std::string_view slot_name(KvSlot slot);  // "k_new", ...

struct KvAppendProblem {
  Dtype dtype = Dtype::kF32;          // of everything but cos and sin
  Dtype rotary_dtype = Dtype::kNone;  // of cos and sin: f32 or dtype; kNone: no rotary
  Layout layout_new = Layout::kBshd;  // of k_new, v_new, q, q_out
  Layout layout_cache = Layout::kBshd;
  Device device = Device::kCpu;
  int32_t device_index = 0;  // as in AttentionProblem
  int32_t threads = 0;
  RotaryStyle rotary_style = RotaryStyle::kHalf;

  int64_t batch = 1, nheads_q = 0, nheads_kv = 1;      // nheads_q 0: no q
  int64_t seqlen_q = 0, seqlen_new = 0, seqlen_k = 0;  // seqlen_k: capacity of a cache row
  int64_t total_q = 0, total_new = 0;                  // packed
  int64_t head_dim = 0, head_dim_v = 0;
  int64_t page_size = 0, num_pages = 0, cache_batch = 0;
  int64_t rotary_dim = 0, rotary_rows = 0;  // rows of cos and sin

  bool append = true;           // k_new and v_new are given
  bool q_per_position = false;  // query i at first new position + i; else all at the first
  bool rotary_seqlens = false;
  bool leftpad = false;
  uint8_t reserved[4] = {};

  std::array<std::array<int64_t, 4>, kNumKvSlots> stride = {};
  std::array<int32_t, kNumKvSlots> align = {};
  int32_t reserved_align = 0;

  bool operator==(const KvAppendProblem&) const = default;
  bool packed() const { return layout_new == Layout::kThd; }
  bool paged() const { return page_size > 0; }
  bool has_q() const { return nheads_q > 0; }
  bool rotary() const { return rotary_dim > 0; }
  const std::array<int64_t, 4>& strides(KvSlot slot) const { return stride[static_cast<int>(slot)]; }
  std::array<int64_t, 4>& strides(KvSlot slot) { return stride[static_cast<int>(slot)]; }
};
static_assert(std::has_unique_object_representations_v<KvAppendProblem>, "the key is the struct's bytes: no padding");

struct KvAppendArgs {
  const void *k_new = nullptr, *v_new = nullptr, *q = nullptr;
  void *k_cache = nullptr, *v_cache = nullptr, *q_out = nullptr;
  const void *rotary_cos = nullptr, *rotary_sin = nullptr;
  const int32_t *cu_seqlens_new = nullptr, *cu_seqlens_q = nullptr, *cache_seqlens = nullptr, *rotary_seqlens = nullptr;
  const int32_t *leftpad_k = nullptr, *page_table = nullptr, *cache_batch_idx = nullptr;
  int32_t* status = nullptr;
  const heed_executor* executor = nullptr;
  void* stream = nullptr;
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
};

Status validate(const KvAppendProblem& problem);
Status validate(const KvAppendProblem& problem, const KvAppendArgs& args, size_t workspace_bytes);
std::array<int64_t, 4> contiguous_strides(const KvAppendProblem& problem, KvSlot slot);
int32_t natural_align(const KvAppendProblem& problem, KvSlot slot, const void* address);
bool has_slot(const KvAppendProblem& problem, KvSlot slot);
Dtype slot_dtype(const KvAppendProblem& problem, KvSlot slot);
std::array<int64_t, 4> slot_shape(const KvAppendProblem& problem, KvSlot slot);
std::string to_string(const KvAppendProblem& problem);
double flops(const KvAppendProblem& problem);
double bytes(const KvAppendProblem& problem);

}  // namespace heed
