// The attention op: what is asked (AttentionProblem, no pointers) and what it is asked of (AttentionArgs, pointers and
// numbers). docs/conventions.md says what the result is; section 9 there is the grammar of the problem line.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>

#include "base/dtype.h"
#include "base/status.h"
#include "heed/core.h"
#include "ops/device.h"

namespace heed {

// Values as in heed/attention.h.
enum class Pass : int32_t { kForward = 0, kBackward = 1 };
enum class Layout : int32_t { kBshd = 0, kBhsd = 1, kThd = 2 };
enum class OffsetKind : int32_t { kBottomRight = 0, kTopLeft = 1, kGiven = 2 };

enum StatusBit : int32_t { kBadLengthQ = 1, kBadLengthK = 2, kBadPage = 4, kAppendPastCapacity = 8 };

// Tensors whose strides and alignment a problem states. Order of the dimensions, whatever the layout in memory:
//   q, out, dout, dq, k, v, dk, dv   (b, h, s, d); with pages (page, h, s in page, d); packed: b's stride is 0
//   lse, dlse                        (b, h, s, -); packed: b's stride is 0
//   bias, mask, dbias                (b, h, i, j); 0 where broadcast
//   page_table                       (row, page, -, -)
//   alibi_slopes                     (b, h, -, -); b's stride 0 if one set serves the batch
enum class Slot : int32_t {
  kQ,
  kK,
  kV,
  kOut,
  kLse,
  kBias,
  kMask,
  kDout,
  kDlse,
  kDq,
  kDk,
  kDv,
  kDbias,
  kPageTable,
  kAlibi,
  kCount
};
constexpr int kNumSlots = static_cast<int>(Slot::kCount);
std::string_view slot_name(Slot slot);  // "q", "page_table", ...

// Broadcast letters of bias and mask.
enum DimBit : uint8_t { kDimB = 1, kDimH = 2, kDimI = 4, kDimJ = 8 };

// Every member counts for the plan cache's key, which is the struct's bytes.
struct AttentionProblem {
  Pass pass = Pass::kForward;
  Dtype dtype = Dtype::kF32;      // of q, k, v
  Dtype out_dtype = Dtype::kF32;  // of out and dout. f64 (reference only) makes every output f64
  Layout layout_q = Layout::kBshd;
  Layout layout_kv = Layout::kBshd;  // with pages: of one page
  Device device = Device::kCpu;
  int32_t device_index = 0;  // CUDA: which of the devices; CPU: 0
  int32_t threads = 0;       // CPU; 0: all of the executor's. CUDA: 0
  OffsetKind offset_kind = OffsetKind::kBottomRight;
  int32_t reserved0 = 0;

  int64_t batch = 1, nheads_q = 1, nheads_kv = 1;
  int64_t seqlen_q = 0, seqlen_k = 0;  // capacities; packed: max_seqlen hints (0: unknown), never trusted
  int64_t head_dim = 0, head_dim_v = 0;
  int64_t total_q = 0, total_k = 0;             // packed: rows of the q or k tensor
  int64_t page_size = 0, num_pages = 0;         // 0: not paged. Then seqlen_k = max_pages * page_size
  int64_t cache_batch = 0;                      // > 0: k, v (or page_table) have so many rows, cache_batch_idx chooses
  int64_t window_left = -1, window_right = -1;  // causal is window_right = 0
  int64_t q_offset = 0;                         // with kGiven
  int64_t chunk = 0;                            // 0: off
  int64_t splits = 0;                           // 0: choose

  Dtype bias_dtype = Dtype::kNone;  // kNone: no bias
  uint8_t bias_dims = 0;            // DimBit of the dimensions that are not broadcast
  uint8_t mask_dims = 0;
  bool mask = false;
  bool softcap = false;
  bool alibi = false;
  bool alibi_per_batch = false;
  bool sinks = false;
  bool dropout = false;
  bool leftpad = false;
  bool used_q = false;
  bool used_k = false;
  bool lse = false;  // forward: lse is written. Backward: true
  bool deterministic = false;
  bool batch_invariant = false;
  bool dlse = false;  // backward: which gradients come in and go out
  bool dq = false, dk = false, dv = false, dbias = false, dsinks = false, dalibi = false;
  uint8_t reserved[7] = {};

