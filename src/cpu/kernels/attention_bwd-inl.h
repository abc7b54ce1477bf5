// The backward pass of one block of keys: see cpu/attention_bwd.h for what is computed and who adds what when.
//
//   scratch of a worker       K rows [key][d], K^T and V^T in panels of keys, dK and dV [key][d]: once per task
//                             Q, dO, this tile's dQ [query][d], S and dP [query][key]: once per query block
//
// Compiled once per instruction set: include inside a foreach_target file, after hwy/highway.h.
#if defined(HEED_CPU_KERNELS_ATTENTION_BWD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_CPU_KERNELS_ATTENTION_BWD_INL_H_
#undef HEED_CPU_KERNELS_ATTENTION_BWD_INL_H_
#else
#define HEED_CPU_KERNELS_ATTENTION_BWD_INL_H_
#endif

#include <cmath>
#include <cstring>

#include "cpu/kernels/attention_bwd_tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::cpu::HWY_NAMESPACE {

// ---- rows in, rows out ----------------------------------------------------------------------------------------------

HWY_INLINE bool is_poisoned(F32 poison) { return !hn::AllTrue(F32Tag(), hn::Eq(poison, poison)); }

// `poison` gets 0 added for finite numbers, NaN for others: one test for a whole block afterwards.
template <class T>
HWY_INLINE F32 load_row(const T* HWY_RESTRICT src, int64_t width, int64_t pad, float* HWY_RESTRICT dst, F32 poison) {
  const F32Tag f;
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) {
    const F32 x = widen(src + k);
    hn::StoreU(x, f, dst + k);
    poison = hn::Add(poison, hn::Sub(x, x));
  }
  if (k == pad) return poison;
  const int64_t tail = k;
  for (; k < width; ++k) dst[k] = widen_one(src[k]);
  for (; k < pad; ++k) dst[k] = 0.0f;
  for (k = tail; k < pad; k += kLanes) {
    const F32 x = hn::LoadU(f, dst + k);
    poison = hn::Add(poison, hn::Sub(x, x));
  }
  return poison;
}

// `num_rows` rows of `width` numbers, row_stride apart, to f32 rows of `pad` floats, 0 past width. True if all are
// finite.
inline bool load_rows(const void* data, Dtype dtype, int64_t offset, int64_t row_stride, int64_t num_rows,
                      int64_t width, int64_t pad, float* dst) {
  const auto load = [&](const auto* src) HWY_ATTR {
    F32 poison = hn::Zero(F32Tag());
    src += offset;
    for (int64_t r = 0; r < num_rows; ++r) poison = load_row(src + r * row_stride, width, pad, dst + r * pad, poison);
    return !is_poisoned(poison);
  };
  if (dtype == Dtype::kBf16) return load(static_cast<const Bf16*>(data));
  if (dtype == Dtype::kF16) return load(static_cast<const F16*>(data));
  return load(static_cast<const float*>(data));
}

inline void store_row(const float* src, void* data, Dtype dtype, int64_t offset, int64_t width) {
  if (dtype == Dtype::kBf16) return narrow_row(src, width, static_cast<Bf16*>(data) + offset);
  if (dtype == Dtype::kF16) return narrow_row(src, width, static_cast<F16*>(data) + offset);
  narrow_row(src, width, static_cast<float*>(data) + offset);
}

HWY_INLINE void add_row(const float* HWY_RESTRICT src, int64_t width, float* HWY_RESTRICT dst) {
  const F32Tag f;
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes)
    hn::StoreU(hn::Add(hn::LoadU(f, dst + k), hn::LoadU(f, src + k)), f, dst + k);
  for (; k < width; ++k) dst[k] += src[k];
}

HWY_INLINE void scale_rows(float scale, int64_t floats, float* rows) {
  const F32Tag f;
  for (int64_t k = 0; k < floats; k += kLanes)
    hn::StoreU(hn::Mul(hn::LoadU(f, rows + k), hn::Set(f, scale)), f, rows + k);
}

