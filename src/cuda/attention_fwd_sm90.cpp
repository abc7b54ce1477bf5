// The row cuda/attention_fwd_sm90: f16 and bf16 by bulk copies and warpgroup products, on Hopper.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>
#include <random>

#include "base/format.h"
#include "cuda/attention_fwd.h"
#include "cuda/kernels/work_sm90.h"

namespace heed::cuda {
namespace {

constexpr int64_t kLeastKeysToSplit = 512;
constexpr int32_t kLongestTile = 128;  // of keys
constexpr int64_t kMostSharing = 64;   // heads
constexpr i32 kFarthest = 1 << 30,
              kMostRows = kFarthest - 1024;  // row + shift stays within 31 bits, in the last tile too

// Done on tiles for terms; softcap by itself only where no other tile takes it.
bool has_terms(const AttentionProblem& p) {
  if (p.bias() || p.alibi || p.mask || p.dropout) return true;
  const HeadDims* const dims = padded_head_dims(p.head_dim, p.head_dim_v);
  return p.softcap && dims != nullptr && !caps_scores(dims->head_dim);
}

// Lengths, or the places of keys, that the host does not know; what is rarer is done where those are. (With batch_invariant
// one kernel does a sequence alone and in any batch.)
bool has_lengths(const AttentionProblem& p) {
  return has_terms(p) || p.softcap || may_be_bad(p) || p.chunk > 0 || p.out_dtype != p.dtype || p.batch_invariant;
}
// How a configuration goes about it, beside its tile.
struct Way {
  bool splits = false;
  bool shares = false;  // heads of a group share tiles
  bool lengths(const AttentionProblem& p, const AttentionFwdSm90Tile& tile) const {
    return shares || has_lengths(p) || (splits && (!splits_alone(tile) || p.window_left >= 0));
  }
  bool ranges(const AttentionProblem& p) const {
    return p.window_left >= 0 || p.window_right >= 0 || splits || shares || has_lengths(p);
  }
};
bool may_share(const AttentionProblem& p) {
  return p.gqa_ratio() > 1 && p.gqa_ratio() <= kMostSharing && !has_terms(p) && !p.batch_invariant;
}

// Rows and sequences that a tensor map of q or out, and of k or v, counts.
std::array<int64_t, 2> rows_of_q(const AttentionProblem& p) {
  return p.packed_q() ? std::array<int64_t, 2>{p.total_q, 1} : std::array<int64_t, 2>{p.seqlen_q, p.batch};
}
std::array<int64_t, 2> rows_of_k(const AttentionProblem& p) {
  if (p.paged()) return {p.page_size, p.num_pages};
  if (p.packed_k()) return {p.total_k, 1};
  return {p.seqlen_k, p.cache_batch > 0 ? p.cache_batch : p.batch};
}

// Strides that a bulk copy can take: none backwards.
// Of a dimension of one nothing is asked.
bool strides_fit(const std::array<int64_t, 4>& strides, const std::array<int64_t, 3>& sizes) {
  for (size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] > 1 && (strides[i] < 0 || strides[i] >= int64_t{1} << 38)) return false;
  return true;
}

// Rows that the swizzle's pattern takes to come round: a bulk copy starts at a multiple of them.
constexpr int64_t kSwizzleRows = 8;

// Rows of k and v that one bulk copy takes: of pages what divides both a page and a tile.
int32_t box_rows(const AttentionProblem& p, int32_t tile_k) {
  return p.paged() ? static_cast<int32_t>(std::gcd(p.page_size, int64_t{tile_k})) : tile_k;
}

bool tensors_fit(const AttentionProblem& p) {
  const auto [q_rows, q_sequences] = rows_of_q(p);
  const auto [k_rows, k_sequences] = rows_of_k(p);
  const std::array<int64_t, 3> of_q = {q_sequences, p.nheads_q, q_rows}, of_k = {k_sequences, p.nheads_kv, k_rows};
  return strides_fit(p.strides(Slot::kQ), of_q) && strides_fit(p.strides(Slot::kOut), of_q) &&
         strides_fit(p.strides(Slot::kK), of_k) && strides_fit(p.strides(Slot::kV), of_k);
}

// Where the host knows the lengths.
int64_t offset_of(const AttentionProblem& p) {
  return p.offset_kind == OffsetKind::kBottomRight ? p.seqlen_k - p.seqlen_q
         : p.offset_kind == OffsetKind::kTopLeft   ? 0
                                                   : p.q_offset;
}

// [sequence, head, row, column] as the driver counts dimensions, the innermost first; with several heads in a box those come
// before rows. box_chunks: the map has a fifth dimension, chunks of 64 columns, where that is more than 1, and so many of them are
// in a box; 0: it has none. The L2 cache is asked for 128 bytes at a time: by 256 memory delivers 8 % less.
Status encode(const char* name, const void* data, Dtype dtype, i64 columns, i64 rows, i64 heads, i64 sequences,
              const Strides3& stride, uint32_t box_rows, uint32_t box_heads, uint32_t box_chunks, TensorMap& map) {
  constexpr int32_t kFloat16 = 6, kBfloat16 = 9, kNoInterleave = 0, kSwizzle128 = 3, kPromoteL2To128 = 2, kFillZero = 0;
  const auto bytes = [](i64 size, i64 elements) { return static_cast<uint64_t>(size > 1 ? elements * 2 : 16); };
  constexpr i64 kChunk = 64;
  const bool whole = box_chunks > 1;
  uint64_t sizes[5] = {static_cast<uint64_t>(whole ? kChunk : columns), static_cast<uint64_t>(rows),
                       static_cast<uint64_t>(heads), static_cast<uint64_t>(sequences),
                       static_cast<uint64_t>(whole ? columns / kChunk : 1)};
  uint64_t strides[4] = {bytes(rows, stride.s), bytes(heads, stride.h), bytes(sequences, stride.b), kChunk * 2};
  uint32_t box[5] = {kChunk, box_rows, box_heads, 1, box_chunks};
  if (box_heads > 1) std::swap(sizes[1], sizes[2]), std::swap(strides[0], strides[1]), std::swap(box[1], box[2]);
  const uint32_t every[5] = {1, 1, 1, 1, 1};
  const CUresult result = driver().value()->tensor_map_encode_tiled(
      reinterpret_cast<CUtensorMap*>(&map), dtype == Dtype::kBf16 ? kBfloat16 : kFloat16, box_chunks > 0 ? 5 : 4,
      const_cast<void*>(data), sizes, strides, box, every, kNoInterleave, kSwizzle128, kPromoteL2To128, kFillZero);
  if (result == kCudaSuccess) return {};
  return driver_error(
      result, heed::format("cuTensorMapEncodeTiled({} at {}, {} x {} x {} x {}, strides {} {} {} bytes)", name, data,
                           sizes[3], sizes[2], sizes[1], columns, strides[2], strides[1], strides[0]));
}

i32 near(int64_t shift) { return static_cast<i32>(std::clamp<int64_t>(shift, -kFarthest, kFarthest)); }

// A shift by a window that may be as large as it likes.
i32 shifted(int64_t offset, int64_t by) {
  int64_t sum = 0;
  return __builtin_add_overflow(offset, by, &sum) ? (by < 0 ? -kFarthest : kFarthest) : near(sum);
}

// No memory holds this by chance: 40 random bits, drawn once a process.
u64 counter_mark() {
  static const u64 mark = [] {
    std::random_device source;
    return ((u64{source()} << 32 | source()) | 1) << kTileBits;
  }();
  return mark;
}

// Rows see more keys the further back they are: blocks take the next tile as they become free, the longest first.
bool rows_differ(const AttentionProblem& p) { return p.window_right >= 0 && p.window_left < 0; }

// What a block multiplies and adds in a microsecond. Blocks that share a multiprocessor share its rate, which they reach
// together only.
double rate_of(const AttentionFwdSm90Tile& t, const Configuration& c, const DeviceFacts& facts) {
  constexpr double kMultiprocessors = 132;  // of an H200
  const double sharing = std::max(1.0, std::ceil(static_cast<double>(c.grid) / std::max(1, facts.multiprocessors)));
  return t.rate * 1e6 / kMultiprocessors * (0.5 + 0.5 * std::min(1.0, sharing / t.blocks)) / sharing;
}

// Blocks do their tiles one after the other: the fullest block's time. A turn starts with loads and ends with O, which the
// other consumers' products hide in part.
double cost_of(const AttentionProblem& p, const Configuration& c, const AttentionFwdSm90Tile& t,
               const DeviceFacts& facts) {
  const double keys = static_cast<double>(usual_keys(p));
  const double all = static_cast<double>(total_rows(p) * p.nheads_q);
  const double visible = flops(p) / std::max(1.0, 2.0 * all * keys * static_cast<double>(p.head_dim + p.head_dim_v));
  // A row's range ends within a key tile, and so it begins, where it does.
  const double whole = c.split ? double{1} * c.split_tiles * t.tile_k : std::ceil(keys / t.tile_k) * t.tile_k;
  // Where heads share a tile its rows are of fewer queries, whose ranges differ less.
  const double alike = rows_differ(p) || p.window_left >= 0 ? (64.0 - 64.0 / c.rows_per_query) / 2 : 0.0;
  const double seen = t.ranges ? std::min(whole, std::max(t.tile_k / 2.0, keys * std::min(1.0, visible) / c.max_splits +
                                                                              t.tile_k / 2.0 - alike))
                               : whole;
  // What heads that share a tile cost where lengths would not: the variant with lengths (D 64 causal 4k 512 against 566, D 128 726
  // against 744 TFLOP/s; 16 heads of 512 keys, D 64, 8.3 us against 6.7).
  const bool is_sharing = c.rows_per_query > 1 && !has_lengths(p);
  const double of_lengths = is_sharing ? 1.0 : 0.0, slow = !is_sharing ? 1.0 : t.consumers == 4 ? 1.1 : 1.03;
  const double of_a_key = slow * 2.0 * tile_q(t) * (t.head_dim + t.head_dim_v) / rate_of(t, c, facts);
  // Of packed queries there are, in the mean, half as many tiles too many as there are sequences.
  const double tiles = static_cast<double>(c.blocks) -
                       (p.packed_q() ? 0.5 * static_cast<double>(p.batch * p.nheads_q / c.rows_per_query) : 0.0);
  const double turns = tiles / static_cast<double>(std::max<int64_t>(1, c.grid));
  const double of_a_turn = of_lengths + 0.8 + 0.6 * t.consumers + (t.blocks > 1 ? 0.3 * t.blocks : 0.0);
  const double longest = of_a_turn + whole * of_a_key, usual = of_a_turn + seen * of_a_key;
  const double multiplying = rows_differ(p) ? std::max(turns * usual, longest) : std::ceil(turns) * usual;
  // A multiprocessor alone loads faster than all of them together can: 64 blocks 2.7 TB/s.
  const double moving = bytes(p) / std::min(30e3 * std::max(1, facts.multiprocessors),
                                            45e3 * static_cast<double>(std::max<int64_t>(1, c.grid)));
  // What decode takes is better left to it.
  constexpr double kStart = 1.2, kFewRows = 1.0, kPack = 2.0;
  constexpr int64_t kRowsOfDecode = 16;
  const double few = usual_queries(p) <= kRowsOfDecode ? kFewRows : 0.0;
  // Partials are written and read again, by a kernel of their own.
  const double partials = all * c.max_splits * static_cast<double>(p.head_dim_v) * 4.0 * 2.0;
  const double merging = c.split ? 2.0 + partials / (20e3 * std::max(1, facts.multiprocessors)) : 0.0;
  const double packing = p.mask ? kPack : 0.0;
  return kStart + few + packing + std::max(multiplying, moving) + merging;
}

// Heads of a section. K and V of short sequences stay in the L2 cache from one tile of rows to the next; and there are tiles enough
// to end with short ones everywhere. Of long ones blocks share what they ask for at the same time: those that start rows of
// many heads together walk alike (D 256, 16k keys: of two heads 778 TFLOP/s, of eight 812), and sections are of one size.
int64_t section_of(const AttentionProblem& p, const Configuration& c, const DeviceFacts& facts) {
  constexpr int64_t kFewest = 8, kLongTiles = 32;
  const int64_t kv_bytes = std::max<int64_t>(1, usual_keys(p)) * (p.head_dim + p.head_dim_v) * dtype_bytes(p.dtype);
  const int64_t fitting = std::max<int64_t>(1, facts.l2_bytes * 3 / 4 / kv_bytes) * (p.gqa_ratio() / c.rows_per_query);
  if (p.packed_q()) return fitting;  // of one sequence
  const int64_t wanted = std::max(fitting, 2 * c.grid / std::max<int64_t>(1, c.num_tiles_q));
  if (c.num_tiles_q < kLongTiles) return wanted;
  const int64_t heads = p.batch * p.nheads_q / c.rows_per_query;
  const int64_t sections = std::max<int64_t>(1, heads / std::max(wanted, kFewest));
  return std::max<int64_t>(1, (heads + sections - 1) / sections);
}

Configuration configuration_of(const AttentionProblem& p, const AttentionFwdSm90Tile& tile, const Way& way,
                               const DeviceFacts& facts) {
  Configuration c;
  const bool lengths = way.lengths(p, tile);
  c.rows_per_query = way.shares ? static_cast<int32_t>(p.gqa_ratio()) : 1;
  c.tile_q = tile_q(tile) / 64 * (64 / c.rows_per_query * c.rows_per_query);  // a query's heads are one consumer's
  c.tile_k = tile.tile_k;
  c.maps_tensors = true;
  cut_rows(p, c);
  if (way.splits) cut_keys(p, int64_t{tile.blocks} * std::max(1, facts.multiprocessors), 4, c);
  c.kernel =
      heed::format("attention_fwd_sm90 q{} k{} d{}/{}{}{}{}", tile_q(tile), tile.tile_k, tile.head_dim, tile.head_dim_v,
                   has_terms(p) ? " terms"
                   : p.softcap  ? " softcap"
                   : lengths    ? " lengths"
                                : "",
                   way.shares ? " shared" : "", c.split ? " split" : "");
  c.variant = attention_fwd_sm90_variant({.is_bf16 = p.dtype == Dtype::kBf16,
                                          .has_lower_end = p.window_left >= 0,
                                          .lengths = lengths,
                                          .terms = has_terms(p),
                                          .softcap = p.softcap && !has_terms(p),
                                          .split = c.split && !lengths},
                                         tile);
  c.grid = std::min<int64_t>(c.blocks, int64_t{tile.blocks} * std::max(1, facts.multiprocessors));
  // With D 64 tiles that are alike go to whichever block is free as well: 1 % faster.
  const bool has_several = c.blocks > c.grid && c.blocks < int64_t{1} << (kTileBits - 1);
  c.counts_tiles = has_several && (rows_differ(p) || lengths || (tile.head_dim == 64 && p.window_left < 0));
  c.packs_mask = p.mask;
  c.alone = tile.blocks > 1 && c.blocks <= facts.multiprocessors;
  c.section_heads = section_of(p, c, facts);
  c.cost_us = cost_of(p, c, tile, facts);
  return c;
}

}  // namespace

