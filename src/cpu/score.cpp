#include "cpu/score.h"

#include <algorithm>

#include "base/philox.h"

namespace heed::cpu {

ScoreTerms make_score_terms(const AttentionProblem& problem, const AttentionArgs& args) {
  ScoreTerms terms;
  terms.factor = static_cast<float>(static_cast<double>(args.softmax_scale) * 1.4426950408889634);
  if (problem.softcap) terms.softcap = args.softcap * kLog2e;
  if (problem.bias()) {
    terms.bias = args.bias;
    terms.bias_dtype = problem.bias_dtype;
    std::copy_n(problem.strides(Slot::kBias).begin(), 4, terms.bias_stride);
  }
  if (problem.mask) {
    terms.mask = args.mask;
    std::copy_n(problem.strides(Slot::kMask).begin(), 4, terms.mask_stride);
  }
  if (problem.alibi) {
    terms.slopes = args.alibi_slopes;
    std::copy_n(problem.strides(Slot::kAlibi).begin(), 2, terms.slope_stride);
  }
  if (problem.dropout) {
    const uint64_t seed = args.dropout_seed_ptr != nullptr ? *args.dropout_seed_ptr : args.dropout_seed;
    const uint64_t offset = args.dropout_offset_ptr != nullptr ? *args.dropout_offset_ptr : args.dropout_offset;
    terms.dropout = true;
    terms.keep_below = dropout_threshold(args.dropout_p);
    terms.keep_scale = args.dropout_p < 1.0f ? 1.0f / (1.0f - args.dropout_p) : 0.0f;
    terms.philox_key[0] = static_cast<uint32_t>(seed);
    terms.philox_key[1] = static_cast<uint32_t>(seed >> 32) ^ static_cast<uint32_t>(offset >> 32);
    terms.philox_offset = static_cast<uint32_t>(offset);
    std::copy_n(args.index_base.begin(), 4, terms.index_base);
  }
  terms.nheads_q = problem.nheads_q;
  return terms;
}

bool key_is_kept(const ScoreTerms& terms, int64_t batch, int64_t head, int64_t query, int64_t key) {
  const uint64_t j = static_cast<uint64_t>(key + terms.index_base[3]);
  const int64_t bh = (batch + terms.index_base[0]) * terms.nheads_q + head + terms.index_base[1];
  const auto words = philox4x32_10({static_cast<uint32_t>(j / 4), static_cast<uint32_t>(query + terms.index_base[2]),
                                    static_cast<uint32_t>(bh), terms.philox_offset},
                                   {terms.philox_key[0], terms.philox_key[1]});
  return words[j % 4] < terms.keep_below;
}

void fill_lanes(const AttentionProblem& problem, const ScoreTerms& terms, const Sequence& sequence, int64_t kv_head,
                int64_t first_row, int64_t count, LaneBlock* lanes) {
  const int64_t group = problem.gqa_ratio();
  lanes->batch = sequence.batch;
  lanes->count = static_cast<int32_t>(count);
  for (int64_t lane = 0; lane < kBlockLanes; ++lane) {
    const int64_t row = first_row + std::min(lane, count - 1);
    const int64_t i = row / group, h = kv_head * group + row % group;
    lanes->query[lane] = static_cast<int32_t>(i);
    lanes->head[lane] = static_cast<int32_t>(h);
    lanes->position[lane] = i + sequence.offset;
    const KeyRange range = visible_keys(problem, sequence.k_len, i + sequence.offset);
    lanes->lo[lane] = range.lo;
    lanes->hi[lane] = range.hi;
    lanes->slope[lane] =
        terms.slopes == nullptr
            ? 0.0f
            : terms.slopes[sequence.batch * terms.slope_stride[0] + h * terms.slope_stride[1]] * kLog2e;
  }
}

}  // namespace heed::cpu
