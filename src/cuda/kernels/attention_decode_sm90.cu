// Attention forward for few queries over many keys on Hopper: one warp keeps a ring of K and V full by bulk tensor copies, from one
// (sequence, kv head, split of its keys) to the next, so that memory is asked without a pause.
//
//   S^T = K Q^T  [keys, rows]     O^T = V^T P^T  [Dv, rows]      f16 or bf16, sums in f32
//
// A block has a multiprocessor to itself and takes tiles of tile_q (8 or 16) rows, one after the other; which, the loading warp
// says. Its other warps have 16 keys of each stage, and meet at the end of a tile; that memory does not wait for it is what the
// ring is for.
//
// Memory     stage: K, then V, swizzled as bulk copies write: a box after the other, whose chunks of 64 columns come one after the
//            other, or a chunk after the other (StageShape) | where the warps meet: decode.cuh | what the next tiles are | barriers.
// Splits of the same rows: where blocks have shares of all keys (decode_work_sm90.cuh), each warp writes its rows' partials and counts itself;
//            the last one merges them, in the order of splits. Else, combine.
//
// Barriers   full (the loading warp's arrival and the bytes) and empty (an arrival of each warp) for every stage; known (an
//            arrival of each of the loading warp's lanes) for every place of a tile; merged (an arrival of each lane): what the
//            warps brought to their meeting has been read.
#include "decode.cuh"
#include "decode_work_sm90.cuh"
#include "mma_sm90.cuh"
#include "output.cuh"
#include "params.h"
#include "ptx.cuh"
#include "rows.cuh"
#include "work_sm90.h"