  std::array<std::array<int64_t, 4>, kNumSlots> stride = {};  // elements; 0 for absent tensors
  std::array<int32_t, kNumSlots> align = {};                  // bytes, a power of two up to 128; 0 for absent tensors
  int32_t reserved_align = 0;

  bool operator==(const AttentionProblem&) const = default;

  bool packed_q() const { return layout_q == Layout::kThd; }
  bool packed_k() const { return layout_kv == Layout::kThd; }
  bool paged() const { return page_size > 0; }
  bool bias() const { return bias_dtype != Dtype::kNone; }
  bool causal() const { return window_right == 0; }
  int64_t gqa_ratio() const { return nheads_q / nheads_kv; }
  const std::array<int64_t, 4>& strides(Slot slot) const { return stride[static_cast<int>(slot)]; }
  std::array<int64_t, 4>& strides(Slot slot) { return stride[static_cast<int>(slot)]; }
};
static_assert(std::has_unique_object_representations_v<AttentionProblem>, "the key is the struct's bytes: no padding");

// Pointers and numbers of one run. Shapes and strides are the problem's. Absent tensors are null.
struct AttentionArgs {
  const void *q = nullptr, *k = nullptr, *v = nullptr;
  void* out = nullptr;  // backward: input
  void* lse = nullptr;  // f32, or f64 where out is; backward: input
  const void* bias = nullptr;
  const uint8_t* mask = nullptr;
  const float *alibi_slopes = nullptr, *sinks = nullptr;
  const int32_t *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr;
  const int32_t *seqused_q = nullptr, *seqused_k = nullptr, *leftpad_k = nullptr;
  const int32_t *page_table = nullptr, *cache_batch_idx = nullptr;
  const void *dout = nullptr, *dlse = nullptr;
  void *dq = nullptr, *dk = nullptr, *dv = nullptr, *dbias = nullptr, *dsinks = nullptr, *dalibi_slopes = nullptr;
  int32_t* status = nullptr;

  float softmax_scale = 1.0f;  // resolved: never the "default" marker
  float softcap = 0.0f;
  float dropout_p = 0.0f;
  uint64_t dropout_seed = 0, dropout_offset = 0;
  const uint64_t *dropout_seed_ptr = nullptr, *dropout_offset_ptr = nullptr;
  std::array<int64_t, 4> index_base = {};

  void* workspace = nullptr;
  size_t workspace_bytes = 0;
  const heed_executor* executor = nullptr;  // resolved: never null
  void* stream = nullptr;
};

// Checks everything that needs no data: sizes, dtypes, feature combinations, strides, overlap of outputs, overflow.
Status validate(const AttentionProblem& problem);
// Run-time numbers: finite scale, softcap > 0 iff asked, 0 <= p <= 1, pointers present where the problem says so and
// aligned as it promises, workspace.
Status validate(const AttentionProblem& problem, const AttentionArgs& args, size_t workspace_bytes);

// Fills in what a contiguous tensor of the problem's layout has: strides (broadcast letters as 0) and alignment.
std::array<int64_t, 4> contiguous_strides(const AttentionProblem& problem, Slot slot);
// The largest power of two, at most 128, that divides the slot's byte strides and `address` (null counts as 128).
int32_t natural_align(const AttentionProblem& problem, Slot slot, const void* address);
bool has_slot(const AttentionProblem& problem, Slot slot);
Dtype slot_dtype(const AttentionProblem& problem, Slot slot);
// Extents in the slot's dimension order (b, h, s, d), ...; 1 for dimensions it does not have.
std::array<int64_t, 4> slot_shape(const AttentionProblem& problem, Slot slot);

std::string to_string(const AttentionProblem& problem);
double flops(const AttentionProblem& problem);
double bytes(const AttentionProblem& problem);

}  // namespace heed
