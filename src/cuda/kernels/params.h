// What host and device agree on. Host-clean: plain types, no CUDA, no standard library.
#pragma once

namespace heed::cuda {

using i32 = int;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

enum MaskKind : int {
  kMaskNone = 0,   // every key up to the sequence's end
  kMaskRange = 1,  // causal, window, chunk: keys [lo, hi) of each query
};

enum ElementType : int { kElementF32 = 0, kElementF16 = 1, kElementBf16 = 2 };

// Bits of a sequence's status, as in heed/attention.h.
enum SequenceStatus : int { kStatusLengthQ = 1, kStatusLengthK = 2, kStatusPage = 4, kStatusAppend = 8 };

// lse of split 0 of a row that no query of this kernel's owns: no arithmetic makes a NaN with these bits.
constexpr unsigned int kPaddingLse = 0x7fc0dead;

// Columns behind a row of O where the warps of the decode kernels meet (decode.cuh): attention_decode_sm90 then writes it
// without bank conflicts.
constexpr int kMeetingPad = 4;

// Keys that attention_decode_sm90 gives a block at least, as it takes about as long to start.
constexpr int kLeastShare = 256;
// What its loading warp says of a tile.
constexpr int kDecodeTileBytes = 104;

// One compiled kernel. Lengths, strides and scales are never in it (docs/decisions).
struct AttentionFwdVariant {
  int is_bf16 = 0;
  int head_dim = 64;  // padded to a multiple of 16
  int head_dim_v = 64;
  int tile_q = 128;
  int tile_k = 64;
  int warps = 4;
  int stages = 2;  // of K and V each
  int mask = kMaskNone;
  int modified = 0;  // softcap, bias, ALiBi, mask tensor or dropout: run-time branches, uniform over the block
  int gather = 0;    // pages or unaligned rows: row addresses worked out one by one
  int split = 0;     // writes f32 partials for combine where partial_lse says where
  int blocks = 0;    // of a multiprocessor, which bounds registers; 0: the kernel's own estimate
};

// Dimension order of strides: b, h, s (elements); the last dimension's is 1.
struct Strides3 {
  i64 b, h, s;
};
struct Strides4 {
  i64 b, h, i, j;
};

// One compiled attention_fwd_sm90.
struct AttentionFwdSm90Variant {
  int is_bf16 = 0;
  int head_dim = 64;  // padded to a multiple of 16
  int head_dim_v = 64;
  int consumers = 2;  // warpgroups of 64 query rows
  int tile_k = 128;
  int stages = 2;  // of K, and at D 256 one less than of V
  int rings = 1;   // 1: a stage holds K of a tile and V of the tile before it; 2: K and V come and go by themselves
  int q_in_registers = 0;
  int ping_pong = 0;  // consumers issue their products in turn
  int blocks = 1;     // of a multiprocessor
  int mask = kMaskNone;
  int has_lower_end = 0;  // rows do not see the first keys either
  int lengths = 0;        // sequences' lengths and places come from the device; chunk; splits; heads that share a tile
  int terms = 0;          // bias, ALiBi, mask tensor, dropout, and softcap where there is one; with lengths
  int softcap = 0;        // and none of those; with lengths
  int split = 0;  // without lengths: writes f32 partials for combine; with them it does where partial_lse is set
};

struct AttentionFwdParams {
  const void* q;  // [batch, seqlen_q, nheads_q, head_dim] by strides
  const void* k;  // [batch, seqlen_k, nheads_kv, head_dim]; pages: [num_pages, page_size, nheads_kv, head_dim]
  const void* v;
  void* out;   // [batch, seqlen_q, nheads_q, head_dim_v]
  float* lse;  // [batch, nheads_q, seqlen_q]; may be null
  Strides3 q_stride, k_stride, v_stride, out_stride, lse_stride;

  const void* bias;
  const unsigned char* mask;
  const float* alibi_slopes;
  const float* sinks;
  Strides4 bias_stride, mask_stride;
  i64 alibi_stride_b;

  const i32* cu_seqlens_q;
  const i32* cu_seqlens_k;
  const i32* seqused_q;
  const i32* seqused_k;
  const i32* leftpad_k;
  const i32* page_table;
  const i32* cache_batch_idx;
  i32* status;

  i64 batch, seqlen_q, seqlen_k, total_q, total_k;
  i64 num_tiles_q;  // tiles of rows a (batch, head) may have: the grid's innermost extent; packed: of all sequences
  i32 nheads_q, nheads_kv;
  i32 gqa_ratio;
  i32 rows_per_query;  // query heads of a kv head that share a tile: gqa_ratio where packed, else 1
  i32 head_dim, head_dim_v;
  i32 page_size;
  i32 num_pages;
  i64 page_table_stride;
  i64 cache_rows;

  i64 window_left, window_right, chunk, q_offset;
  i32 offset_kind;
  i32 out_is_f32, bias_is_f32;
  i32 longest_first;  // causal: heavy tiles start first
  i32 heads_per_section;
  i32 aligned;  // every row of q, k, v, out starts on 16 bytes

  float softmax_scale_log2;  // scale * log2(e)
  float softcap;             // 0: off
  float dropout_scale;       // 1 / (1 - p)
  u32 dropout_on;
  u64 dropout_threshold;  // round((1 - p) 2^32)
  u64 dropout_seed, dropout_offset;
  const u64* dropout_seed_ptr;
  const u64* dropout_offset_ptr;
  i64 index_base[4];

  float*
      partial_out;  // [rows, nheads_q, max_splits, head_dim_v]; rows: see partial_queries. Shares: [2 blocks, tile_q, head_dim_v]
  float* partial_lse;  // [rows, nheads_q, max_splits]. Shares: [2 blocks, tile_q]
  i32 max_splits;
  i32 split_tiles;  // key tiles of one split; 0: attention_decode_sm90's blocks have equal shares of all keys