// Rows [key][pad] to panels [panel][d][kPanelKeys]; lanes past num_keys are 0.
inline void fill_panels(const float* rows, int64_t num_keys, int64_t width, int64_t pad, float* panels) {
  for (int64_t first = 0; first < num_keys; first += kPanelKeys, panels += width * kPanelKeys) {
    const int64_t keys = HWY_MIN(num_keys - first, kPanelKeys);
    if (keys < kPanelKeys) std::memset(panels, 0, sizeof(float) * static_cast<size_t>(width * kPanelKeys));
    transpose_rows([&](int64_t r) { return rows + (first + r) * pad; }, keys, width, 1.0f, panels, kPanelKeys);
  }
}

// ---- a tile ---------------------------------------------------------------------------------------------------------

struct BackwardBuffers {
  float *k_rows, *k_lanes, *v_lanes, *dk, *dv, *q, *dout, *dq, *s, *dp;
  KeyRowBuffers rows;
  uint8_t* shown;
};

inline BackwardBuffers buffers_in(const BackwardRun& run, float* scratch) {
  const BackwardScratch& at = run.layout;
  const int64_t keys = run.shape.key_block;
  return {scratch + at.k_rows,
          scratch + at.k_lanes,
          scratch + at.v_lanes,
          scratch + at.dk,
          scratch + at.dv,
          scratch + at.q,
          scratch + at.dout,
          scratch + at.dq,
          scratch + at.s,
          scratch + at.dp,
          {scratch + at.row, scratch + at.row + keys, scratch + at.row + 3 * keys + kKeepBefore,
           scratch + at.row + 2 * keys},
          reinterpret_cast<uint8_t*>(scratch + at.shown)};
}

// K and V of a block of keys. True if all of it is finite. What both tasks below call once a block is compiled once.
HWY_NOINLINE bool load_keys(const BackwardRun& run, const Sequence& sequence, int64_t kv_head, int64_t first_key,
                            int64_t num_keys, const BackwardBuffers& to) {
  const AttentionProblem& p = *run.problem;
  const BackwardShape& shape = run.shape;
  const KeyRows v = locate_keys(p, *run.args, sequence, Slot::kV, kv_head);
  const KeyRows k = locate_keys(p, *run.args, sequence, Slot::kK, kv_head);
  // V's rows are needed no longer than for the transposition: they pass through dV's place.
  bool finite =
      load_rows(run.args->v, p.dtype, v.offset(first_key), v.row_stride, num_keys, p.head_dim_v, shape.dv_pad, to.dv);
  fill_panels(to.dv, num_keys, p.head_dim_v, shape.dv_pad, to.v_lanes);
  finite &=
      load_rows(run.args->k, p.dtype, k.offset(first_key), k.row_stride, num_keys, p.head_dim, shape.d_pad, to.k_rows);
  fill_panels(to.k_rows, num_keys, p.head_dim, shape.d_pad, to.k_lanes);
  return finite;
}

// Q, dO, lse and delta of the tile's rows. True if all of it is finite, lse = -inf (an empty row) apart.
HWY_NOINLINE bool load_queries(const BackwardRun& run, BackwardTile* tile, const BackwardBuffers& to) {
  const AttentionProblem& p = *run.problem;
  const Sequence& sequence = *tile->sequence;
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const auto offset = [&](Slot slot) { return row_offset(p, slot, sequence, tile->head, tile->first_query); };
  bool finite = load_rows(run.args->q, p.dtype, offset(Slot::kQ), p.strides(Slot::kQ)[2], tile->num_rows, p.head_dim,
                          run.shape.d_pad, to.q);
  finite &= load_rows(run.args->dout, p.out_dtype, offset(Slot::kDout), p.strides(Slot::kDout)[2], tile->num_rows,
                      p.head_dim_v, run.shape.dv_pad, to.dout);
  const float* lse = static_cast<const float*>(run.args->lse) + offset(Slot::kLse);
  const int64_t lse_stride = p.strides(Slot::kLse)[2];
  const float* delta = run.delta + run.row_index(sequence, tile->head, tile->first_query);
  for (int32_t r = 0; r < tile->num_rows; ++r) {
    const float x = lse[r * lse_stride];
    const bool empty = x == -kInf;
    tile->lse[r] = empty ? kInf : x == kInf ? std::numeric_limits<float>::quiet_NaN() : x;
    tile->delta[r] = empty ? 0.0f : delta[r];
    finite &= empty || (std::isfinite(x) && std::isfinite(delta[r]));
  }
  return finite;
}