namespace heed::cuda {

// What the loading warp says of a tile: what it is, and, before the tile's last stage is there, whether a page of its keys lies
// outside the cache.
struct DecodeTile {
  DecodeWork work;
  i32 bad = 0;
};
static_assert(sizeof(DecodeTile) == kDecodeTileBytes);

constexpr int kSplitBits = kTileBits / 2;  // of a counter; a tile has no more splits than there are blocks

template <AttentionFwdVariant kV>
struct DecodeLayout {
  static constexpr int kChunks = kV.head_dim / 64, kChunksV = kV.head_dim_v / 64;  // across a row of K; of V
  static constexpr u32 kChunk = kV.tile_k * 128, kBytes = (kChunks + kChunksV) * kChunk;  // of a stage
  // Places of tiles: one more than stages as the tile behind the one whose first stage is being asked for is found before there is
  // a stage for it, and another as warps finish a tile's splits when the next one has begun.
  static constexpr int kPlaces = kV.stages + 2;
  static constexpr u32 kMeeting = kV.stages * kBytes,
                       kWork = kMeeting + 4 * kV.warps * kV.tile_q * (kV.head_dim_v + kMeetingPad + 2),
                       kBarriers = kWork + kPlaces * kDecodeTileBytes, kKnown = kBarriers + 16 * kV.stages,
                       kMerged = kKnown + 8 * kPlaces;
  static_assert(kV.tile_k == kStep * kV.warps && kV.head_dim % 64 == 0 && kV.head_dim_v % 64 == 0 && kWork % 8 == 0);
};

// A place in the ring, and its barriers.
template <AttentionFwdVariant kV>
struct DecodeRing {
  u32 shared;
  int stage = 0;
  u32 parity;
  __device__ __forceinline__ u32 full() const { return shared + DecodeLayout<kV>::kBarriers + 8 * stage; }
  __device__ __forceinline__ u32 empty() const { return full() + 8 * kV.stages; }
  __device__ __forceinline__ u32 data() const { return shared + DecodeLayout<kV>::kBytes * stage; }
  __device__ __forceinline__ void next() {
    if (++stage == kV.stages) stage = 0, parity ^= 1;
  }
};

// Where the next tile is written and read. When a tile is found, the stage has been given back that was asked for as many stages as
// there are before the first one of the tile ahead: its warps have done with all tiles before that stage's.
template <AttentionFwdVariant kV>
struct DecodePlace {
  using L = DecodeLayout<kV>;
  u32 shared;
  float* memory;  // the same
  int place = 0;
  u32 parity = 0;
  __device__ __forceinline__ u32 known() const { return shared + L::kKnown + 8 * place; }
  __device__ __forceinline__ DecodeTile& tile() const {
    return reinterpret_cast<DecodeTile*>(memory + L::kWork / 4)[place];
  }
  __device__ __forceinline__ void next() {
    if (++place == L::kPlaces) place = 0, parity ^= 1;
  }
};

// Where row r of a stage's K or V lies.
struct StageShape {
  u32 chunk, box;  // bytes from one to the next
  int shift;       // 2^shift rows of a box
  __device__ __forceinline__ StageShape(int box_rows, int chunks, bool whole, u32 chunk_of_tile)
      : chunk(whole ? box_rows * 128 : chunk_of_tile),
        box(whole ? chunks * box_rows * 128 : box_rows * 128),
        shift(31 - __clz(box_rows)) {}
  __device__ __forceinline__ u32 row(int r) const { return (r >> shift) * box + (r & ((1 << shift) - 1)) * 128; }
};
template <AttentionFwdVariant kV>
__device__ __forceinline__ int rows_of_box(const AttentionFwdSm90Params& a) {
  return a.page_box > 0 ? a.page_box : kV.tile_k;
}
template <AttentionFwdVariant kV>
__device__ __forceinline__ StageShape shape_of_k(const AttentionFwdSm90Params& a) {
  return {rows_of_box<kV>(a), DecodeLayout<kV>::kChunks, a.k_box_chunks > 1, DecodeLayout<kV>::kChunk};
}
template <AttentionFwdVariant kV>
__device__ __forceinline__ StageShape shape_of_v(const AttentionFwdSm90Params& a) {
  return {rows_of_box<kV>(a), DecodeLayout<kV>::kChunksV, a.v_box_chunks > 1, DecodeLayout<kV>::kChunk};
}

// What the loading warp keeps of a tile.
struct Source {
  i64 cache_row = 0;
  i32 tile_begin = 0, tile_end = 0, end = 0;  // end: of its stages, of which a tile without keys has one too
  i32 head_kv = 0, k_begin = 0, k_len = 0;
  bool any = false;
  Source() = default;
  __device__ __forceinline__ explicit Source(const DecodeWork& w)
      : cache_row(w.cache_row),
        tile_begin(w.tile_begin),
        tile_end(w.tile_end),
        end(max(w.tile_end, w.tile_begin + 1)),
        head_kv(w.head_kv),
        k_begin(static_cast<i32>(w.k_begin)),
        k_len(w.k_len),
        any(w.splits > 0) {}
};

// The loading warp, a lane a box. A lane also holds the page of one box of the next stages, 32 boxes of them: those of the next 32,
// or of the next tile's first, are looked up while these are loaded, as a look-up may take as long as a stage. Boxes behind the
// last key, whose pages nobody has stated, are asked for behind the end of a page and come as 0.
template <AttentionFwdVariant kV>
__device__ __forceinline__ void fill_ring(const AttentionFwdSm90Params& a, u32 shared, float* memory) {
  using L = DecodeLayout<kV>;
  const AttentionFwdParams& p = a.common;
  const int lane = threadIdx.x % 32;
  const bool paged = a.page_box > 0;
  const StageShape k_shape = shape_of_k<kV>(a), v_shape = shape_of_v<kV>(a);
  const i32 box_rows = rows_of_box<kV>(a), boxes = kV.tile_k / box_rows, stages_held = 32 / boxes;
  const i32 k_pieces = a.k_box_chunks > 1 ? 1 : L::kChunks, pieces = k_pieces + (a.v_box_chunks > 1 ? 1 : L::kChunksV);
  const u32 page_size = paged ? p.page_size : 1;
  const bool reads_lengths = p.cu_seqlens_q != nullptr || p.cu_seqlens_k != nullptr || p.seqused_q != nullptr ||
                             p.seqused_k != nullptr || p.leftpad_k != nullptr || p.cache_batch_idx != nullptr ||
                             p.sequence_status != nullptr;
  // The first tile is found while the kernel ahead still runs, where the arguments alone say what it is: 126.5 us became 125.0
  // for 16 x 8,192 keys.
  TileList<kV> list(a, lane);
  if (reads_lengths) wait_for_primary();
  DecodePlace<kV> place{shared, memory};
  bool waited = reads_lengths;
  const auto look_up = [&](const Source& w, i32 n) -> i32 {
    const u32 key = static_cast<u32>(n) * kV.tile_k + lane * box_rows;
    if (!paged || !w.any || n >= w.tile_end || key >= static_cast<u32>(w.k_len)) return 0;
    const i32 page = p.page_table[w.cache_row * p.page_table_stride + key / page_size * p.page_table_step];
    return page < p.num_pages ? page : -1;  // from a page below 0 copies bring 0
  };
  DecodeRing<kV> ring{shared, 0, 1};
  Source w, next;
  i32 pages = 0, later = 0, next_pages = 0, n = 0;
  // Once in the code, as it is long: what a kernel runs first is fetched from memory.
  DecodeTile *tile = nullptr, *next_tile = nullptr;
  for (bool find = true, first_stage = false;; find = first_stage) {
    if (find) {
      next_tile = &place.tile();
      if (lane == 0) next_tile->bad = 0;
      list.find(next_tile->work);
      mbarrier_arrive(place.known());
      next = Source(next_tile->work);
      place.next();
      if (!waited) wait_for_primary(), waited = true;
      next_pages = look_up(next, next.tile_begin);
    }
    first_stage = n >= w.end;
    if (first_stage) {
      if (!next.any) break;
      w = next, n = w.tile_begin, later = next_pages, tile = next_tile;
    }
    const i32 held = (n - w.tile_begin) % stages_held;
    if (held == 0) {
      pages = later, later = look_up(w, n + stages_held);
      if (paged && __any_sync(0xffffffffu, pages < 0) && lane == 0) tile->bad = 1;
    }
    mbarrier_wait(ring.empty(), ring.parity);
    __syncwarp();  // a stage without bytes is soon given back again: no lane may still be waiting
    if (lane == 0) mbarrier_arrive_expect_tx(ring.full(), n < w.tile_end ? L::kBytes : 0);
    __syncwarp();
    for (i32 first = 0; n < w.tile_end && first < boxes * pieces; first += 32) {
      const i32 copy = first + lane, box = copy / pieces, piece = copy % pieces, key = n * kV.tile_k + box * box_rows;
      i32 sequence = __shfl_sync(0xffffffffu, pages, held * boxes + box), row = static_cast<u32>(key) % page_size;
      if (!paged) sequence = static_cast<i32>(w.cache_row), row = w.k_begin + key;
      else if (key >= w.k_len) row = static_cast<i32>(page_size);
      if (box >= boxes) continue;
      if (piece < k_pieces)
        tma_load_chunks(ring.data() + piece * k_shape.chunk + box * k_shape.box, a.k_map, ring.full(), piece * 64, row, w.head_kv,
                        sequence, kEvictFirst);
      else
        tma_load_chunks(ring.data() + L::kChunks * L::kChunk + (piece - k_pieces) * v_shape.chunk + box * v_shape.box, a.v_map,
                        ring.full(), (piece - k_pieces) * 64, row, w.head_kv, sequence, kEvictFirst);
    }
    ring.next(), ++n;
  }
  launch_dependents();
}

// The rows of Q as B fragments: words at d = 16 kk + 2 t (+ 8) of row g.
template <AttentionFwdVariant kV, int kGroups>
__device__ __forceinline__ void load_queries(const AttentionFwdParams& p, const BlockWork& w, const RowMap& rows,
                                             u32 (&q)[kGroups][kV.head_dim / 16][2], int lane) {
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int row = group * 8 + lane / 4;
    const i32 query = rows.query(row);
    const unsigned short* from = static_cast<const unsigned short*>(p.q) + w.b * p.q_stride.b + rows.head(row) * p.q_stride.h +
                                 (w.q_begin + query) * p.q_stride.s + lane % 4 * 2;
#pragma unroll
    for (int kk = 0; kk < kV.head_dim / 16; ++kk)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int d = kk * 16 + half * 8;
        q[group][kk][half] = query < w.q_len && d < p.head_dim ? *reinterpret_cast<const u32*>(from + d) : 0;
      }
  }
}

