// What the inputs of every op share: lengths, page tables, fills, views.
#include "check/inputs.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <unordered_map>

#include "base/format.h"
#include "check/arg_tensors.h"
#include "cuda/device.h"

namespace heed::check {

GuardedTensor& add_vector(Inputs& inputs, std::string name, Dtype dtype, int64_t size, Role role) {
  return inputs.tensors.emplace_back(std::move(name), dtype, std::array<int64_t, 4>{size, 1, 1, 1},
                                     std::array<int64_t, 4>{1, 0, 0, 0}, dtype_bytes(dtype), role);
}

GuardedTensor& add_integers(Inputs& inputs, std::string name, const std::vector<int64_t>& values) {
  GuardedTensor& tensor =
      add_vector(inputs, std::move(name), Dtype::kI32, static_cast<int64_t>(values.size()), Role::kInput);
  for (size_t n = 0; n < values.size(); ++n) static_cast<int32_t*>(tensor.data())[n] = static_cast<int32_t>(values[n]);
  return tensor;
}

namespace {

heed_tensor view(const GuardedTensor& tensor, std::initializer_list<int> dims) {
  heed_tensor t = {};
  t.data = tensor.data();
  t.dtype = static_cast<heed_dtype>(tensor.dtype());
  for (const int dim : dims) {
    t.shape[t.ndim] = tensor.shape()[dim];
    t.stride[t.ndim++] = tensor.stride()[dim];
  }
  return t;
}

}  // namespace

heed_tensor in_layout(const GuardedTensor& tensor, Layout layout) {
  switch (layout) {
    case Layout::kBshd: return view(tensor, {0, 2, 1, 3});
    case Layout::kBhsd: return view(tensor, {0, 1, 2, 3});
    case Layout::kThd: break;
  }
  return view(tensor, {2, 1, 3});
}

heed_tensor leading(const GuardedTensor& tensor, int32_t ndim) {
  heed_tensor t = view(tensor, {0, 1, 2, 3});
  t.ndim = ndim;
  for (int dim = ndim; dim < 4; ++dim) t.shape[dim] = t.stride[dim] = 0;
  return t;
}

heed_tensor trailing(const GuardedTensor& tensor, int32_t ndim) {
  if (ndim == 1) return view(tensor, {3});
  if (ndim == 2) return view(tensor, {2, 3});
  return ndim == 3 ? view(tensor, {1, 2, 3}) : view(tensor, {0, 1, 2, 3});
}

std::vector<int64_t> packed_lengths(const Lengths& lengths, uint64_t seed, std::string_view name, int64_t batch,
                                    int64_t total) {
  std::vector<int64_t> result(batch);
  Random random(seed, name);
  int64_t left = total;
  for (int64_t b = 0; b < batch; ++b) {
    int64_t length = total / batch + (b < total % batch);
    if (!lengths.values.empty()) length = lengths.values[b];
    if (lengths.low >= 0) length = random.integer(b, lengths.low, lengths.high);
    result[b] = std::min(length, left);
    left -= result[b];
  }
  return result;
}

std::vector<int64_t> offsets_of(const std::vector<int64_t>& lengths) {
  std::vector<int64_t> offsets(lengths.size() + 1, 0);
  std::partial_sum(lengths.begin(), lengths.end(), offsets.begin() + 1);
  return offsets;
}

std::vector<int64_t> drawn(const Lengths& lengths, uint64_t seed, std::string_view name,
                           const std::vector<int64_t>& limits, const std::vector<int64_t>& standard) {
  if (!lengths.values.empty()) return lengths.values;
  if (lengths.low < 0) return standard;
  Random random(seed, name);
  std::vector<int64_t> result(limits.size());
  for (size_t b = 0; b < limits.size(); ++b) {
    result[b] = std::min(limits[b], random.integer(static_cast<int64_t>(b), lengths.low, lengths.high));
  }
  return result;
}

std::vector<int64_t> permutation(int64_t size, uint64_t seed, std::string_view name) {
  std::vector<int64_t> order(size);
  std::iota(order.begin(), order.end(), int64_t{0});
  Random random(seed, name);
  for (int64_t n = size - 1; n > 0; --n) std::swap(order[n], order[random.integer(n, 0, n)]);
  return order;
}

std::vector<int64_t> page_entries(const std::vector<PageRange>& needed, int64_t max_pages, int64_t num_pages,
                                  bool shuffled, uint64_t seed) {
  std::vector<int64_t> order;
  if (shuffled) order = permutation(num_pages, seed, "page_table");
  std::vector<int64_t> entries(needed.size() * max_pages);
  int64_t next = 0;
  for (size_t row = 0; row < needed.size(); ++row) {
    for (int64_t page = 0; page < max_pages; ++page) {
      int64_t& entry = entries[row * max_pages + page];
      if (page >= needed[row].first && page < needed[row].last && num_pages > 0) {
        const int64_t place = next++ % num_pages;
        entry = shuffled ? order[place] : place;
      } else {
        entry = (row + page) % 2 == 0 ? -7 : std::numeric_limits<int32_t>::max();
      }
    }
  }
  return entries;
}

Fill::Fill(const DataFields& data, std::string_view tensor, int64_t head_dim)
    : kind_(Kind::kNormal),
      factor_(data.fill_factor),
      maxlast_step_(40.0 / std::sqrt(static_cast<double>(head_dim))),
      is_q_(tensor == "q"),
      is_k_(tensor == "k"),
      random_(data.seed, tensor) {
  constexpr std::string_view kNames[] = {"normal", "uniform", "ones", "zero", "arange", "maxlast", "huge", "tiny"};
  kind_ = static_cast<Kind>(std::find(std::begin(kNames), std::end(kNames), data.fill) - std::begin(kNames));
}

double Fill::operator()(int64_t index, double along) {
  switch (kind_) {
    case Kind::kNormal: break;
    case Kind::kUniform: return factor_ * (2 * random_.uniform(index) - 1);
    case Kind::kOnes: return factor_;
    case Kind::kZero: return 0;
    case Kind::kArange: return factor_ * static_cast<double>(index % 97 - 48) / 48;
    case Kind::kMaxlast:  // scores rise by some 40 from a sequence's first key to its last
      if (is_q_) return factor_ * (1 + 0.1 * random_.normal(index));
      if (is_k_) return factor_ * maxlast_step_ * along + 0.01 * random_.normal(index);
      break;
    case Kind::kHuge: return factor_ * 1e4 * random_.normal(index);
    case Kind::kTiny: return factor_ * 1e-3 * random_.normal(index);
  }
  return factor_ * random_.normal(index);
}

namespace {

// Every tensor gets its mirror, and the views over the tensors, of which the arguments are made, point there.
template <class Args>
Status move_to_device(int32_t device_index, std::deque<GuardedTensor>& tensors, Args& args) {
  std::unordered_map<const void*, void*> moved;
  for (GuardedTensor& tensor : tensors) {
    HEED_RETURN_IF_ERROR(tensor.move_to_device(device_index));
    moved[tensor.data()] = tensor.device_data();
  }
  for_each_tensor(args, [&](const char*, heed_tensor& view) {
    if (const auto found = moved.find(view.data); found != moved.end()) view.data = found->second;
  });
  return {};
}

}  // namespace

Status make_inputs(std::string_view line, Inputs& inputs) {
  Result<ProblemLine> parsed = parse_problem_line(line);
  if (!parsed.ok()) return parsed.status();
  inputs.problem = parsed.value().problem;
  inputs.data = parsed.value().data;
  inputs.is_attention = std::holds_alternative<AttentionProblem>(inputs.problem);
  const auto [device, device_index] =
      std::visit([](const auto& p) { return std::pair(p.device, p.device_index); }, inputs.problem);
  if (device == Device::kCuda) HEED_RETURN_IF_ERROR(cuda::device_facts(device_index).status());  // before the work
  HEED_RETURN_IF_ERROR(inputs.is_attention ? make_attention_inputs(inputs) : make_kv_append_inputs(inputs));
  for (GuardedTensor& tensor : inputs.tensors) tensor.seal();
  if (device != Device::kCuda) return {};
  return inputs.is_attention ? move_to_device(device_index, inputs.tensors, inputs.attention)
                             : move_to_device(device_index, inputs.tensors, inputs.kv_append);
}

}  // namespace heed::check