// Rows that the next tile will load, or that this one will add to: far apart in memory, so that no hardware prefetcher
// foresees them. Empty where nothing follows.
inline RowPrefetch prefetch_rows(const BackwardRun& run, const BackwardTile& tile, Slot slot, const void* data,
                                 int64_t first_query) {
  const AttentionProblem& p = *run.problem;
  const int64_t rows = HWY_MIN(run.shape.query_block, tile.sequence->q_len - first_query);
  if (rows <= 0) return {};
  const int64_t bytes = dtype_bytes(slot_dtype(p, slot));
  return {static_cast<const char*>(data) + row_offset(p, slot, *tile.sequence, tile.head, first_query) * bytes,
          p.strides(slot)[2] * bytes, slot_shape(p, slot)[3] * bytes, static_cast<int32_t>(rows)};
}

// S and dP, then P and dS in their places. each_row(r): after row r, when buffers.rows.ds holds its dS at the bias;
// called only where the score has terms or `want_rows` asks for it.
template <class EachRow>
void fill_tile(const BackwardRun& run, const BackwardTile& tile, const BackwardBuffers& at, bool want_dp,
               bool want_rows, RowSums* sums, const EachRow& each_row) {
  const BackwardShape& shape = run.shape;
  multiply_visible(tile, shape.head_dim, at.q, shape.d_pad, at.k_lanes, at.s, shape.tile_stride);
  if (want_dp || tile.exact)
    multiply_visible(tile, shape.head_dim_v, at.dout, shape.dv_pad, at.v_lanes, at.dp, shape.tile_stride);
  const ScoreTerms& terms = run.terms;
  const bool plain = !run.problem->softcap && terms.bias == nullptr && terms.mask == nullptr &&
                     terms.slopes == nullptr && !terms.dropout;
  if (plain && !tile.exact && !want_rows) return finish_plain_rows(run, tile, at.s, at.dp);
  for (int32_t r = 0; r < tile.num_rows; ++r) {
    fill_row_buffers(terms, tile, r, at.rows);
    finish_row(run, tile, r, at.rows, at.s + r * shape.tile_stride, at.dp + r * shape.tile_stride,
               tile.exact ? at.shown + r * shape.key_block : nullptr, sums);
    each_row(r);
  }
}

// ---- sums over a tile -----------------------------------------------------------------------------------------------

// gradient[key][d] += sum over rows of tile[row][key] * rows[row][d], for the rows that see the key.
inline void add_to_keys(const BackwardTile& tile, const float* weights, int64_t stride, const float* rows, int64_t pad,
                        float* gradient, RowPrefetch prefetch) {
  const int64_t num_vectors = pad / kLanes;
  const int32_t prefetch_step = prefetch.num_rows * kTileRows / tile.num_keys + 1;
  for (int64_t v = 0; v < num_vectors; v += kTileVectors) {
    const int64_t vectors = HWY_MIN(num_vectors - v, kTileVectors);
    int32_t from = 0, to = tile.partial ? 0 : tile.num_rows;
    for (int32_t key = 0; key < tile.num_keys; key += kTileRows) {
      const int32_t keys = HWY_MIN(kTileRows, tile.num_keys - key);
      prefetch.take(prefetch_step);
      while (from < tile.num_rows && tile.hi[from] <= key) ++from;
      while (to < tile.num_rows && tile.lo[to] < key + keys) ++to;
      if (from >= to) continue;
      multiply<AOrder::kColumns>(keys, vectors, to - from, weights + from * stride + key, stride,
                                 rows + from * pad + v * kLanes, pad, gradient + key * pad + v * kLanes, pad,
                                 Start::kLoad);
    }
  }
}