// Rows of V behind the last key become 0: what lies there reaches no row then. By the warp that has them.
template <AttentionFwdVariant kV>
__device__ __forceinline__ void clear_values(u32 v, const StageShape& shape, int first_row, int last_row, int lane) {
  for (int row = first_row; row < last_row; ++row)
#pragma unroll
    for (int c = 0; c < kV.head_dim_v / 64; ++c) store_shared(v + c * shape.chunk + shape.row(row) + lane * 4, 0);
  __syncwarp();
  fence_proxy_async();
}

// O^T += V^T P^T for a step of keys. rows: where the eight of this lane's begin.
template <AttentionFwdVariant kV, int kGroups>
__device__ __forceinline__ void multiply_values(float (&acc_o)[kGroups][kV.head_dim_v / 16][4], u32 rows, u32 chunk,
                                                const u32 (&probability)[kGroups][2], int lane) {
#pragma unroll
  for (int m = 0; m < kV.head_dim_v / 16; ++m) {
    u32 values[4];
    ldmatrix_x4_trans(values, staged(rows, chunk, lane % 8, m * 16 + lane / 8 % 2 * 8));
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
      mma_m16n8k16<kV.is_bf16>(acc_o[group][m], values, probability[group][0], probability[group][1]);
  }
}

// Where combine merges: splits of the tile's rows that have no keys, and therefore no tile.
template <AttentionFwdVariant kV>
__device__ __forceinline__ void empty_splits(const AttentionFwdParams& p, const BlockWork& w, const RowMap& rows, i32 splits, int warp,
                                             int lane) {
  for (int row = warp; row < kV.tile_q; row += kV.warps) {
    const i32 query = rows.query(row);
    if (query >= w.q_rows) return;
    float* const lse = p.partial_lse + partial_slot(p, w, rows.head(row), query);
    for (i32 split = splits + lane; split < p.max_splits; split += 32) lse[split] = -__int_as_float(0x7f800000);
  }
}

