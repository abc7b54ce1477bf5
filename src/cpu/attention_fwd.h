// The forward pass on the CPU, between the file that divides the work (attention_fwd.cpp) and the kernels that do it.
//
// A unit is one (sequence, kv head) and up to `unit_rows` packed query rows r = i * gqa_ratio + g: K and V stream once
// for the whole group of query heads. Keys are taken in chunks whose size depends on the sequence's own lengths alone;
// each chunk gives a partial (m, l, O), and partials are merged in chunk order. So it makes no difference to the bits
// whether one thread walks all chunks or each is a task of its own.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "cpu/score.h"
#include "cpu/sequence.h"
#include "ops/attention.h"

namespace heed::cpu {

// Up to so many rows take the decode loop, whose lanes are head_dim; more take the loop whose lanes are query rows.
constexpr int64_t kDecodeRows = 8;
constexpr int64_t kDecodeHeads = 8;   // kv heads of a decode unit, at most
constexpr int64_t kDecodeBlock = 64;  // keys of one decode step
constexpr int64_t kRowPad = 16;       // rows of scratch are whole vectors of the widest target

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// What multiplies where lanes are query rows: FMA of f32, the bf16 dot product of AVX-512, or AMX.
enum class Products : uint8_t { kF32, kBf16Dot, kAmx };

// Blocking: from head dims only, so that results depend on nothing else.
struct ForwardShape {
  int64_t head_dim = 0, head_dim_v = 0;
  int64_t key_block = 128;   // keys per step of a unit
  int64_t unit_rows = 256;   // at most; a run with few units takes fewer, which changes no bit
  bool decode_only = false;  // no sequence can have more than kDecodeRows rows
  int64_t decode_rows = 8;   // of a decode unit, all its kv heads together
  bool modified = false;     // bias or mask: scratch for their tiles
  Products products = Products::kF32;

  // Dimensions of a row as operands hold them: AMX multiplies 32 at a time, the dot product pairs.
  int64_t operand_dim() const { return products == Products::kAmx ? round_up(head_dim, 32) : head_dim; }
};

// Offsets in floats into one worker's scratch.
struct ScratchLayout {
  int64_t lanes = 0, q = 0, s = 0, tile = 0, row = 0, k = 0, v = 0;
  int64_t part = 0, sum = 0;                                    // partials: of a chunk, of the chunks so far
  int64_t q_pairs = 0, k_rows16 = 0, v_pairs = 0, p_pairs = 0;  // operands of bf16
  int64_t floats = 0;
};
ScratchLayout lay_out_scratch(const ForwardShape& shape);
// Floats of one partial (O, then m, then l) of `rows` rows.
int64_t partial_floats(const ForwardShape& shape, int64_t rows);

struct SequenceWork {
  Sequence where;
  int64_t first_task = 0;
  int64_t first_unit = 0;  // among the units whose chunks are tasks
  int64_t row_blocks = 0;  // units per kv head, or per group of kv heads
  int64_t unit_heads = 1;  // kv heads of a unit
  int64_t chunk_keys = 0;
  int64_t num_chunks = 0;  // ceil(k_len / chunk_keys), at least 1
  bool decode = false;
};

struct ForwardKernels;
struct Bf16Tiles;

// One run: everything that its tasks read.
struct ForwardRun {
  const AttentionProblem* problem = nullptr;
  const AttentionArgs* args = nullptr;
  const ForwardKernels* kernels = nullptr;
  const Bf16Tiles* bf16 = nullptr;  // null: products of f32
  ForwardShape shape;
  ScratchLayout layout;
  ScoreTerms terms;
  float scale = 1.0f;     // softmax_scale * log2(e): what products of Q as it is need
  float q_factor = 1.0f;  // f32: Q is multiplied by this; terms.factor is what is left for the products
  int64_t unit_rows = 256;
  int64_t decode_heads = 1;
  bool split = false;          // chunks are tasks of their own
  int64_t partial_stride = 0;  // floats between partials
  SequenceWork* sequences = nullptr;
  int64_t num_sequences = 0;  // batch + 1: the last one is packed rows after every sequence
  int64_t num_tasks = 0;
  std::atomic<int32_t>* pending = nullptr;  // per unit: chunks not yet done
  float* partials = nullptr;
};

struct UnitTask {
  const SequenceWork* work = nullptr;
  int64_t kv_head = 0, num_heads = 1;
  int64_t first_row = 0, num_rows = 0;  // packed query rows, of each kv head
  int64_t chunk = -1;                   // -1: all, here
  std::atomic<int32_t>* pending = nullptr;
  float* partials = nullptr;  // of this unit, chunk after chunk
};

// The kernels of one instruction set.
struct ForwardKernels {
  void (*attend)(const ForwardRun& run, const UnitTask& task, float* scratch);
};
const ForwardKernels* forward_kernels_avx512();  // null: not compiled in
const ForwardKernels* forward_kernels_avx2();
const ForwardKernels* forward_kernels_neon();
const ForwardKernels* forward_kernels_generic();

// One output row by the formula, key by key, with hidden and dropped V rows left unread: for rows whose ordinary result
// is NaN although their row sum is not, where 0 * NaN or 0 * Inf of a hidden row may be the cause. out: head_dim_v
// floats.
void attend_row_exactly(const ForwardRun& run, const Sequence& sequence, int64_t kv_head, int64_t row, float* out);

// Writes out = 0 and lse = -inf for rows [first_row, first_row + num_rows) of the sequence, every head.
void clear_query_rows(const ForwardRun& run, const Sequence& sequence, int64_t first_row, int64_t num_rows);

}  // namespace heed::cpu