// dq[row][d] = sum over keys of ds[row][key] * K[key][d], for the keys that the row sees.
inline void sum_over_keys(const BackwardTile& tile, const float* ds, int64_t stride, const float* k_rows, int64_t pad,
                          float* dq, RowPrefetch prefetch) {
  const int64_t num_vectors = pad / kLanes;
  for (int64_t v = 0; v < num_vectors; v += kTileVectors) {
    const int64_t vectors = HWY_MIN(num_vectors - v, kTileVectors);
    for (int32_t r = 0; r < tile.num_rows; r += kTileRows) {
      const int32_t rows = HWY_MIN(kTileRows, tile.num_rows - r);
      const int32_t from = tile.lo[r], to = HWY_MAX(from, tile.hi[r + rows - 1]);
      prefetch.take(kTileRows);
      multiply<AOrder::kRows>(rows, vectors, to - from, ds + r * stride + from, stride,
                              k_rows + from * pad + v * kLanes, pad, dq + r * pad + v * kLanes, pad, Start::kZero);
    }
  }
}

// dst += weight * src.
HWY_INLINE void add_scaled_row(float weight, const float* HWY_RESTRICT src, int64_t width, float* HWY_RESTRICT dst) {
  const F32Tag f;
  const F32 w = hn::Set(f, weight);
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes)
    hn::StoreU(hn::MulAdd(w, hn::LoadU(f, src + k), hn::LoadU(f, dst + k)), f, dst + k);
  for (; k < width; ++k) dst[k] = std::fma(weight, src[k], dst[k]);
}

// The three sums pair by pair, for tiles that hold NaN or Inf: a pair that is hidden or dropped adds nothing, not 0
// times it.
inline void add_pairs(const BackwardRun& run, const BackwardTile& tile, const BackwardBuffers& at) {
  const BackwardShape& shape = run.shape;
  std::memset(at.dq, 0, sizeof(float) * static_cast<size_t>(tile.num_rows * shape.d_pad));
  for (int32_t r = 0; r < tile.num_rows; ++r) {
    for (int32_t key = tile.lo[r]; key < tile.hi[r]; ++key) {
      const uint8_t shown = at.shown[r * shape.key_block + key];
      const int64_t pair = r * shape.tile_stride + key;
      if (shown != 0) {
        add_scaled_row(at.dp[pair], at.k_rows + key * shape.d_pad, shape.d_pad, at.dq + r * shape.d_pad);
        add_scaled_row(at.dp[pair], at.q + r * shape.d_pad, shape.d_pad, at.dk + key * shape.d_pad);
      }
      if (shown == 3) add_scaled_row(at.s[pair], at.dout + r * shape.dv_pad, shape.dv_pad, at.dv + key * shape.dv_pad);
    }
  }
}

// Where this tile's dQ will go.
inline RowPrefetch dq_rows(const BackwardRun& run, const BackwardTile& tile) {
  if (!run.problem->dq) return {};
  if (run.dq_sum == nullptr) return prefetch_rows(run, tile, Slot::kDq, run.args->dq, tile.first_query);
  const int64_t bytes = run.shape.d_pad * static_cast<int64_t>(sizeof(float));
  return {
      reinterpret_cast<const char*>(run.dq_sum) + run.row_index(*tile.sequence, tile.head, tile.first_query) * bytes,
      bytes, bytes, tile.num_rows};
}

