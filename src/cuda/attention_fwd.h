// What the three forward rows share on the host: which problems the kernels can take at all, how the work is cut into
// blocks and splits, the parameter block, and the steps around the attention kernel itself.
//
// A row says how it would do a problem on a device as a Configuration: a pure function of both, tested without a GPU.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/device.h"
#include "cuda/kernels/params.h"
#include "cuda/variants.h"
#include "ops/attention.h"
#include "plan/impl.h"

namespace heed::cuda {

// What a kernel by bulk copies is told of its keys.
struct Mapping {
  int32_t tile_k = 0;
  // attention_decode_sm90: chunks of 64 columns that a box of k and one of v has; 0: maps without that dimension.
  int32_t k_chunks = 0, v_chunks = 0;
};

struct Configuration {
  std::string kernel;  // for explain: "attention_fwd_sm80 q128 k64"
  KernelVariant variant;
  int32_t tile_q = 0, tile_k = 0;
  int32_t rows_per_query = 1;  // query heads of a kv head that share a tile
  int64_t num_tiles_q = 0;     // of a head: of one sequence, packed queries: of all
  int64_t blocks = 0;
  int64_t grid = 0;           // blocks launched where each does several of those, one after the other; 0: as many
  bool maps_tensors = false;  // the kernel takes AttentionFwdSm90Params
  Mapping mapping;            // then; tile_k is filled in
  bool alone = false;  // fewer blocks than multiprocessors: no two of them shall share one, as they otherwise might
  bool packs_mask = false;    // the mask tensor becomes bits first
  bool counts_tiles = false;  // blocks take their tiles from a counter in the workspace
  int64_t section_heads = 0;  // heads whose K and V share the L2 cache; 0: half of it is theirs
  int32_t max_splits = 1;     // more than one: partials, merged by combine
  int32_t split_tiles = 0;    // key tiles of a split
  // split only: blocks have equal shares of all keys instead, whose partials the kernel merges itself, without combine.
  bool shares = false;
  int32_t heads_together = 1;    // then: blocks with the same share, of as many kv heads
  bool finds_bad_pages = false;  // check_sequences need not run for it
  bool split = false;            // the variant writes partials (a single split does too where the bits must not change)
  // Two kernels may share a batch: this one takes sequences of so many queries, heads of a group counted; 0: no limit.
  int64_t min_rows = 0, max_rows = 0;
  int64_t partial_queries = 0;  // of a sequence that partials hold; 0: all of them
  double cost_us = 0;           // of all kernels of the list
};

// The attention kernels of a plan, in order: one, or two that share the batch.
using Configurations = std::vector<Configuration>;

// Why no kernel here takes the problem ("" where some does): wrong device, pass, dtype, or too many blocks.
std::string common_limits(const AttentionProblem& problem, const DeviceFacts& facts);

// Yes where the grid is one that the device takes.
Verdict accept_if_it_fits(const Configurations& configurations);

// Lengths, places or pages come from the device: data that may be wrong, so that a caller who asks for status gets more than
// zeros.
bool may_be_bad(const AttentionProblem& problem);

// q, k, v and out: the largest power of two that divides every row's address.
int32_t row_align(const AttentionProblem& problem);

// Rows of q whose queries are attended, all sequences: batch * seqlen_q, or total_q.
int64_t total_rows(const AttentionProblem& problem);
// Keys a sequence may have, at most; packed: all of them.
int64_t most_keys(const AttentionProblem& problem);
// Queries a sequence has: the capacity; packed: the mean.
int64_t usual_queries(const AttentionProblem& problem);
// Keys a sequence has: the capacity; packed: the mean.
int64_t usual_keys(const AttentionProblem& problem);

// Tiles and blocks for a tile height, before splitting.
void cut_rows(const AttentionProblem& problem, Configuration& configuration);

// Keys of a split where batch_invariant fixes it, whatever the sequence.
constexpr int64_t kInvariantSplitKeys = 1024;

// Cuts keys so that `slots` blocks, those that the device runs at once, have work: the fewest splits that make `of_best` of the
// best use of them. problem.splits, where given, is taken as it is. `least_tiles`: a split is no shorter.
void cut_keys(const AttentionProblem& problem, int64_t slots, int64_t least_tiles, Configuration& configuration,
              double of_best = 0.85);

// Bytes that q, k, v, out move at least, and multiply-adds as the field counts them, in microseconds on this device.
struct Rates {
  double flops_per_us_sm;  // of a multiprocessor
  double bytes_per_us_sm;
};
double roofline_us(const AttentionProblem& problem, const DeviceFacts& facts, const Rates& rates);

// How much longer than flops() says a kernel multiplies: rows of a tile that no query owns, multiprocessors without a block,
// and rows that see more keys than others and end last.
double waste_of(const AttentionProblem& problem, const Configuration& configuration, const DeviceFacts& facts);

// Steps: check_sequences where device data decides what is read and the attention kernel does not look at it itself, or status is
// asked for; the attention kernel; combine where keys are split.
Status prepare_attention_fwd(const AttentionProblem& problem, const DeviceFacts& facts,
                             const Configurations& configurations, Plan<AttentionProblem>& plan);

// The kernels that those steps launch.
std::vector<KernelVariant> variants_of(const AttentionProblem& problem, const Configurations& configurations);

// What each row would do; check() has accepted the problem. Declared here for variants_of and for tests.
Configurations configure_attention_fwd_sm80(const AttentionProblem& problem, const DeviceFacts& facts);
Configurations configure_attention_fwd_sm90(const AttentionProblem& problem, const DeviceFacts& facts);
Configurations configure_attention_decode_sm80(const AttentionProblem& problem, const DeviceFacts& facts);
Configurations configure_attention_decode_sm90(const AttentionProblem& problem, const DeviceFacts& facts);
Configurations configure_attention_fwd_portable(const AttentionProblem& problem, const DeviceFacts& facts);
Verdict check_attention_fwd_sm80(const AttentionProblem& problem, const DeviceFacts& facts);
Verdict check_attention_fwd_sm90(const AttentionProblem& problem, const DeviceFacts& facts);
Verdict check_attention_decode_sm80(const AttentionProblem& problem, const DeviceFacts& facts);
Verdict check_attention_decode_sm90(const AttentionProblem& problem, const DeviceFacts& facts);
Verdict check_attention_fwd_portable(const AttentionProblem& problem, const DeviceFacts& facts);

// Why the decode kernels do not take the problem with so many rows (queries of a sequence times heads of a group); "" where
// they do.
std::string decode_limits(const AttentionProblem& problem, int64_t rows);
// Queries of a sequence as they usually are, heads of a group counted.
int64_t usual_rows(const AttentionProblem& problem);
// Why bulk tensor copies cannot bring q, k, v and out; "" where they can. `nearest`: who can.
std::string map_limits(const AttentionProblem& problem, const char* nearest);
// Why Hopper's kernels do not run on a device; "" where they do.
std::string hopper_limits(const DeviceFacts& facts);

// What attention_fwd_sm90's parameters have besides params.common and the counter, from the problem and those: tensor maps of
// q, k, v and out there.
Status map_tensors(const AttentionProblem& problem, const Mapping& mapping, AttentionFwdSm90Params& params);

// The mask tensor's bits for key tiles of tile_k: [batch or 1, heads or 1, rows or 1, words], and the words from one tile of
// keys to the next, 0 where the mask is broadcast over keys. False where those are too many to count by 32 bits.
struct MaskBits {
  int64_t sequences, heads, rows, keys, words, words_of_tile;
  int64_t total = 0;  // words of all rows
};
bool mask_bits(const AttentionProblem& problem, int32_t tile_k, MaskBits& bits);

// batch_invariant: how decode does the sequences that have few enough queries by themselves, whatever the capacity; its
// max_rows says how few. None where decode does not take the problem's features.
Configurations configure_invariant_decode(const AttentionProblem& problem, const DeviceFacts& facts);

// The kernels that the planner's choice among these rows would launch on such a device; empty where none takes it.
std::vector<KernelVariant> variants_of(const AttentionProblem& problem, const DeviceFacts& facts);

// Impl's check from a row's: the problem's device is looked up first.
Verdict check_on_device(const AttentionProblem& problem, Verdict (*check)(const AttentionProblem&, const DeviceFacts&));

// The row of the registry that is made of a check and a configure above.
template <Verdict (*kCheck)(const AttentionProblem&, const DeviceFacts&),
          Configurations (*kConfigure)(const AttentionProblem&, const DeviceFacts&)>
constexpr Impl<AttentionProblem> forward_row(std::string_view name, std::string_view summary) {
  return {name,
          summary,
          false,
          [](const AttentionProblem& problem, const Machine&) { return check_on_device(problem, kCheck); },
          [](const AttentionProblem& problem, const Machine&) {
            return kConfigure(problem, *device_facts(problem.device_index).value()).front().cost_us;
          },
          [](const AttentionProblem& problem, const Machine&, Plan<AttentionProblem>& plan) {
            const DeviceFacts& facts = *device_facts(problem.device_index).value();
            return prepare_attention_fwd(problem, facts, kConfigure(problem, facts), plan);
          }};
}

}  // namespace heed::cuda