// Shares: where a warp's rows count the splits that are done; null where there is but one, or no row.
template <AttentionFwdVariant kV>
__device__ __forceinline__ u64* counter_of(const AttentionFwdSm90Params& a, const DecodeWork& w, const RowMap& rows, int warp) {
  constexpr int kRows = kV.tile_q / kV.warps;
  if (a.arrived == nullptr || w.whole || rows.query(warp * kRows) >= w.q_rows) return nullptr;
  return a.arrived + (w.first_block * kV.tile_q + warp * kRows);
}

// A row from the partials of its splits, by a warp (combine.cu has the same formula, for several warps and any width):
//
//   M = max_s lse_s     L = sum_s exp(lse_s - M) (+ exp(sink - M))     out = sum_s exp(lse_s - M) out_s / L     lse = M + ln L
template <AttentionFwdVariant kV>
__device__ __forceinline__ void merge_splits(const AttentionFwdSm90Params& a, const DecodeWork& w, i32 row, i32 query, i32 head,
                                             int lane) {
  const AttentionFwdParams& p = a.common;
  constexpr float kLn2 = 0.693147180559945f, kLog2e = 1.44269504088896f;
  constexpr int kAtOnce = 16;  // splits
  static_assert(kV.head_dim_v <= 128);
  const float kInf = __int_as_float(0x7f800000);
  const i32 splits = w.splits;
  const auto slot = [&](i32 split) { return share_slot(a, w.first_block, split) * kV.tile_q + row; };
  const auto lse_of = [&](i32 split) { return split < splits ? load_from_l2(p.partial_lse + slot(split)) : -kInf; };
  const float sink = p.sinks != nullptr ? p.sinks[head] : -kInf;
  const int column = lane * 4;
  float4 x[kAtOnce];
  const auto load = [&](i32 first) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      x[i] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (first + i < splits && column < p.head_dim_v)
        x[i] = load_from_l2_16(p.partial_out + slot(first + i) * p.head_dim_v + column);
    }
  };
  load(0);  // while lse come
  float lse = lse_of(lane), top = fmaxf(sink, lse);
#pragma unroll 1
  for (i32 s = lane + 32; s < splits; s += 32) top = fmaxf(top, lse_of(s));