// This tile's dQ onto the sums, when the blocks of keys before this one have added theirs.
inline void add_to_queries(const BackwardRun& run, const BackwardTile& tile, int64_t query_block, int64_t key_block,
                           const float* dq) {
  const AttentionProblem& p = *run.problem;
  const Sequence& sequence = *tile.sequence;
  const int32_t mine =
      static_cast<int32_t>(key_block - run.keys_of_block(sequence, query_block).lo / run.shape.key_block);
  int32_t* turn = run.turns + run.turn_index(sequence, tile.head, query_block);
  const float scale = run.args->softmax_scale;
  await_turn(turn, mine);
  for (int32_t r = 0; r < tile.num_rows; ++r) {
    const int64_t i = tile.first_query + r;
    if (run.dq_sum != nullptr) {
      float* sum = run.dq_sum + run.row_index(sequence, tile.head, i) * run.shape.d_pad;
      add_scaled_row(scale, dq + r * run.shape.d_pad, run.shape.d_pad, sum);
    } else {
      float* sum = static_cast<float*>(run.args->dq) + row_offset(p, Slot::kDq, sequence, tile.head, i);
      add_scaled_row(scale, dq + r * run.shape.d_pad, p.head_dim, sum);
    }
  }
  pass_turn(turn, mine + 1);
}

// One row of dbias that nobody else adds to. Keys that the row does not see were written as 0 before.
inline void store_bias_row(const BackwardRun& run, const BackwardTile& tile, int32_t r, const float* ds) {
  const auto& stride = run.problem->strides(Slot::kDbias);
  const int64_t offset = tile.sequence->batch * stride[0] + tile.head * stride[1] + (tile.first_query + r) * stride[2] +
                         tile.first_key * stride[3];
  store_row(ds, run.args->dbias, run.problem->bias_dtype, offset, tile.num_keys);
}

// ---- the tasks ------------------------------------------------------------------------------------------------------

// rowsum(dout * out) of rows [i, i + 4), past the last one that row again; which of them have nothing but 0 in out.
// One chain over d each, as dP is: where every v_j is the same, dP - delta is then 0 as it should be.
inline void four_row_sums(const BackwardRun& run, const Sequence& sequence, int64_t head, int64_t i, float* sums,
                          bool* all_zero) {
  const AttentionProblem& p = *run.problem;
  const hn::CappedTag<float, 4> four;
  constexpr int64_t kWidest = 512;
  HWY_ALIGN float rows[4 * kWidest], out[4 * kWidest], dout[4 * kWidest];
  const int64_t width = p.head_dim_v;
  const auto load = [&](Slot slot, const void* data, float* columns) {
    for (int64_t r = 0; r < 4; ++r) {
      const int64_t row = HWY_MIN(i + r, sequence.q_len - 1);
      widen_strided(data, p.out_dtype, row_offset(p, slot, sequence, head, row), 1, width, rows + r * width);
    }
    transpose_rows([&](int64_t r) { return rows + r * width; }, 4, width, 1.0f, columns, 4);
  };
  load(Slot::kOut, run.args->out, out);
  load(Slot::kDout, run.args->dout, dout);
  auto sum = hn::Zero(four), any = hn::Zero(four);
  for (int64_t k = 0; k < width; ++k) {
    const auto o = hn::Load(four, out + 4 * k);
    sum = hn::MulAdd(hn::Load(four, dout + 4 * k), o, sum);
    any = hn::Or(any, hn::Abs(o));
  }
  HWY_ALIGN float bits[4];
  hn::Store(any, four, bits);
  hn::StoreU(sum, four, sums);
  for (int r = 0; r < 4; ++r) all_zero[r] = bits[r] == 0.0f;
}