std::string hopper_limits(const DeviceFacts& facts) {
  if (facts.major == 9) return {};
  return heed::format("is built of Hopper's instructions; device {} ({}) has compute capability {}.{}", facts.index,
                      facts.name, facts.major, facts.minor);
}

std::string map_limits(const AttentionProblem& p, const char* nearest) {
  if (p.paged() && p.leftpad) return heed::format("takes no left padding in pages; {}", nearest);
  if (p.paged() && p.page_size % kSwizzleRows != 0) {
    return heed::format("takes pages of multiples of {} keys, not of {}; {}", kSwizzleRows, p.page_size, nearest);
  }
  if (row_align(p) < 16) return heed::format("takes rows that start on 16 bytes only; {}", nearest);
  const int64_t queries = rows_of_q(p)[0], keys = most_keys(p);
  if (queries > kMostRows || keys > kMostRows ||
      (p.offset_kind == OffsetKind::kGiven && (p.q_offset > kMostRows || p.q_offset < -kMostRows))) {
    return heed::format("takes at most {} queries and keys, and q_offset as large; {}", kMostRows, nearest);
  }
  if (!tensors_fit(p)) return heed::format("takes strides from 0 on only, below 2^38 elements; {}", nearest);
  return {};
}

Verdict check_attention_fwd_sm90(const AttentionProblem& p, const DeviceFacts& facts) {
  constexpr const char* kNearest = "cuda/attention_fwd_sm80 takes it";
  if (const std::string limit = common_limits(p, facts); !limit.empty()) return decline(limit);
  if (const std::string limit = hopper_limits(facts); !limit.empty()) return decline(limit);
  if (p.dtype != Dtype::kF16 && p.dtype != Dtype::kBf16) {
    return decline(heed::format("multiplies f16 and bf16, not {}", dtype_name(p.dtype)));
  }
  if (p.head_dim % 8 != 0 || p.head_dim_v % 8 != 0 || padded_head_dims(p.head_dim, p.head_dim_v) == nullptr) {
    return decline(
        heed::format("takes multiples of 8 up to 256 as head_dim and head_dim_v, not {} and {}; "
                     "cuda/attention_fwd_portable takes any up to 512",
                     p.head_dim, p.head_dim_v));
  }
  if (p.out_dtype != p.dtype && p.out_dtype != Dtype::kF32) {
    return decline(
        heed::format("writes out in f32 or the inputs' dtype, not {}; {}", dtype_name(p.out_dtype), kNearest));
  }
  if (p.splits > 1 && p.batch_invariant) {
    return decline(heed::format("does not split keys with batch_invariant; {}", kNearest));
  }
  if (const std::string limit = map_limits(p, kNearest); !limit.empty()) return decline(limit);
  if (MaskBits bits; p.mask && !mask_bits(p, kLongestTile, bits)) {
    return decline(
        heed::format("counts the mask's words, one for 32 keys, by 32 bits, and here there are more; {}", kNearest));
  }
  return accept_if_it_fits(configure_attention_fwd_sm90(p, facts));
}