  i64 page_table_step;   // between the entries of a row of the page table
  i64 q_limit, k_limit;  // longest lengths that bias and mask cover; 0: any
  // [batch + 1], written by check_sequences, read by everyone after it: status bits of each sequence, then whether
  // cu_seqlens_q is out of order. Null: every block checks the lengths of its own sequence, and there are no pages or the kernel
  // finds the bad ones itself.
  i32* sequence_status;

  // Two kernels may share a batch, each sequence going to one of them by its own length alone (README.md): this one takes
  // sequences of min_rows <= queries * gqa_ratio <= max_rows. 0: no limit.
  i64 min_rows, max_rows;
  // Rows of partials are (sequence, query), so many queries a sequence; 0: batch * seqlen_q, packed total_q.
  i64 partial_queries;
  i32 check_slices;  // blocks of check_sequences that share a sequence's pages; above 1 all status words start as 0
};

// How a bulk copy finds its way in a tensor, as the driver encodes it.
struct alignas(64) TensorMap {
  u64 opaque[16];
};

constexpr int kTileBits = 24;
// Where lengths come from the device, words of shared memory for every consumer: which rows it has and what there is to do
// about them, of this turn and the one before, and the keys that each of its rows sees.
constexpr int kSequenceWorkWords = 12, kStepWords = 8, kRowWords = 2 * 64,
              kSequenceWords = 2 * (kSequenceWorkWords + kStepWords) + kRowWords;

struct AttentionFwdSm90Params {
  // [sequence, head, row, column], boxes of 64 columns: q and out of 64 rows, k and v of tile_k. Where heads of a group share
  // a tile q and out are [sequence, row, head, column], a box has queries_each rows of rows_per_query heads.
  TensorMap q_map, k_map, v_map, out_map;
  AttentionFwdParams common;
  i32 num_work_tiles;  // tiles of rows of all heads and sequences
  // Where blocks take their next tile of rows from; null: each takes every gridDim-th. The low kTileBits count, the others
  // are `mark`: whatever else lies there before the run is not marked, so that it needs no clearing, and the run that is
  // over leaves 0.
  u64* next_tile;
  u64 mark;
  // Row i sees keys j with i + lo_shift <= j < i + hi_shift: windows and offset in one, kept within 2^30 either way.
  i32 lo_shift, hi_shift;
  i32 offset;  // position of row i: i + offset
  // Lengths: what they are for every sequence is worked out on the device, but where there is no array of them.
  i32 lengths_known;
  i32 chunk;  // 0: off; at most 2^30
  // Heads that share a tile: queries of a consumer, and 2^16 / rows_per_query, rounded up. (A consumer's row r is of query
  // r * row_to_query >> 16; all of that is 64 and 2^16 where each head has its own.)
  i32 queries_each;
  u32 row_to_query;
  i32 page_box;  // rows of a box of k and v where those lie in pages, the outermost dimension of their maps then; 0: off
  i32 bias_in_pairs;  // keys lie side by side, two of them on an address of their size
  // The mask tensor as pack_mask leaves it: bit j % 32 of word j / 32 of a row; strides in words, 0 where broadcast.
  const u32* mask_bits;
  i64 mask_bits_b, mask_bits_h;
  i32 mask_bits_i, mask_bits_tile;  // the latter from one tile of keys to the next
  // Softcap of scores s with |s| <= near_limit: s (near[0] + near[1] s^2 + near[2] s^4 + ...), in units of log2.
  float near_limit, near[5];
  // attention_decode_sm90, whose maps of k and v have a fifth dimension, the 64 columns of a row that a box begins with being the
  // first: chunks of 64 columns in a box, all of a row's or one.
  i32 k_box_chunks, v_box_chunks;
  // attention_decode_sm90, where its blocks have shares, [blocks, tile_q]: splits of the rows that a block begins that are done,
  // counted as next_tile counts; the last one merges them.
  u64* arrived;
  i32 heads_together;  // then: blocks side by side that have the same share of so many kv heads, a divisor of those and of the blocks
};

struct PackMaskParams {
  const unsigned char* mask;  // bool [., ., rows, keys] by strides
  u32* bits;                  // [., heads, rows, words]: a key's bit is 1 where it may be seen; behind the last key 0
  Strides4 stride;
  i64 heads, rows, keys, words;
  i64 total;  // words of all rows
};

struct KvAppendParams {
  const void *k_new, *v_new, *q;        // [batch, seqlen, heads, dim] by strides; null where the problem has none
  void *k_cache, *v_cache, *q_out;      // pages: [num_pages, page_size, nheads_kv, dim]
  const void *rotary_cos, *rotary_sin;  // [rotary_rows, rotary_dim / 2]
  Strides3 k_new_stride, v_new_stride, q_stride, k_cache_stride, v_cache_stride, q_out_stride;
  i64 cos_stride, sin_stride;  // between rows
  const i32 *cu_seqlens_new, *cu_seqlens_q, *cache_seqlens, *rotary_seqlens, *leftpad_k, *page_table, *cache_batch_idx;
  i32* status;
  i64 page_table_stride, page_table_step;
  i64 batch, seqlen_q, seqlen_new, seqlen_k, total_q, total_new, cache_rows, rotary_rows, num_pages;
  i32 nheads_q, nheads_kv, head_dim, head_dim_v, page_size;
  i32 rotary_dim;  // 0: none
  i32 rotary_interleaved, rotary_is_f32;
  i32 q_per_position;  // query i turned at position start + i; else all at start
  i32 slices;          // blocks of a sequence: the grid is batch * slices
};

}  // namespace heed::cuda