#pragma unroll
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
  const float reference = top == -kInf ? 0.0f : top;
  float total = 0.0f;
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
  for (i32 first = 0; first < splits; first += kAtOnce) {
    if (first > 0) load(first);
    if (first > 0 && first % 32 == 0) lse = lse_of(first + lane);
    const float weight = ex2((lse - reference) * kLog2e);
    if (first % 32 == 0) total += weight;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float of_split = __shfl_sync(0xffffffffu, weight, first % 32 + i);
      sum.x = fmaf(of_split, x[i].x, sum.x), sum.y = fmaf(of_split, x[i].y, sum.y);
      sum.z = fmaf(of_split, x[i].z, sum.z), sum.w = fmaf(of_split, x[i].w, sum.w);
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
  total += ex2((sink - reference) * kLog2e);
  const bool counts = query < w.q_len && total != 0.0f;
  const float inverse = counts ? 1.0f / total : 0.0f;
  const i64 at = w.b * p.out_stride.b + head * p.out_stride.h + (w.q_begin + query) * p.out_stride.s + column;
  const float4 y = counts ? float4{sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse}
                          : float4{0.0f, 0.0f, 0.0f, 0.0f};
  if (column < p.head_dim_v) store_four<kV>(p, at, y);
  if (lane == 0) store_lse(p, w, head, query, counts ? reference + lg2(total) * kLn2 : -kInf);
}

// This warp's rows of a tile that is done, of several splits.
template <AttentionFwdVariant kV>
__device__ __forceinline__ void finish_split(const AttentionFwdSm90Params& a, const DecodeTile& tile, int warp, int lane) {
  constexpr int kRows = kV.tile_q / kV.warps;
  DecodeWork w = tile.work;
  const RowMap rows(a.common, w);
  u64* const counter = counter_of<kV>(a, w, rows, warp);
  if (counter == nullptr) return;
  __syncwarp();
  // Splits that are done, and, above those, that have a bad page: all of the sequence's rows are 0 then.
  u32 done = 0;
  if (lane == 0) {
    const u32 mine = tile.bad ? 1u << kSplitBits | 1 : 1;
    done = (static_cast<u32>(count_arrival(counter, mine)) & ((1u << kTileBits) - 1)) + mine;
  }
  done = __shfl_sync(0xffffffffu, done, 0);
  if (static_cast<i32>(done & ((1u << kSplitBits) - 1)) < w.splits) return;
  if (lane == 0) *counter = 0;
  if (done >> kSplitBits != 0) w.q_len = 0;
  __syncwarp();
#pragma unroll 1
  for (int row = warp * kRows; row < (warp + 1) * kRows && rows.query(row) < w.q_rows; ++row)
    merge_splits<kV>(a, w, row, rows.query(row), rows.head(row), lane);
}