// delta = rowsum(dout * out) - dlse of a head's rows, and its sum into dsink: -sum_i exp(sink - lse_i) delta_i.
inline void delta_rows(const BackwardRun& run, const Sequence& sequence, int64_t head) {
  const AttentionProblem& p = *run.problem;
  float sums[4] = {};
  bool all_zero[4] = {};
  double dsink = 0.0;
  for (int64_t i = 0; i < sequence.q_len; ++i) {
    if (i % 4 == 0) four_row_sums(run, sequence, head, i, sums, all_zero);
    const float lse = static_cast<const float*>(run.args->lse)[row_offset(p, Slot::kLse, sequence, head, i)];
    // A row whose sink is all it has: dout meets nothing there, not even where it is NaN.
    const bool only_sink = p.sinks && all_zero[i % 4] && lse == run.args->sinks[head];
    float delta = only_sink ? 0.0f : sums[i % 4];
    if (p.dlse) delta -= static_cast<const float*>(run.args->dlse)[row_offset(p, Slot::kDlse, sequence, head, i)];
    run.delta[run.row_index(sequence, head, i)] = delta;
    if (p.dsinks && lse != -std::numeric_limits<float>::infinity())
      dsink -=
          std::exp(static_cast<double>(run.args->sinks[head]) - static_cast<double>(lse)) * static_cast<double>(delta);
  }
  if (p.dsinks) run.dsinks[sequence.batch * p.nheads_q + head] = dsink;
}

// Tiles of one block of keys with one query block.
struct TileOutputs {
  bool dq, dk, dv, bias_rows, dalibi;
  bool any_ds() const { return dq || dk || bias_rows || dalibi; }
};

inline void add_tile(const BackwardRun& run, const TileOutputs& want, BackwardTile* tile, bool keys_finite,
                     int64_t query_block, int64_t key_block, const BackwardBuffers& at, RowSums* sums) {
  const BackwardShape& shape = run.shape;
  set_visible_lanes(run, tile);
  tile->exact = !load_queries(run, tile, at) || !keys_finite;
  fill_tile(run, *tile, at, want.any_ds(), want.bias_rows || want.dalibi, sums, [&](int32_t r) HWY_ATTR {
    if (want.bias_rows) store_bias_row(run, *tile, r, at.rows.ds);
  });
  if (tile->exact) {
    add_pairs(run, *tile, at);
  } else {
    const int64_t next = tile->first_query + shape.query_block;
    if (want.dv) {
      add_to_keys(*tile, at.s, shape.tile_stride, at.dout, shape.dv_pad, at.dv,
                  prefetch_rows(run, *tile, Slot::kDout, run.args->dout, next));
    }
    if (want.dk) {
      add_to_keys(*tile, at.dp, shape.tile_stride, at.q, shape.d_pad, at.dk,
                  prefetch_rows(run, *tile, Slot::kQ, run.args->q, next));
    }
    if (want.dq) sum_over_keys(*tile, at.dp, shape.tile_stride, at.k_rows, shape.d_pad, at.dq, dq_rows(run, *tile));
  }
  if (want.dq) add_to_queries(run, *tile, query_block, key_block, at.dq);
}

