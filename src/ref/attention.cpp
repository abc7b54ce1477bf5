// The reference: attention forward and backward as docs/conventions.md defines them, row by row in double precision.
//
//   s_ij  = softmax_scale * q_i . k_j                 then softcap tanh(s / softcap), + bias, - slope |p - j|, masks
//   P_ij  = exp(s_ij - lse_i),  lse_i = log(sum_j exp(s_ij) + exp(sink))
//   out_i = sum_j Z_ij P_ij v_j                       Z_ij = 1/(1-p) where dropout keeps the key, 0 where not
//
//   dP_ij = Z_ij dout_i . v_j       delta_i = sum_j P_ij dP_ij = dout_i . out_i
//   dS_ij = P_ij (dP_ij - delta_i + dlse_i)           the gradient of the score: dbias, and dalibi = -|p - j| dS
//   dX_ij = dS_ij * (1 - tanh^2)                      of softmax_scale * q_i . k_j
//   dq_i  = softmax_scale sum_j dX_ij k_j     dk_j = softmax_scale sum_i dX_ij q_i     dv_j = sum_i Z_ij P_ij dout_i
//   dsink = sum_i P_i,sink (dlse_i - delta_i)
#include "ref/attention.h"

#include <algorithm>
#include <cmath>

#include "base/philox.h"
#include "plan/impl.h"
#include "ref/add_rows.h"

