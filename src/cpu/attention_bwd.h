// The backward pass on the CPU, between the file that divides the work (attention_bwd.cpp) and the kernels that do it.
//
// A task is one (sequence, kv head, block of keys). It owns that block's dK and dV and walks the query blocks that see
// it, for every query head of the group:
//
//   S = Q K^T    P = exp(scale S - lse)    dP = dO V^T    dS = scale P (dP - delta)
//   dV += P^T dO    dK += dS^T Q    dQ += dS K
//
// Tiles have queries as rows and keys as lanes: K and V are transposed once per task, Q and dO never.
//
// dQ rows get a contribution from every block of keys. They are added in the order of the blocks, whichever threads
// compute them: each (head, query block) has a turn counter, and a task adds when its turn has come. Tasks are claimed
// in an order in which a block of keys comes after the blocks it waits for, so whoever is waited for is running: no
// deadlock, whatever the executor does, and the same bits whatever the number of threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cpu/score.h"
#include "cpu/sequence.h"
#include "ops/attention.h"

namespace heed::cpu {

constexpr int64_t kVectorPad = 16;                    // rows of scratch are whole vectors of the widest target
constexpr int64_t kKeepBefore = 16, kKeepAfter = 64;  // room around a row of dropout factors, drawn 64 at a time

// Blocking: from head dims only, so that results depend on nothing else.
struct BackwardShape {
  int64_t head_dim = 0, head_dim_v = 0;
  int64_t d_pad = 0, dv_pad = 0;  // rounded up to kVectorPad
  int64_t query_block = 0;        // rows of a tile: a multiple of the register tile's 6
  int64_t key_block = 0;          // lanes of a tile: a multiple of 64
  int64_t tile_stride = 0;        // of S and dP: key_block and a little, so that columns do not meet in one cache set
};
BackwardShape backward_shape(const AttentionProblem& problem);

// Offsets in floats into one worker's scratch.
struct BackwardScratch {
  int64_t k_rows = 0, k_lanes = 0, v_lanes = 0;  // [key][d], [d][key] and [d][key] in panels of keys
  int64_t dk = 0, dv = 0;                        // [key][d]
  int64_t q = 0, dout = 0, dq = 0;               // [query][d]
  int64_t s = 0, dp = 0;                         // [query][key]: scores, then P; dP, then dS
  int64_t row = 0;        // one row of keys each: bias, mask, dropout, dS before the softcap's slope
  int64_t shown = 0;      // bytes [query][key], on the exact path
  int64_t bias_sums = 0;  // [query][key], where dbias has broadcast dimensions
  int64_t floats = 0;
};
BackwardScratch lay_out_scratch(const BackwardShape& shape, bool bias_sums);

struct BackwardKernels;

// Sections of the workspace, in bytes from its start.
struct BackwardWorkspace {
  size_t sequences = 0, first_task = 0, delta = 0, dq_sum = 0, turns = 0, head_turns = 0, dalibi = 0, dsinks = 0,
         scratch = 0;
  size_t bytes = 0;
};

// One run: everything that its tasks read.
struct BackwardRun {
  const AttentionProblem* problem = nullptr;
  const AttentionArgs* args = nullptr;
  const BackwardKernels* kernels = nullptr;
  BackwardShape shape;
  BackwardScratch layout;
  ScoreTerms terms;
  Sequence* sequences = nullptr;  // [batch]
  int64_t* first_task = nullptr;  // [batch + 1]
  float* delta = nullptr;         // per query row: rowsum(dout * out) - dlse
  float* dq_sum = nullptr;        // f32 sums of dQ; null: dq is f32 itself
  int32_t* turns = nullptr;       // per (query head, query block): blocks of keys that have been added
  int32_t* head_turns = nullptr;  // per (sequence, kv head): the same for dalibi
  double* dalibi = nullptr;       // per (sequence, query head)
  double* dsinks = nullptr;       // per (sequence, query head)
  float* scratch = nullptr;       // of worker 0

  // Where a query row stands in delta and dq_sum.
  int64_t row_index(const Sequence& s, int64_t h, int64_t i) const {
    if (problem->packed_q()) return h * problem->total_q + s.q_begin + i;
    return (s.batch * problem->nheads_q + h) * problem->seqlen_q + i;
  }
  // Where a query block's turn counter stands. Packed: blocks of a sequence never reach those of the next.
  int64_t turn_index(const Sequence& s, int64_t h, int64_t block) const {
    const int64_t rows = shape.query_block;
    if (problem->packed_q()) {
      return h * (problem->total_q / rows + problem->batch + 1) + s.q_begin / rows + s.batch + block;
    }
    return (s.batch * problem->nheads_q + h) * ((problem->seqlen_q + rows - 1) / rows) + block;
  }
  int64_t num_query_blocks(const Sequence& s) const { return (s.q_len + shape.query_block - 1) / shape.query_block; }
  int64_t num_key_blocks(const Sequence& s) const { return (s.k_len + shape.key_block - 1) / shape.key_block; }
  // Keys that some row of a query block sees. Ranges of neighbouring rows overlap or touch, so there is no hole in it.
  KeyRange keys_of_block(const Sequence& s, int64_t block) const {
    const int64_t first = block * shape.query_block, last = std::min(first + shape.query_block, s.q_len) - 1;
    const int64_t lo = visible_keys(*problem, s.k_len, first + s.offset).lo;
    return {lo, std::max(lo, visible_keys(*problem, s.k_len, last + s.offset).hi)};
  }
};

struct KeyBlockTask {
  const Sequence* sequence = nullptr;
  int64_t kv_head = 0;
  int64_t block = 0;
};

// A part of dbias that is summed over broadcast dimensions: the sequences, heads, query blocks and key blocks in it.
struct BiasPart {
  int64_t first_batch = 0, end_batch = 0;
  int64_t first_head = 0, end_head = 0;
  int64_t first_query_block = 0, end_query_block = 0;
  int64_t first_key_block = 0, end_key_block = 0;
};

// The kernels of one instruction set.
struct BackwardKernels {
  void (*delta_rows)(const BackwardRun& run, const Sequence& sequence, int64_t head);
  void (*key_block)(const BackwardRun& run, const KeyBlockTask& task, float* scratch);
  void (*bias_part)(const BackwardRun& run, const BiasPart& part, float* scratch);
  void (*narrow_dq)(const BackwardRun& run, const Sequence& sequence, int64_t head);
};
const BackwardKernels* backward_kernels_avx512();  // null: not compiled in
const BackwardKernels* backward_kernels_avx2();
const BackwardKernels* backward_kernels_neon();
const BackwardKernels* backward_kernels_generic();

// Waits until `turn` reads `mine`: whatever the tasks before this one wrote is then visible.
void await_turn(int32_t* turn, int32_t mine);
void pass_turn(int32_t* turn, int32_t next);

}  // namespace heed::cpu