inline void key_block(const BackwardRun& run, const KeyBlockTask& task, float* scratch) {
  const AttentionProblem& p = *run.problem;
  const BackwardShape& shape = run.shape;
  const Sequence& sequence = *task.sequence;
  const BackwardBuffers at = buffers_in(run, scratch);
  const bool bias_rows = p.dbias && p.bias_dims == (kDimB | kDimH | kDimI | kDimJ);
  const TileOutputs want = {p.dq, p.dk, p.dv, bias_rows, p.dalibi};
  const int64_t first_key = task.block * shape.key_block;
  const int64_t num_keys = HWY_MIN(shape.key_block, sequence.k_len - first_key);
  const bool keys_finite = load_keys(run, sequence, task.kv_head, first_key, num_keys, at);
  std::memset(at.dk, 0, sizeof(float) * static_cast<size_t>(num_keys * shape.d_pad));
  std::memset(at.dv, 0, sizeof(float) * static_cast<size_t>(num_keys * shape.dv_pad));
  BackwardTile tile;
  tile.sequence = &sequence;
  tile.first_key = first_key;
  tile.num_keys = static_cast<int32_t>(num_keys);
  for (tile.head = task.kv_head * p.gqa_ratio(); tile.head < (task.kv_head + 1) * p.gqa_ratio(); ++tile.head) {
    double dalibi = 0.0;
    for (int64_t block = 0; block < run.num_query_blocks(sequence); ++block) {
      const KeyRange keys = run.keys_of_block(sequence, block);
      if (keys.hi <= keys.lo || keys.hi <= first_key || keys.lo >= first_key + num_keys) continue;
      tile.first_query = block * shape.query_block;
      tile.num_rows = static_cast<int32_t>(HWY_MIN(shape.query_block, sequence.q_len - tile.first_query));
      RowSums sums = {hn::Zero(F32Tag())};
      add_tile(run, want, &tile, keys_finite, block, task.block, at, &sums);
      if (p.dalibi) dalibi += static_cast<double>(hn::GetLane(hn::SumOfLanes(F32Tag(), sums.dalibi)));
    }
    if (p.dalibi) {
      const int64_t group = sequence.batch * p.nheads_kv + task.kv_head;
      if (tile.head == task.kv_head * p.gqa_ratio())
        await_turn(run.head_turns + group, static_cast<int32_t>(task.block));
      run.dalibi[sequence.batch * p.nheads_q + tile.head] += dalibi;
    }
  }
  if (p.dalibi) {
    pass_turn(run.head_turns + sequence.batch * p.nheads_kv + task.kv_head, static_cast<int32_t>(task.block) + 1);
  }
  const auto store = [&](Slot slot, void* data, const float* rows, int64_t width, int64_t pad) {
    const KeyRows to = locate_keys(p, *run.args, sequence, slot, task.kv_head);
    for (int64_t j = 0; j < num_keys; ++j) store_row(rows + j * pad, data, p.dtype, to.offset(first_key + j), width);
  };
  if (p.dk) scale_rows(run.args->softmax_scale, num_keys * shape.d_pad, at.dk);
  if (p.dk) store(Slot::kDk, run.args->dk, at.dk, p.head_dim, shape.d_pad);
  if (p.dv) store(Slot::kDv, run.args->dv, at.dv, p.head_dim_v, shape.dv_pad);
}

inline void narrow_dq(const BackwardRun& run, const Sequence& sequence, int64_t head) {
  const AttentionProblem& p = *run.problem;
  for (int64_t i = 0; i < sequence.q_len; ++i) {
    store_row(run.dq_sum + run.row_index(sequence, head, i) * run.shape.d_pad, run.args->dq, p.dtype,
              row_offset(p, Slot::kDq, sequence, head, i), p.head_dim);
  }
}

// ---- dbias with broadcast dimensions --------------------------------------------------------------------------------

// Where one row of dS goes in a part's sums: [row][key] in f32, or with the keys summed too, one double a row.
inline void add_bias_row(const BackwardRun& run, const BackwardTile& tile, int32_t r, const float* ds, float* sums,
                         double* row_sums) {
  const F32Tag f;
  const int32_t slot = (run.problem->bias_dims & kDimI) != 0 ? r : 0;
  if ((run.problem->bias_dims & kDimJ) != 0) return add_row(ds, tile.num_keys, sums + slot * run.shape.tile_stride);
  F32 sum = hn::Zero(f);
  for (int32_t k = 0; k < tile.num_keys; k += kLanes) sum = hn::Add(sum, hn::LoadU(f, ds + k));  // past num_keys: 0
  row_sums[slot] += static_cast<double>(hn::GetLane(hn::SumOfLanes(f, sum)));
}

