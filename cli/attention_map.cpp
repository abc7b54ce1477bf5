#include "attention_map.h"

#include <algorithm>
#include <cstring>

#include "format.h"
#include "job.h"

namespace heed::cli {
namespace {

// The map needs no second formula for scores: attention with v = identity gives out = P * I = P, by the library itself,
// so every mask and bias is in it. Keys go through in groups of head_dim_v columns.
constexpr int64_t kColumns = 256;

struct Place {
  int64_t start, length;  // of a sequence among the rows of its tensor
};

// Dimension of the sequence and of the heads in a layout's shape.
int seq_dim(int32_t layout) { return layout == HEED_LAYOUT_BSHD ? 1 : layout == HEED_LAYOUT_BHSD ? 2 : 0; }
int head_dim_of(int32_t layout) { return layout == HEED_LAYOUT_BHSD ? 1 : layout == HEED_LAYOUT_BSHD ? 2 : 1; }

bool present(const heed_tensor& tensor) { return tensor.dtype != HEED_DTYPE_NONE; }

// The one slice `index` of a dimension, which stays as 1; broadcast dimensions have one slice for all.
void take(heed_tensor& tensor, int dim, int64_t index) {
  if (!present(tensor)) return;
  if (tensor.shape[dim] > 1) {
    const int64_t bytes = static_cast<int64_t>(heed_dtype_bytes(tensor.dtype));
    tensor.data = static_cast<std::byte*>(tensor.data) + index * tensor.stride[dim] * bytes;
  }
  tensor.shape[dim] = 1;
}

Place place_of(const heed_tensor& cu_seqlens, const heed_tensor& tensor, int32_t layout, int64_t batch) {
  if (layout != HEED_LAYOUT_THD) return {0, tensor.shape[seq_dim(layout)]};
  const auto* starts = static_cast<const int32_t*>(cu_seqlens.data);
  const int64_t step = cu_seqlens.stride[0];
  return {starts[batch * step], starts[(batch + 1) * step] - starts[batch * step]};
}

// The arguments of one sequence and head: views into the same memory.
heed_attention_args one_head(heed_attention_args arguments, int64_t batch, int64_t head) {
  const int32_t layout_q = arguments.layout_q, layout_kv = arguments.layout_kv;
  const int64_t ratio = arguments.q.shape[head_dim_of(layout_q)] / arguments.k.shape[head_dim_of(layout_kv)];
  take(arguments.q, head_dim_of(layout_q), head);
  take(arguments.k, head_dim_of(layout_kv), head / ratio);
  int64_t row = batch;
  if (present(arguments.cache_batch_idx)) {
    row = static_cast<const int32_t*>(arguments.cache_batch_idx.data)[batch * arguments.cache_batch_idx.stride[0]];
    arguments.cache_batch_idx = {};
  }
  if (layout_q != HEED_LAYOUT_THD) take(arguments.q, 0, batch);
  if (layout_kv != HEED_LAYOUT_THD) take(arguments.k, 0, row);
  for (heed_tensor* tensor : {&arguments.bias, &arguments.mask}) {
    take(*tensor, 0, batch);
    take(*tensor, 1, head);
  }
  take(arguments.sinks, 0, head);
  if (arguments.alibi_slopes.ndim == 2) {
    take(arguments.alibi_slopes, 0, batch);
    take(arguments.alibi_slopes, 1, head);
  } else {
    take(arguments.alibi_slopes, 0, head);
  }
  for (heed_tensor* tensor : {&arguments.seqused_q, &arguments.seqused_k, &arguments.leftpad_k})
    take(*tensor, 0, batch);
  for (heed_tensor* tensor : {&arguments.cu_seqlens_q, &arguments.cu_seqlens_k}) {
    if (!present(*tensor)) continue;
    tensor->data = static_cast<int32_t*>(tensor->data) + batch * tensor->stride[0];
    tensor->shape[0] = 2;
  }
  return arguments;
}

Tensor widened(const heed_tensor& view) { return convert(copy_view(view), ElementType::kF32); }

}  // namespace

Tensor attention_map(const heed_attention_args& arguments, int64_t batch, int64_t head) {
  if (present(arguments.page_table)) throw Failure("--map draws keys that are not in pages");
  const bool packed = arguments.layout_q == HEED_LAYOUT_THD;
  const int64_t sequences = packed ? arguments.cu_seqlens_q.shape[0] - 1 : arguments.q.shape[0];
  const int64_t heads = arguments.q.shape[head_dim_of(arguments.layout_q)];
  if (batch < 0 || batch >= sequences)
    throw UsageError(cli::format("--batch is {}; there are {} sequences, from 0", batch, sequences));
  if (head < 0 || head >= heads) throw UsageError(cli::format("--head is {}; there are {} heads, from 0", head, heads));

  const Place queries = place_of(arguments.cu_seqlens_q, arguments.q, arguments.layout_q, batch);
  const Place keys = place_of(arguments.cu_seqlens_k, arguments.k, arguments.layout_kv, batch);
  heed_attention_args one = one_head(arguments, batch, head);
  // In f32, whatever the inputs: a picture of P, not of P rounded.
  Tensor q = widened(one.q), k = widened(one.k);
  one.q = view_of(q);
  one.k = view_of(k);
  std::vector<int64_t> v_shape = k.shape, out_shape = q.shape;
  v_shape.back() = out_shape.back() = std::min<int64_t>(kColumns, std::max<int64_t>(keys.length, 1));
  const int64_t columns = v_shape.back();
  Tensor v(ElementType::kF32, v_shape), out(ElementType::kF32, out_shape);
  one.v = view_of(v);
  one.out = view_of(out);
  for (heed_tensor* unused : {&one.lse, &one.status, &one.dout, &one.dlse, &one.dq, &one.dk, &one.dv, &one.dbias,
                              &one.dsinks, &one.dalibi_slopes}) {
    *unused = {};
  }
  one.dropout_p = 0;
  one.pass = HEED_PASS_FORWARD;
  Tensor bias;
  if (present(one.bias)) {
    bias = widened(one.bias);
    one.bias = view_of(bias);
  }
  one.workspace = nullptr;
  one.workspace_bytes = 0;

  Tensor map(ElementType::kF32, {queries.length, keys.length});
  for (int64_t first = 0; first < keys.length; first += columns) {
    const int64_t count = std::min(columns, keys.length - first);
    std::memset(v.data.data(), 0, v.data.size());
    for (int64_t c = 0; c < count; ++c) v.as<float>()[(keys.start + first + c) * columns + c] = 1.0f;
    require(heed_attention(&one, nullptr));
    for (int64_t i = 0; i < queries.length; ++i) {
      std::copy_n(out.as<float>() + (queries.start + i) * columns, count, map.as<float>() + i * keys.length + first);
    }
  }
  return map;
}

}  // namespace heed::cli
