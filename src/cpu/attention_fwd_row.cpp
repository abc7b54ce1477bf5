// One output row key by key: what a block-wise kernel falls back to where a hidden V row holds NaN or Inf.
#include <cmath>
#include <limits>

#include "base/dtype.h"
#include "cpu/attention_fwd.h"

namespace heed::cpu {
namespace {

float load(const void* data, Dtype dtype, int64_t index) {
  return static_cast<float>(load_as_double(data, dtype, index));
}

struct Row {
  const ForwardRun& run;
  const Sequence& sequence;
  int64_t head, query, position;
  KeyRange keys;
  KeyRows k_rows, v_rows;

  // The score in log2 units; -inf where a term or the mask hides the key.
  float score(int64_t key) const {
    const AttentionProblem& problem = *run.problem;
    const ScoreTerms& terms = run.terms;
    if (terms.mask != nullptr && terms.mask[place(terms.mask_stride, key)] == 0)
      return -std::numeric_limits<float>::infinity();
    const int64_t q = row_offset(problem, Slot::kQ, sequence, head, query), k = k_rows.offset(key);
    float sum = 0.0f;
    for (int64_t c = 0; c < problem.head_dim; ++c)
      sum += load(run.args->q, problem.dtype, q + c) * run.q_factor * load(run.args->k, problem.dtype, k + c);
    sum *= terms.factor;
    if (terms.softcap > 0.0f) sum = terms.softcap * std::tanh(sum / terms.softcap);
    if (terms.bias != nullptr) sum += load(terms.bias, terms.bias_dtype, place(terms.bias_stride, key)) * kLog2e;
    if (terms.slopes != nullptr) {
      const float slope = terms.slopes[sequence.batch * terms.slope_stride[0] + head * terms.slope_stride[1]];
      sum -= slope * kLog2e * std::fabs(static_cast<float>(position - key));
    }
    return sum;
  }

  int64_t place(const int64_t* stride, int64_t key) const {
    return sequence.batch * stride[0] + head * stride[1] + query * stride[2] + key * stride[3];
  }
};

}  // namespace

void attend_row_exactly(const ForwardRun& run, const Sequence& sequence, int64_t kv_head, int64_t row_index,
                        float* out) {
  const AttentionProblem& problem = *run.problem;
  const int64_t group = problem.gqa_ratio(), dv = problem.head_dim_v;
  Row row{run,
          sequence,
          kv_head * group + row_index % group,
          row_index / group,
          row_index / group + sequence.offset,
          {},
          locate_keys(problem, *run.args, sequence, Slot::kK, kv_head),
          locate_keys(problem, *run.args, sequence, Slot::kV, kv_head)};
  row.keys = visible_keys(problem, sequence.k_len, row.position);
  constexpr float kHidden = -std::numeric_limits<float>::infinity();
  float m = kHidden;
  for (int64_t key = row.keys.lo; key < row.keys.hi; ++key) m = std::fmax(m, row.score(key));
  if (problem.sinks) m = std::fmax(m, run.args->sinks[row.head] * kLog2e);
  float l = problem.sinks ? std::exp2(run.args->sinks[row.head] * kLog2e - m) : 0.0f;
  for (int64_t c = 0; c < dv; ++c) out[c] = 0.0f;
  for (int64_t key = row.keys.lo; key < row.keys.hi; ++key) {
    const float score = row.score(key);
    if (score == kHidden) continue;
    const float p = std::exp2(score - m);
    l += p;
    if (run.terms.dropout && !key_is_kept(run.terms, sequence.batch, row.head, row.query, key)) continue;
    const int64_t v = row.v_rows.offset(key);
    for (int64_t c = 0; c < dv; ++c) out[c] += p * load(run.args->v, problem.dtype, v + c);
  }
  for (int64_t c = 0; c < dv; ++c) out[c] = out[c] / l * run.terms.keep_scale;
}

}  // namespace heed::cpu