inline void store_bias_part(const BackwardRun& run, const BiasPart& part, const float* sums, const double* row_sums) {
  const AttentionProblem& p = *run.problem;
  const BackwardShape& shape = run.shape;
  const auto& stride = p.strides(Slot::kDbias);
  const std::array<int64_t, 4> extent = slot_shape(p, Slot::kDbias);
  const bool per_query = (p.bias_dims & kDimI) != 0, per_key = (p.bias_dims & kDimJ) != 0;
  const int64_t first_query = per_query ? part.first_query_block * shape.query_block : 0;
  const int64_t first_key = per_key ? part.first_key_block * shape.key_block : 0;
  const int64_t rows = per_query ? HWY_MIN(shape.query_block, extent[2] - first_query) : 1;
  const int64_t keys = per_key ? HWY_MIN(shape.key_block, extent[3] - first_key) : 1;
  const int64_t base = ((p.bias_dims & kDimB) != 0 ? part.first_batch * stride[0] : 0) +
                       ((p.bias_dims & kDimH) != 0 ? part.first_head * stride[1] : 0);
  for (int64_t r = 0; r < rows; ++r) {
    const float sum = static_cast<float>(row_sums[r]);
    store_row(per_key ? sums + r * shape.tile_stride : &sum, run.args->dbias, p.bias_dtype,
              base + (first_query + r) * stride[2] + first_key * stride[3], keys);
  }
}

// Everything that one part of dbias sums, in the order of sequences, heads, blocks of keys, query blocks.
inline void bias_part(const BackwardRun& run, const BiasPart& part, float* scratch) {
  const AttentionProblem& p = *run.problem;
  const BackwardShape& shape = run.shape;
  const BackwardBuffers at = buffers_in(run, scratch);
  float* sums = scratch + run.layout.bias_sums;
  double row_sums[kMaxTileRows] = {};
  std::memset(sums, 0, sizeof(float) * static_cast<size_t>(shape.query_block * shape.tile_stride));
  BackwardTile tile;
  for (int64_t b = part.first_batch; b < part.end_batch; ++b) {
    const Sequence& sequence = run.sequences[b];
    tile.sequence = &sequence;
    const int64_t end_key_block = HWY_MIN(part.end_key_block, run.num_key_blocks(sequence));
    const int64_t end_query_block = HWY_MIN(part.end_query_block, run.num_query_blocks(sequence));
    if (part.first_query_block >= end_query_block) continue;
    for (tile.head = part.first_head; tile.head < part.end_head; ++tile.head) {
      for (int64_t key_block = part.first_key_block; key_block < end_key_block; ++key_block) {
        tile.first_key = key_block * shape.key_block;
        tile.num_keys = static_cast<int32_t>(HWY_MIN(shape.key_block, sequence.k_len - tile.first_key));
        const bool finite = load_keys(run, sequence, tile.head / p.gqa_ratio(), tile.first_key, tile.num_keys, at);
        for (int64_t block = part.first_query_block; block < end_query_block; ++block) {
          const KeyRange keys = run.keys_of_block(sequence, block);
          if (keys.hi <= keys.lo || keys.hi <= tile.first_key || keys.lo >= tile.first_key + tile.num_keys) continue;
          tile.first_query = block * shape.query_block;
          tile.num_rows = static_cast<int32_t>(HWY_MIN(shape.query_block, sequence.q_len - tile.first_query));
          set_visible_lanes(run, &tile);
          tile.exact = !load_queries(run, &tile, at) || !finite;
          RowSums unused = {hn::Zero(F32Tag())};
          fill_tile(run, tile, at, true, true, &unused,
                    [&](int32_t r) HWY_ATTR { add_bias_row(run, tile, r, at.rows.ds, sums, row_sums); });
        }
      }
    }
  }
  store_bias_part(run, part, sums, row_sums);
}

}  // namespace heed::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include guard, flipped per target