Configurations configure_attention_fwd_sm90(const AttentionProblem& p, const DeviceFacts& facts) {
  // Of the least head dims that take these, the tile that is done first. Keys are split where they are many for the blocks
  // that there are, or where the caller says so.
  const AttentionFwdSm90Tile* dims = nullptr;
  Configuration best;
  const bool splits = !p.batch_invariant && (p.splits > 1 || (p.splits == 0 && usual_keys(p) >= kLeastKeysToSplit));
  const auto consider = [&](const AttentionFwdSm90Tile& tile, const Way& way) {
    if (tile.ranges != way.ranges(p) || (way.splits ? !splits : p.splits > 1) || (way.shares && !may_share(p))) return;
    Configuration mine = configuration_of(p, tile, way, facts);
    if (way.splits && !mine.split && p.splits == 0) return;
    if (best.blocks == 0 || mine.cost_us < best.cost_us) best = std::move(mine);
  };
  for (const AttentionFwdSm90Tile& tile : kAttentionFwdSm90Tiles) {
    if (tile.terms != has_terms(p)) continue;
    if (dims == nullptr && serves(tile, p.head_dim, p.head_dim_v, tile.ranges, tile.terms)) dims = &tile;
    if (dims == nullptr || tile.head_dim != dims->head_dim || tile.head_dim_v != dims->head_dim_v) continue;
    consider(tile, {});
    if (p.batch_invariant && best.blocks > 0) break;  // whatever the batch, the same tile
    consider(tile, {.splits = true});
    consider(tile, {.shares = true});
    consider(tile, {.splits = true, .shares = true});
  }
  if (!p.batch_invariant) return {best};
  // Nor may the batch decide whether this row or attention_fwd_sm80 is taken.
  best.cost_us = 0.9 * configure_attention_fwd_sm80(p, facts).front().cost_us;
  Configurations shared = {best};
  for (Configuration& decode : configure_invariant_decode(p, facts)) {
    shared.front().min_rows = decode.max_rows + 1;
    shared.push_back(std::move(decode));
  }
  return shared;
}

