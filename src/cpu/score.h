// What turns a product q.k into a score, and which query a lane is: plain structs that the kernels of every instruction
// set share, forward and backward. Scores are kept in units of log2(e), so that probabilities are exp2(score - max).
#pragma once

#include <cstdint>

#include "cpu/sequence.h"
#include "ops/attention.h"

namespace heed::cpu {

constexpr int kBlockLanes = 64;  // query rows that a kernel handles side by side
constexpr float kLog2e = 1.442695040888963f;
constexpr float kLn2 = 0.6931471805599453f;

// The score's terms for one run; pointers are args' own.
struct ScoreTerms {
  float factor = 1.0f;   // products times this are scores; 1 where Q has been multiplied by it already
  float softcap = 0.0f;  // in log2 units; 0: off
  const void* bias = nullptr;
  Dtype bias_dtype = Dtype::kNone;
  int64_t bias_stride[4] = {};
  const uint8_t* mask = nullptr;
  int64_t mask_stride[4] = {};
  const float* slopes = nullptr;
  int64_t slope_stride[2] = {};
  bool dropout = false;
  float keep_scale = 1.0f;  // 1/(1-p), 0 for p = 1
  uint64_t keep_below = 0;  // a key is kept iff its word is below this
  uint32_t philox_key[2] = {};
  uint32_t philox_offset = 0;  // counter word 3
  int64_t index_base[4] = {};
  int64_t nheads_q = 0;

  bool plain() const {
    return factor == 1.0f && softcap == 0.0f && bias == nullptr && mask == nullptr && slopes == nullptr;
  }
};

// `factor` starts as softmax_scale * log2(e), whole: whoever multiplies Q by it sets it to 1.
ScoreTerms make_score_terms(const AttentionProblem& problem, const AttentionArgs& args);

// Dropout, one key: batch, query head, query and key within the sequence.
bool key_is_kept(const ScoreTerms& terms, int64_t batch, int64_t head, int64_t query, int64_t key);

// Up to 64 packed query rows r = i * gqa_ratio + g of one (sequence, kv head), as lanes. Lanes past `count` repeat the
// last row; what they compute is thrown away. lo and hi never fall from lane to lane.
struct LaneBlock {
  int64_t batch = 0;
  int32_t count = 0;
  alignas(64) int32_t query[kBlockLanes];     // i, within the sequence
  alignas(64) int32_t head[kBlockLanes];      // query head
  alignas(64) int64_t position[kBlockLanes];  // i + offset
  alignas(64) int64_t lo[kBlockLanes];        // visible keys by causal, window, chunk and length: lo <= j < hi
  alignas(64) int64_t hi[kBlockLanes];
  alignas(64) float slope[kBlockLanes];  // ALiBi, in log2 units
};

// Lanes for rows first_row, first_row + 1, ... of the sequence; count = min(64, rows left) must be at least 1.
void fill_lanes(const AttentionProblem& problem, const ScoreTerms& terms, const Sequence& sequence, int64_t kv_head,
                int64_t first_row, int64_t count, LaneBlock* lanes);

}  // namespace heed::cpu