namespace heed::ref {
namespace {

// Up to here the error bounds know nothing of a score's size (docs/decisions/0006, 0008).
constexpr double kOrdinaryScore = 4;

void raise(double& largest, double x) {
  if (std::isfinite(x)) largest = std::max(largest, std::fabs(x));
}

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

int64_t count(const std::array<int64_t, 4>& shape) { return shape[0] * shape[1] * shape[2] * shape[3]; }

}  // namespace

template <class Real>
SummedGradients<Real>::SummedGradients(const AttentionProblem& p)
    : dbias(p.dbias ? count(slot_shape(p, Slot::kDbias)) : 0),
      dsinks(p.dsinks ? p.nheads_q : 0),
      dalibi(p.dalibi ? (p.alibi_per_batch ? p.batch : 1) * p.nheads_q : 0) {}

template <class Real>
AttentionRows<Real>::AttentionRows(const AttentionProblem& problem, const AttentionArgs& args)
    : problem_(problem),
      args_(args),
      scale_(args.softmax_scale),
      softcap_(problem.softcap ? args.softcap : 0),
      keep_scale_(1),
      keep_below_(uint64_t{1} << 32) {
  if (problem.dropout) {
    keep_below_ = dropout_threshold(args.dropout_p);
    // With p = 1 nothing is kept, and 1/(1-p) never used.
    keep_scale_ = args.dropout_p < 1 ? static_cast<Real>(1 / (1 - static_cast<double>(args.dropout_p))) : Real{0};
  }
  dims_.resize(std::max(problem.head_dim, problem.head_dim_v));
  for (size_t d = 0; d < dims_.size(); ++d) dims_[d] = static_cast<int64_t>(d);
}

template <class Real>
void AttentionRows<Real>::widen(Slot slot, const void* data, int64_t width, std::vector<Real>& rows,
                                std::vector<Real>& columns, double& largest) {
  const int64_t num_keys = sequence_.num_keys;
  const Dtype dtype = slot_dtype(problem_, slot);
  rows.resize(num_keys * width);
  columns.resize(num_keys * width);
  for (int64_t j = 0; j < num_keys; ++j) {
    const int64_t first = key_offset(problem_, sequence_, slot, hkv_, j);
    for (int64_t d = 0; d < width; ++d) {
      const double x = load_as_double(data, dtype, first + d);
      rows[j * width + d] = columns[d * num_keys + j] = static_cast<Real>(x);
      raise(largest, x);
    }
  }
}

template <class Real>
void AttentionRows<Real>::select(const Sequence& sequence, int64_t hkv) {
  sequence_ = sequence;
  hkv_ = hkv;
  widen(Slot::kK, args_.k, problem_.head_dim, k_, kt_, magnitudes_.k);
  widen(Slot::kV, args_.v, problem_.head_dim_v, v_, vt_, magnitudes_.v);
  if (problem_.pass == Pass::kBackward) {
    dk_.assign(k_.size(), Real{0});
    dv_.assign(v_.size(), Real{0});
  }
  for (auto* row : {&s_, &cap_slope_, &p_, &dp_, &ds_}) row->resize(sequence.num_keys);
  kept_.resize(sequence.num_keys);
}

template <class Real>
void AttentionRows<Real>::load_row(Slot slot, const void* data, int64_t h, int64_t i, int64_t width,
                                   std::vector<Real>& row) const {
  const Dtype dtype = slot_dtype(problem_, slot);
  const int64_t first = row_offset(problem_, sequence_, slot, h, i);
  row.resize(width);
  for (int64_t d = 0; d < width; ++d) row[d] = static_cast<Real>(load_as_double(data, dtype, first + d));
}

// Causal, window, chunk and lengths each leave an interval of keys: [begin_, end_) is what they have in common.
template <class Real>
void AttentionRows<Real>::visible_keys(int64_t position) {
  begin_ = 0;
  end_ = sequence_.num_keys;
  if (problem_.window_left >= 0) begin_ = std::max(begin_, position - problem_.window_left);
  if (problem_.window_right >= 0) end_ = std::min(end_, position + problem_.window_right + 1);
  if (problem_.chunk > 0) {
    const int64_t chunk_begin = floor_div(position, problem_.chunk) * problem_.chunk;
    begin_ = std::max(begin_, chunk_begin);
    end_ = std::min(end_, chunk_begin + problem_.chunk);
  }
  begin_ = std::min(begin_, sequence_.num_keys);
  end_ = std::max(end_, begin_);
}

// y[j] = x . key j for the visible keys, in pieces of y that stay in the first-level cache.
template <class Real>
void AttentionRows<Real>::dot_keys(const std::vector<Real>& x, const std::vector<Real>& columns,
                                   std::vector<Real>& y) const {
  constexpr int64_t kPiece = 512;
  std::fill(y.begin() + begin_, y.begin() + end_, Real{0});
  for (int64_t j = begin_; j < end_; j += kPiece) {
    add_rows(x.data(), dims_.data(), static_cast<int64_t>(x.size()), columns.data() + j, sequence_.num_keys,
             std::min(kPiece, end_ - j), y.data() + j);
  }
}

template <class Real>
void AttentionRows<Real>::scores(int64_t h, int64_t i) {
  const AttentionProblem& p = problem_;
  const int64_t position = i + sequence_.offset, b = sequence_.b;
  visible_keys(position);
  load_row(Slot::kQ, args_.q, h, i, p.head_dim, q_);
  dot_keys(q_, kt_, s_);

  const auto& bias_stride = p.strides(Slot::kBias);
  const auto& mask_stride = p.strides(Slot::kMask);
  const auto& alibi_stride = p.strides(Slot::kAlibi);
  const int64_t bias_row = b * bias_stride[0] + h * bias_stride[1] + i * bias_stride[2];
  const int64_t mask_row = b * mask_stride[0] + h * mask_stride[1] + i * mask_stride[2];
  Real slope = 0;
  if (p.alibi) slope = static_cast<Real>(args_.alibi_slopes[b * alibi_stride[0] + h * alibi_stride[1]]);
  for (int64_t j = begin_; j < end_; ++j) {
    Real s = scale_ * s_[j];
    if (p.softcap) {
      const Real t = std::tanh(s / softcap_);
      s = softcap_ * t;
      cap_slope_[j] = 1 - t * t;
    }
    if (p.bias()) s += static_cast<Real>(load_as_double(args_.bias, p.bias_dtype, bias_row + j * bias_stride[3]));
    if (p.alibi) s -= slope * static_cast<Real>(std::abs(position - j));
    if (p.mask && args_.mask[mask_row + j * mask_stride[3]] == 0) s = -std::numeric_limits<Real>::infinity();
    s_[j] = s;
  }
}

// Word j mod 4 of Philox decides about key j; b, h, i, j each moved by index_base.
template <class Real>
void AttentionRows<Real>::draw_dropout(int64_t h, int64_t i) {
  const AttentionArgs& a = args_;
  const uint64_t seed = a.dropout_seed_ptr != nullptr ? *a.dropout_seed_ptr : a.dropout_seed;
  const uint64_t offset = a.dropout_offset_ptr != nullptr ? *a.dropout_offset_ptr : a.dropout_offset;
  const std::array<uint32_t, 2> key = {static_cast<uint32_t>(seed),
                                       static_cast<uint32_t>(seed >> 32) ^ static_cast<uint32_t>(offset >> 32)};
  const int64_t head = (sequence_.b + a.index_base[0]) * problem_.nheads_q + h + a.index_base[1];
  std::array<uint32_t, 4> words = {};
  int64_t block = -1;
  bool drawn = false;
  for (const int64_t j : shown_) {
    const int64_t column = j + a.index_base[3];
    if (const int64_t wanted = floor_div(column, 4); !drawn || wanted != block) {
      block = wanted;
      drawn = true;
      words = philox4x32_10({static_cast<uint32_t>(block), static_cast<uint32_t>(i + a.index_base[2]),
                             static_cast<uint32_t>(head), static_cast<uint32_t>(offset)},
                            key);
    }
    kept_[j] = words[column & 3] < keep_below_;
  }
}

template <class Real>
typename AttentionRows<Real>::Softmax AttentionRows<Real>::softmax(int64_t h, int64_t i) {
  constexpr Real kInf = std::numeric_limits<Real>::infinity();
  constexpr Real kNan = std::numeric_limits<Real>::quiet_NaN();
  const Real sink = problem_.sinks ? static_cast<Real>(args_.sinks[h]) : -kInf;
  Real largest = sink;
  bool poisoned = std::isnan(sink) || sink == kInf;
  shown_.clear();
  for (int64_t j = begin_; j < end_; ++j) {
    if (s_[j] == -kInf) continue;
    shown_.push_back(j);
    poisoned = poisoned || std::isnan(s_[j]) || s_[j] == kInf;
    largest = std::max(largest, s_[j]);
  }
  summed_ = shown_;
  if (problem_.dropout) {
    draw_dropout(h, i);
    std::erase_if(summed_, [this](int64_t j) { return kept_[j] == 0; });
  }
  if (poisoned) {
    for (const int64_t j : shown_) p_[j] = kNan;
    return {kNan, kNan, true};
  }
  if (largest == -kInf) return {-kInf, 0, false};
  const Real sink_term = std::exp(sink - largest);
  Real sum = sink_term;
  for (const int64_t j : shown_) sum += p_[j] = std::exp(s_[j] - largest);
  for (const int64_t j : shown_) p_[j] /= sum;
  return {largest + std::log(sum), sink_term / sum, false};
}

template <class Real>
Real AttentionRows<Real>::rounded(Real x) const {
  if constexpr (std::is_same_v<Real, float>) {
    if (problem_.dtype == Dtype::kBf16) return to_float(to_bf16(x));
    if (problem_.dtype == Dtype::kF16) return to_float(to_f16(x));
  }
  return x;
}

template <class Real>
Real AttentionRows<Real>::forward(int64_t h, int64_t i, Real* out) {
  scores(h, i);
  const Softmax row = softmax(h, i);
  const int64_t width = problem_.head_dim_v;
  std::fill(out, out + width, row.poisoned ? row.lse : Real{0});
  if (row.poisoned) return row.lse;
  if constexpr (std::is_same_v<Real, double>) {
    for (const int64_t j : summed_)
      if (std::fabs(s_[j]) > kOrdinaryScore)
        raise(magnitudes_.turn, p_[j] * (1 - p_[j]) * (std::fabs(s_[j]) - kOrdinaryScore) * keep_scale_);
  }
  for (const int64_t j : summed_) p_[j] = rounded(p_[j]);
  add_rows(p_.data(), summed_.data(), static_cast<int64_t>(summed_.size()), v_.data(), width, width, out);
  for (int64_t d = 0; d < width; ++d) out[d] *= keep_scale_;
  return row.lse;
}

// The plain formula takes the row's normaliser from the `lse` that was handed in, as every backward pass does that does
// not repeat the forward one: P = exp(S - lse).
template <class Real>
void AttentionRows<Real>::recompute_from_lse(int64_t h, int64_t i, Softmax& row) {
  if constexpr (std::is_same_v<Real, float>) {
    if (row.poisoned || std::isinf(row.lse)) return;
    const Dtype dtype = slot_dtype(problem_, Slot::kLse);
    const int64_t place = row_offset(problem_, sequence_, Slot::kLse, h, i);
    row.lse = static_cast<Real>(load_as_double(args_.lse, dtype, place));
    for (const int64_t j : shown_) p_[j] = std::exp(s_[j] - row.lse);
    if (problem_.sinks) row.sink = std::exp(args_.sinks[h] - row.lse);
  }
}

// The reference: sum_j P_ij dP_ij, which owes nothing to the `out` that was handed in. The plain formula: from that.
template <class Real>
Real AttentionRows<Real>::row_delta(int64_t h, int64_t i) {
  Real delta = 0;
  if constexpr (std::is_same_v<Real, double>) {
    for (const int64_t j : summed_) delta += p_[j] * dp_[j];
  } else {
    load_row(Slot::kOut, args_.out, h, i, problem_.head_dim_v, out_);
    for (int64_t d = 0; d < problem_.head_dim_v; ++d) delta += dout_[d] * out_[d];
  }
  return delta;
}

template <class Real>
void AttentionRows<Real>::backward(int64_t h, int64_t i, Real* dq, SummedGradients<Real>& sums) {
  const AttentionProblem& p = problem_;
  const int64_t d_qk = p.head_dim, d_v = p.head_dim_v;
  scores(h, i);
  Softmax row = softmax(h, i);
  recompute_from_lse(h, i, row);
  load_row(Slot::kDout, args_.dout, h, i, d_v, dout_);
  dot_keys(dout_, vt_, dp_);
  for (const int64_t j : shown_) dp_[j] = p.dropout && kept_[j] == 0 ? Real{0} : dp_[j] * keep_scale_;
  const Real delta = row_delta(h, i);
  const Real dlse = p.dlse ? static_cast<Real>(load_as_double(args_.dlse, slot_dtype(p, Slot::kDlse),
                                                              row_offset(p, sequence_, Slot::kDlse, h, i)))
                           : Real{0};
  for (const int64_t j : shown_) ds_[j] = p_[j] * (dp_[j] - delta + dlse);
  note_magnitudes(i, row, delta, dlse);
  add_sums(h, i, row.sink * (dlse - delta), sums);

  for (const int64_t j : shown_) ds_[j] = rounded(p.softcap ? ds_[j] * cap_slope_[j] : ds_[j]);  // now dX
  for (const int64_t j : shown_) raise(magnitudes_.multiplied_ds, ds_[j]);
  std::fill(dq, dq + d_qk, Real{0});
  add_rows(ds_.data(), shown_.data(), static_cast<int64_t>(shown_.size()), k_.data(), d_qk, d_qk, dq);
  for (int64_t d = 0; d < d_qk; ++d) dq[d] *= scale_;
  for (const int64_t j : shown_) {
    const Real dx = ds_[j] * scale_;
    Real* __restrict dk = dk_.data() + j * d_qk;
    for (int64_t d = 0; d < d_qk; ++d) dk[d] += dx * q_[d];
  }
  for (const int64_t j : summed_) {
    const Real weight = rounded(p_[j]) * keep_scale_;
    Real* __restrict dv = dv_.data() + j * d_v;
    for (int64_t d = 0; d < d_v; ++d) dv[d] += weight * dout_[d];
  }
}

template <class Real>
void AttentionRows<Real>::note_magnitudes(int64_t i, const Softmax& row, Real delta, Real dlse) {
  const Real rest = std::fabs(delta) + std::fabs(dlse);
  const Real lse = std::isfinite(row.lse) ? std::fabs(row.lse) : Real{0};
  double ds_of_row = 0, dalibi = 0;
  for (const Real x : q_) raise(magnitudes_.q, x);
  for (const Real x : dout_) raise(magnitudes_.dout, x);
  for (const int64_t j : shown_) {
    const Real folds = std::max<Real>(1, std::max(std::fabs(s_[j]), lse) / kOrdinaryScore);
    const Real ds = p_[j] * folds * (std::fabs(dp_[j]) + rest);
    raise(magnitudes_.p, p_[j] * folds);
    raise(magnitudes_.ds, ds);
    ds_of_row += ds;
    dalibi += ds * static_cast<double>(std::abs(i + sequence_.offset - j));
  }
  raise(magnitudes_.ds_of_row, ds_of_row);
  raise(magnitudes_.dalibi, dalibi);
  raise(magnitudes_.dsink, row.sink * std::max<Real>(1, lse / kOrdinaryScore) * rest);
}

template <class Real>
void AttentionRows<Real>::add_sums(int64_t h, int64_t i, Real dsink, SummedGradients<Real>& sums) const {
  const AttentionProblem& p = problem_;
  if (p.dsinks) sums.dsinks[h] += dsink;
  if (p.dalibi) {
    Real& total = sums.dalibi[(p.alibi_per_batch ? sequence_.b * p.nheads_q : 0) + h];
    for (const int64_t j : shown_) total -= static_cast<Real>(std::abs(i + sequence_.offset - j)) * ds_[j];
  }
  if (p.dbias) {
    const std::array<int64_t, 4> shape = slot_shape(p, Slot::kDbias);
    const int64_t b = shape[0] > 1 ? sequence_.b : 0, head = shape[1] > 1 ? h : 0, query = shape[2] > 1 ? i : 0;
    Real* row = sums.dbias.data() + ((b * shape[1] + head) * shape[2] + query) * shape[3];
    for (const int64_t j : shown_) row[shape[3] > 1 ? j : 0] += ds_[j];
  }
}

template class AttentionRows<double>;
template class AttentionRows<float>;
template struct SummedGradients<double>;
template struct SummedGradients<float>;

// ---- the row of the registry ------------------------------------------------------------------------------------

namespace {

// body(index, offset) for every element of a slot: its row-major index and where it lies in memory.
template <class Body>
void for_each_element(const AttentionProblem& p, Slot slot, Body&& body) {
  const std::array<int64_t, 4> shape = slot_shape(p, slot);
  const auto& stride = p.strides(slot);
  int64_t index = 0;
  for (int64_t a = 0; a < shape[0]; ++a) {
    for (int64_t b = 0; b < shape[1]; ++b) {
      for (int64_t c = 0; c < shape[2]; ++c) {
        const int64_t first = a * stride[0] + b * stride[1] + c * stride[2];
        for (int64_t d = 0; d < shape[3]; ++d) body(index++, first + d * stride[3]);
      }
    }
  }
}

void fill(const AttentionProblem& p, Slot slot, void* data, double value) {
  const Dtype dtype = slot_dtype(p, slot);
  for_each_element(p, slot, [&](int64_t, int64_t offset) { store_from_double(data, dtype, offset, value); });
}

void store_row(const AttentionProblem& p, Slot slot, void* data, int64_t offset, const double* row, int64_t width) {
  const Dtype dtype = slot_dtype(p, slot);
  for (int64_t d = 0; d < width; ++d) store_from_double(data, dtype, offset + d, row[d]);
}

template <class Body>
void for_each_group(const AttentionProblem& p, const AttentionArgs& a, AttentionRows<double>& rows, Body&& body) {
  for (const Sequence& sequence : sequences_of(p, a)) {
    if (a.status != nullptr) a.status[sequence.b] = sequence.status;
    for (int64_t hkv = 0; hkv < p.nheads_kv && sequence.num_rows > 0; ++hkv) {
      rows.select(sequence, hkv);
      body(sequence, hkv);
    }
  }
}

}  // namespace

void attention_forward(const AttentionProblem& p, const AttentionArgs& a) {
  fill(p, Slot::kOut, a.out, 0.0);  // what no row writes: padding, places between sequences, bad sequences
  if (p.lse) fill(p, Slot::kLse, a.lse, -std::numeric_limits<double>::infinity());
  AttentionRows<double> rows(p, a);
  std::vector<double> out(p.head_dim_v);
  for_each_group(p, a, rows, [&](const Sequence& sequence, int64_t hkv) {
    for (int64_t h = hkv * p.gqa_ratio(); h < (hkv + 1) * p.gqa_ratio(); ++h) {
      for (int64_t i = 0; i < sequence.num_rows; ++i) {
        const double lse = rows.forward(h, i, out.data());
        store_row(p, Slot::kOut, a.out, row_offset(p, sequence, Slot::kOut, h, i), out.data(), p.head_dim_v);
        if (p.lse) store_row(p, Slot::kLse, a.lse, row_offset(p, sequence, Slot::kLse, h, i), &lse, 1);
      }
    }
  });
}

void attention_backward(const AttentionProblem& p, const AttentionArgs& a) {
  if (p.dq) fill(p, Slot::kDq, a.dq, 0.0);
  if (p.dk) fill(p, Slot::kDk, a.dk, 0.0);
  if (p.dv) fill(p, Slot::kDv, a.dv, 0.0);
  AttentionRows<double> rows(p, a);
  SummedGradients<double> sums(p);
  std::vector<double> dq(p.head_dim);
  for_each_group(p, a, rows, [&](const Sequence& sequence, int64_t hkv) {
    for (int64_t h = hkv * p.gqa_ratio(); h < (hkv + 1) * p.gqa_ratio(); ++h) {
      for (int64_t i = 0; i < sequence.num_rows; ++i) {
        rows.backward(h, i, dq.data(), sums);
        if (p.dq) store_row(p, Slot::kDq, a.dq, row_offset(p, sequence, Slot::kDq, h, i), dq.data(), p.head_dim);
      }
    }
    for (int64_t j = 0; j < sequence.num_keys; ++j) {
      if (p.dk) store_row(p, Slot::kDk, a.dk, key_offset(p, sequence, Slot::kDk, hkv, j), rows.dk(j), p.head_dim);
      if (p.dv) store_row(p, Slot::kDv, a.dv, key_offset(p, sequence, Slot::kDv, hkv, j), rows.dv(j), p.head_dim_v);
    }
  });
  if (p.dbias) {
    for_each_element(p, Slot::kDbias, [&](int64_t index, int64_t offset) {
      store_from_double(a.dbias, slot_dtype(p, Slot::kDbias), offset, sums.dbias[index]);
    });
  }
  const Dtype vector_dtype = p.out_dtype == Dtype::kF64 ? Dtype::kF64 : Dtype::kF32;
  for (size_t n = 0; n < sums.dsinks.size(); ++n) store_from_double(a.dsinks, vector_dtype, n, sums.dsinks[n]);
  for (size_t n = 0; n < sums.dalibi.size(); ++n) store_from_double(a.dalibi_slopes, vector_dtype, n, sums.dalibi[n]);
}

namespace {

template <void (*kPass)(const AttentionProblem&, const AttentionArgs&)>
Status run(const Plan<AttentionProblem>& plan, const Step<AttentionProblem>&, const AttentionArgs& args) {
  kPass(plan.problem, args);
  return {};
}

Verdict check(const AttentionProblem& problem, const Machine&) {
  if (problem.device != Device::kCpu) return decline("reads host memory only: copy the tensors there");
  return accept("double precision, one thread");
}

double cost_us(const AttentionProblem& p, const Machine&) { return flops(p) / 1e3; }

Status prepare(const AttentionProblem& p, const Machine&, Plan<AttentionProblem>& plan) {
  Step<AttentionProblem> step;
  step.kernel = p.pass == Pass::kForward ? "attention forward, f64" : "attention backward, f64";
  step.run = p.pass == Pass::kForward ? run<attention_forward> : run<attention_backward>;
  step.grid = p.batch * p.nheads_kv;
  plan.steps.push_back(std::move(step));
  return {};
}

}  // namespace

}  // namespace heed::ref

namespace heed {

extern const Impl<AttentionProblem> kRefAttention;
const Impl<AttentionProblem> kRefAttention = {
    "ref/attention",
    "the textbook in double precision, forward and backward: what results are judged against",
    true,
    ref::check,
    ref::cost_us,
    ref::prepare};

}  // namespace heed