template <AttentionFwdVariant kV>
__device__ __forceinline__ void decode(const AttentionFwdSm90Params& a, u32 shared, float* memory) {
  using L = DecodeLayout<kV>;
  constexpr int kGroups = kV.tile_q / 8, kKeySteps = kV.head_dim / 16, kOut = kV.head_dim_v / 16;
  const AttentionFwdParams& p = a.common;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = warp * kStep;
  const Meeting<kV> meeting(memory + L::kMeeting / 4);
  const float scale_log2 = plain_scale(p);
  const StageShape k_shape = shape_of_k<kV>(a), v_shape = shape_of_v<kV>(a);
  const u32 k_rows = k_shape.row(first + lane / 8 % 2 * 8), v_rows = v_shape.row(first + lane / 16 * 8);  // eight of them
  DecodeRing<kV> ring{shared, 0, 0};
  DecodePlace<kV> place{shared, memory};
  u32 merged = 1;  // parity
  const DecodeTile* unfinished = nullptr;  // the tile ahead, where its splits are not
  const bool shares = a.arrived != nullptr;
  wait_for_primary();
  for (;; place.next()) {
    mbarrier_wait(place.known(), place.parity);
    DecodeWork w = place.tile().work;
    const bool is_last = w.splits == 0;
    const RowMap rows(p, w);
    const i32 end = min(w.tile_end * kV.tile_k, w.k_len);
    u32 q[kGroups][kKeySteps][2] = {};
    if (!is_last) load_queries<kV>(p, w, rows, q, lane);
    if (unfinished != nullptr) finish_split<kV>(a, *unfinished, warp, lane);  // while those come
    if (is_last) break;
    float acc_o[kGroups][kOut][4], top[kGroups][2], sum[kGroups][2];
    clear_sums(acc_o, top, sum);
    if (w.split == 0 && !shares && writes_partials<kV>(p))
      empty_splits<kV>(p, w, rows, w.splits, warp, lane);
    if (lane == 0) {
      u64* const counter = counter_of<kV>(a, w, rows, warp);
      if (counter != nullptr) mark_counter(counter, a.mark);
    }
    const SeenKeys seen = seen_keys<kV>(p, w, rows, end, lane);

    i32 n = w.tile_begin;
#pragma unroll 1
    do {
      const i32 j0 = n * kV.tile_k + first;
      const u32 k = ring.data(), v = k + L::kChunks * L::kChunk;
      mbarrier_wait(ring.full(), ring.parity);
      if (j0 < end) {
        if (j0 + kStep > end) clear_values<kV>(v, v_shape, first + end - j0, first + kStep, lane);
        float s[kGroups][4] = {}, odd[kGroups][4] = {};  // two chains, half as long
#pragma unroll
        for (int kk = 0; kk < kKeySteps; ++kk) {
          u32 keys[4];
          ldmatrix_x4(keys, staged(k + k_rows, k_shape.chunk, lane % 8, kk * 16 + lane / 16 * 8));
#pragma unroll
          for (int group = 0; group < kGroups; ++group)
            mma_m16n8k16<kV.is_bf16>(kk % 2 == 0 ? s[group] : odd[group], keys, q[group][kk][0], q[group][kk][1]);
        }
#pragma unroll
        for (int group = 0; group < kGroups; ++group)
#pragma unroll
          for (int e = 0; e < 4; ++e) s[group][e] += odd[group][e];
        float x[kGroups][4];
        softmax_step(s, seen, j0, end, scale_log2, top, sum, acc_o, x, lane);
        u32 probability[kGroups][2];
        round_probabilities<kV.is_bf16 != 0>(x, probability);
        multiply_values<kV>(acc_o, v + v_rows, v_shape.chunk, probability, lane);
        if (kGroups == 1 && p.out_is_f32) {
          round_rest<kV.is_bf16 != 0>(x, probability);
          multiply_values<kV>(acc_o, v + v_rows, v_shape.chunk, probability, lane);
        }
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(ring.empty());
      ring.next();
    } while (++n < w.tile_end);

    if (place.tile().bad) w.q_len = 0;  // O is 0 then
    mbarrier_wait(shared + L::kMerged, merged);
    merged ^= 1;
    bring_sums<kV>(meeting, top, sum, warp, lane);
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float* const to = meeting.row(warp, group * 8 + lane % 4 * 2 + e) + lane / 4;
#pragma unroll
        for (int m = 0; m < kOut; ++m) to[m * 16] = acc_o[group][m][e], to[m * 16 + 8] = acc_o[group][m][2 + e];
      }
    bar_sync(1, kV.warps * 32);
    const u32 bad = merge_rows<kV>(p, w, rows, meeting, warp, lane);
    mbarrier_arrive(shared + L::kMerged);
    constexpr AttentionFwdVariant kScalar = [] {
      AttentionFwdVariant v = kV;
      v.gather = 1;
      return v;
    }();
    redo_rows<kV, kScalar>(p, w, rows, bad, warp, lane);
    unfinished = shares && !w.whole ? &place.tile() : nullptr;
  }
}

template <AttentionFwdVariant kV>
__global__ void __launch_bounds__(kV.warps * 32 + 32, 1)
    attention_decode_sm90(const __grid_constant__ AttentionFwdSm90Params a) {
  extern __shared__ __align__(1024) unsigned char smem[];
  const u32 shared = smem_address(smem);
  if (threadIdx.x == 0) {
    prefetch_tensormap(a.k_map), prefetch_tensormap(a.v_map);
    for (int i = 0; i < kV.stages; ++i) {
      const DecodeRing<kV> ring{shared, i, 0};
      mbarrier_init(ring.full(), 1), mbarrier_init(ring.empty(), kV.warps);
    }
    for (int i = 0; i < DecodeLayout<kV>::kPlaces; ++i) mbarrier_init(shared + DecodeLayout<kV>::kKnown + 8 * i, 32);
    mbarrier_init(shared + DecodeLayout<kV>::kMerged, kV.warps * 32);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= kV.warps * 32)
    fill_ring<kV>(a, shared, reinterpret_cast<float*>(smem));
  else
    decode<kV>(a, shared, reinterpret_cast<float*>(smem));
}

}  // namespace heed::cuda