Status map_tensors(const AttentionProblem& p, const Mapping& mapping, AttentionFwdSm90Params& params) {
  const int32_t tile_k = mapping.tile_k;
  set_sharing(params);
  const AttentionFwdParams& c = params.common;
  const auto [q_rows, q_sequences] = rows_of_q(p);
  const auto [k_rows, k_sequences] = rows_of_k(p);
  const auto k_box = static_cast<uint32_t>(box_rows(p, tile_k)), q_box = static_cast<uint32_t>(params.queries_each),
             heads = static_cast<uint32_t>(c.rows_per_query);
  HEED_RETURN_IF_ERROR(encode("q", c.q, p.dtype, c.head_dim, q_rows, c.nheads_q, q_sequences, c.q_stride, q_box, heads,
                              0, params.q_map));
  params.k_map = params.v_map = params.q_map;  // of no keys nothing is loaded
  if (k_rows > 0 && k_sequences > 0 && c.nheads_kv > 0) {
    HEED_RETURN_IF_ERROR(encode("k", c.k, p.dtype, c.head_dim, k_rows, c.nheads_kv, k_sequences, c.k_stride, k_box, 1,
                                static_cast<uint32_t>(mapping.k_chunks), params.k_map));
    HEED_RETURN_IF_ERROR(encode("v", c.v, p.dtype, c.head_dim_v, k_rows, c.nheads_kv, k_sequences, c.v_stride, k_box, 1,
                                static_cast<uint32_t>(mapping.v_chunks), params.v_map));
  }
  params.out_map = params.q_map;  // f32 leaves straight from registers
  if (p.out_dtype == p.dtype) {
    HEED_RETURN_IF_ERROR(encode("out", c.out, p.dtype, c.head_dim_v, q_rows, c.nheads_q, q_sequences, c.out_stride,
                                q_box, heads, 0, params.out_map));
  }
  const int64_t offset = offset_of(p);
  params.lengths_known = !may_be_bad(p) && c.min_rows == 0;
  params.num_work_tiles =
      static_cast<i32>(c.num_tiles_q * (c.nheads_q / c.rows_per_query) * (p.packed_q() ? 1 : c.batch) * c.max_splits);
  params.chunk = static_cast<i32>(std::min<int64_t>(p.chunk, kFarthest));
  params.page_box = p.paged() ? box_rows(p, tile_k) : 0;
  // Two elements at once: the first key of a thread's two has an even index.
  params.bias_in_pairs =
      p.bias() && p.strides(Slot::kBias)[3] == 1 &&
      p.align[static_cast<size_t>(Slot::kBias)] >= 2 * static_cast<int32_t>(dtype_bytes(p.bias_dtype));
  if (MaskBits bits; p.mask && mask_bits(p, tile_k, bits)) {
    params.mask_bits_i = static_cast<i32>(bits.rows > 1 ? bits.words : 0);
    params.mask_bits_h = bits.heads > 1 ? bits.rows * bits.words : 0;
    params.mask_bits_b = bits.sequences > 1 ? bits.heads * bits.rows * bits.words : 0;
    params.mask_bits_tile = static_cast<i32>(bits.words_of_tile);
  }
  params.lo_shift = c.window_left >= 0 ? shifted(offset, -c.window_left) : -kFarthest;
  params.hi_shift = c.window_right >= 0 ? shifted(offset + 1, c.window_right) : kFarthest;
  params.offset = static_cast<i32>(offset);
  params.mark = counter_mark();
  params.k_box_chunks = mapping.k_chunks, params.v_box_chunks = mapping.v_chunks;
  return {};
}

}  // namespace heed::cuda

namespace heed {

extern const Impl<AttentionProblem> kCudaAttentionFwdSm90;
constinit const Impl<AttentionProblem> kCudaAttentionFwdSm90 =
    cuda::forward_row<cuda::check_attention_fwd_sm90, cuda::configure_attention_fwd_sm90>(
        "cuda/attention_fwd_sm90", "f16 and bf16 by bulk copies and warpgroup products, Hopper");

}  // namespace heed
