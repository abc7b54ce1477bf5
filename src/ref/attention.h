// Textbook attention, one row at a time: the reference in double precision, and the same formula in the arithmetic that
// the error bound is measured against (docs/conventions.md, section 6).
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "ops/attention.h"

namespace heed::ref {

// Where one sequence's rows and keys lie, from the lengths, offsets and pages in memory. A sequence whose data is bad
// has status bits and neither rows nor keys.
struct Sequence {
  int64_t b = 0;
  int32_t status = 0;    // HEED_STATUS_* bits
  int64_t num_rows = 0;  // query i in [0, num_rows) is row first_row + i of q
  int64_t num_keys = 0;  // key j in [0, num_keys) is key first_key + j of the sequence's memory
  int64_t q_batch = 0, first_row = 0;
  int64_t kv_batch = 0, first_key = 0;
  const int32_t* pages = nullptr;  // this sequence's row of the page table
  int64_t offset = 0;              // query i stands at position i + offset
};
std::vector<Sequence> sequences_of(const AttentionProblem& problem, const AttentionArgs& args);

// Packed rows that are written belong to one sequence: element b says whether cu_seqlens[b] is no less than any offset
// before it that lies within the total. All true where there are no offsets.
std::vector<bool> starts_in_order(const int32_t* cu_seqlens, int64_t batch, int64_t total);

// Element (key j, 0) of head hkv in k, v, dk or dv.
int64_t key_offset(const AttentionProblem& problem, const Sequence& sequence, Slot slot, int64_t hkv, int64_t j);
// Element (query i, 0) of head h in q, out, lse, dout, dlse or dq.
int64_t row_offset(const AttentionProblem& problem, const Sequence& sequence, Slot slot, int64_t h, int64_t i);

// Gradients that are sums over many rows, in a fixed order: sequences, then kv heads, query heads, rows, keys.
template <class Real>
struct SummedGradients {
  std::vector<Real> dbias;   // slot_shape(kBias), row-major
  std::vector<Real> dsinks;  // [nheads_q]
  std::vector<Real> dalibi;  // [batch or 1][nheads_q]
  explicit SummedGradients(const AttentionProblem& problem);
};

// Largest magnitudes among finite numbers: what the small terms of the error bound scale with.
struct Magnitudes {
  double q = 0, k = 0, v = 0, dout = 0;
  // P_ij (1 - P_ij) (|S_ij| - 4), where positive, with the dropout's factor: how far a relative error of one score moves
  // out, in units of v. Scores up to 4 count as ordinary: the bounds do not grow with them.
  double turn = 0;
  // Backward, P = exp(S - lse) of two f32 numbers: each is off by half an ulp of its size at least, and P carries that.
  // So what P enters counts max(1, |S| / 4, |lse| / 4) fold.
  double p = 1;              // P_ij itself
  double ds = 0;             // P_ij (|dP_ij| + |delta_i| + |dlse_i|): the gradient of a score, its parts not cancelled
  double multiplied_ds = 0;  // |dS_ij| itself, as it is multiplied by q and k
  double dsink = 0;          // P_i,sink (|delta_i| + |dlse_i|)
  // Sums over a row, as delta and lse are off alike in all of it: of what `ds` is of, and of |p - j| times that.
  double ds_of_row = 0, dalibi = 0;
};

// The rows of one sequence that read one kv head.
//   Real = double: the reference.
//   Real = float:  the plain formula: S and softmax in f32, P and dS rounded once to the inputs' dtype before they are
//                  multiplied; backward P = exp(S - lse) and delta = rowsum(dout * out), with the lse and out that the
//                  arguments hold.
template <class Real>
class AttentionRows {
 public:
  AttentionRows(const AttentionProblem& problem, const AttentionArgs& args);

  // Widens the keys and values of this sequence and kv head; dk and dv start at zero.
  void select(const Sequence& sequence, int64_t hkv);

  // out[head_dim_v] of query i of head h; returns its lse.
  Real forward(int64_t h, int64_t i, Real* out);

  // dq[head_dim] of query i of head h; adds what the row gives to dk, dv and `sums`.
  void backward(int64_t h, int64_t i, Real* dq, SummedGradients<Real>& sums);

  const Real* dk(int64_t j) const { return dk_.data() + j * problem_.head_dim; }
  const Real* dv(int64_t j) const { return dv_.data() + j * problem_.head_dim_v; }
  // Of all rows so far.
  const Magnitudes& magnitudes() const { return magnitudes_; }

 private:
  struct Softmax {
    Real lse;
    Real sink;      // the sink's share of the row
    bool poisoned;  // a score is +inf or NaN: so is the row NaN
  };

  void widen(Slot slot, const void* data, int64_t head_dim, std::vector<Real>& rows, std::vector<Real>& columns,
             double& largest);
  void load_row(Slot slot, const void* data, int64_t h, int64_t i, int64_t width, std::vector<Real>& row) const;
  void visible_keys(int64_t position);
  void dot_keys(const std::vector<Real>& x, const std::vector<Real>& columns, std::vector<Real>& y) const;
  void scores(int64_t h, int64_t i);
  Softmax softmax(int64_t h, int64_t i);
  void draw_dropout(int64_t h, int64_t i);
  Real rounded(Real x) const;
  void recompute_from_lse(int64_t h, int64_t i, Softmax& row);
  Real row_delta(int64_t h, int64_t i);
  void note_magnitudes(int64_t i, const Softmax& row, Real delta, Real dlse);
  void add_sums(int64_t h, int64_t i, Real dsink, SummedGradients<Real>& sums) const;

  const AttentionProblem& problem_;
  const AttentionArgs& args_;
  Sequence sequence_;
  int64_t hkv_ = 0;
  Real scale_, softcap_, keep_scale_;
  uint64_t keep_below_;  // a key whose word is below this is kept
  Magnitudes magnitudes_;

  std::vector<Real> k_, v_;    // [num_keys][head_dim], [num_keys][head_dim_v]
  std::vector<Real> kt_, vt_;  // their transposes: scores then run along keys
  std::vector<Real> dk_, dv_;

  // Of the current row.
  int64_t begin_ = 0, end_ = 0;  // keys that causal, window, chunk and lengths leave
  std::vector<Real> q_, dout_, out_;
  std::vector<Real> s_;          // scores; -inf: hidden
  std::vector<Real> cap_slope_;  // d score / d (softmax_scale * dot)
  std::vector<Real> p_;          // probabilities before dropout
  std::vector<uint8_t> kept_;
  std::vector<int64_t> shown_;   // keys that are not hidden
  std::vector<int64_t> summed_;  // of those, the ones that dropout keeps
  std::vector<int64_t> dims_;    // 0, 1, ...
  std::vector<Real> dp_, ds_;
};

// What row "ref/attention" of the registry runs. Unlike a backend's, these allocate.
void attention_forward(const AttentionProblem& problem, const AttentionArgs& args);   // out, lse, status
void attention_backward(const AttentionProblem& problem, const AttentionArgs& args);  // gradients, status

extern template class AttentionRows<double>;
extern template class AttentionRows<float>;
extern template struct SummedGradients<double>;
extern template struct SummedGradients<float>;

}  // namespace heed::ref
