// Attention forward for Hopper (sm_90a) with bulk tensor copies, warpgroup products and registers handed from the loading
// warps to the others.
//
//   O = softmax(scale Q K^T) V under masks that are ranges      Q [rows, D]  K [keys, D]  V [keys, Dv]  O [rows, Dv], f16, bf16
//
// A block owns tiles of 64 * consumers query rows of one (sequence, head), one after the other, and walks the keys of each in
// tiles of tile_k from last to first. With few queries rows are those of all heads of a group, query-major.
//
// Roles      warpgroups 0 .. consumers - 1 own 64 rows each; one thread of the last warpgroup issues all loads; where lengths
//            come from the device the warp behind it works out what keys rows see.
// Memory     Q [consumer][D / 64][64 rows][128 B] | K [stage][D / 64][tile_k][128 B] | V like K | O like Q up to D 128 |
//            barriers. In a row of 128 bytes, 16-byte unit u of row r lies at u ^ (r % 8).
// Barriers   full (the loading thread's arrival and the bytes) and empty (an arrival of each consumer warp) for every stage,
//            and for every consumer's Q.
// Producer   with one ring, stage i holds K of a key tile and V of the tile before it, which is what one step needs; with two,
//            K and V have stages of their own, and K is given back before P V has ended.
// Consumer   a step issues S = Q K^T of tile n and O += P V of tile n + 1, and works out P of tile n while P V and the other
//            consumers run.
// Kept maximum  after a row's first tile its maximum so far stays the reference of the exponent. Floats round alike at any
//            scale, so later tiles need no maximum, no shuffle and no rescale; a warp in which a thread's sum over a tile
//            passes 2^15 (f16 holds 2^16) computes S again by mma.sync, whose fragments are those of wgmma, from K, still in
//            shared memory, and takes the exact step: that concerns no other warp.
#include "mma_sm90.cuh"
#include "output_sm90.cuh"
#include "params.h"
#include "products_sm90.cuh"
#include "ptx.cuh"
#include "rows.cuh"
#include "score.cuh"
#include "sequences_sm90.cuh"
#include "softmax_sm90.cuh"
#include "terms_sm90.cuh"
#include "work_sm90.h"

namespace heed::cuda {

// The tile after `index`. Blocks ask once for every tile they do, so that the last to ask knows it is.
__device__ __forceinline__ u32 tile_after(const AttentionFwdSm90Params& a, u32 index) {
  if (a.next_tile == nullptr) return index + gridDim.x;
  const u32 taken = static_cast<u32>(atomicAdd(a.next_tile, 1ull)) & ((1u << kTileBits) - 1);
  if (taken + 1 == static_cast<u32>(a.num_work_tiles)) atomicExch(a.next_tile, 0ull);
  return gridDim.x + taken;
}

// ---- producer ---------------------------------------------------------------------------------------------------------

template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ void produce(const AttentionFwdSm90Params& a, u32 shared, const Barriers<kV>& barriers) {
  using L = Layout<kV>;
  Ring<kV.stages> k_ring{0, 1};
  Ring<L::kStagesV> v_ring{0, 1};
  u32 q_parity = 1;
  const u32 total = static_cast<u32>(a.num_work_tiles);
  u32 next;
  [[maybe_unused]] i32 found = 0;  // the sequence of the turn before
  for (u32 index = blockIdx.x; index < total; index = next) {
    next = tile_after(a, index);
    Work work;
    KeyPlace keys;
    if constexpr (kV.lengths) {
      work.b = found;
      const bool has_rows = locate<kV>(a, index, work, keys);
      found = work.b;
      if (!has_rows) continue;
    } else {
      work = work_at<kV>(a, index);
      keys.sequence = work.b;
    }
    const i32 head_kv = work.head / a.common.gqa_ratio;
    const Visible<kV> visible = visible_of<kV>(a, work);
    const i32 queries = kV.lengths ? work.q_len : static_cast<i32>(a.common.seqlen_q);
    const i32 last_row = min(work.row0 + queries_of_tile<kV>(a), queries) - 1;
    const TileRange range = of_split<kV>(a.common, work, tiles_of_rows<kV>(visible, work.row0, last_row));

    auto load_k = [&](i32 n, u32 barrier) {
      if constexpr (kV.lengths) {
        if (a.page_box > 0)
          return load_pages<kV>(a, a.k_map, shared + L::kK + k_ring.stage * L::kBytesK, L::kChunks, barrier,
                                n * kV.tile_k, work.k_len, head_kv, keys.sequence);
      }
#pragma unroll
      for (int c = 0; c < L::kChunks; ++c)
        tma_load(shared + L::kK + k_ring.stage * L::kBytesK + c * L::kChunkK, a.k_map, barrier, c * 64,
                 keys.row + n * kV.tile_k, head_kv, keys.sequence, kEvictLast);
    };
    auto load_v = [&](i32 n, int stage, u32 barrier) {
      if constexpr (kV.lengths) {
        if (a.page_box > 0)
          return load_pages<kV>(a, a.v_map, shared + L::kVAt + stage * L::kBytesV, L::kChunksV, barrier, n * kV.tile_k,
                                work.k_len, head_kv, keys.sequence);
      }
#pragma unroll
      for (int c = 0; c < L::kChunksV; ++c)
        tma_load(shared + L::kVAt + stage * L::kBytesV + c * L::kChunkK, a.v_map, barrier, c * 64,
                 keys.row + n * kV.tile_k, head_kv, keys.sequence, kEvictLast);
    };
    // K of tile n and V of the tile after it, where there are such.
    auto stage = [&](i32 n) {
      const bool has_k = n >= range.begin, has_v = n + 1 < range.end;
      if constexpr (kV.rings == 1) {
        const u32 full = barriers.k_full(k_ring.stage);
        mbarrier_wait(barriers.k_empty(k_ring.stage), k_ring.parity);
        mbarrier_arrive_expect_tx(full, (has_k ? L::kBytesK : 0) + (has_v ? L::kBytesV : 0));
        if (has_k) load_k(n, full);
        if (has_v) load_v(n + 1, k_ring.stage, full);
        k_ring.next();
      } else {
        if (has_k) {
          mbarrier_wait(barriers.k_empty(k_ring.stage), k_ring.parity);
          mbarrier_arrive_expect_tx(barriers.k_full(k_ring.stage), L::kBytesK);
          load_k(n, barriers.k_full(k_ring.stage));
          k_ring.next();
        }
        if (has_v) {
          mbarrier_wait(barriers.v_empty(v_ring.stage), v_ring.parity);
          mbarrier_arrive_expect_tx(barriers.v_full(v_ring.stage), L::kBytesV);
          load_v(n + 1, v_ring.stage, barriers.v_full(v_ring.stage));
          v_ring.next();
        }
      }
    };

    const bool any = range.end > range.begin;
    for (int consumer = 0; consumer < kV.consumers; ++consumer) {
      mbarrier_wait(barriers.q_empty(consumer), q_parity);
      if constexpr (kV.lengths) {
        store_work(barriers.sequence_work(consumer, q_parity), work);
        mbarrier_arrive(barriers.work_full(consumer));
      } else {
        store_shared(barriers.q_tile(consumer), index);
      }
      mbarrier_arrive_expect_tx(barriers.q_full(consumer), L::kChunks * 128 * rows_used<kV>(a));
      const MapPlace place = place_of_rows<kV>(a, work, work.row0 + consumer * queries_each<kV>(a));
#pragma unroll
      for (int c = 0; c < L::kChunks; ++c)
        tma_load(shared + consumer * L::kBytesQ + c * L::kChunkQ, a.q_map, barriers.q_full(consumer), c * 64,
                 place.inner, place.outer, sequence_of_q<kV>(a, work), kEvictFirst);
      if (consumer == 0 && any) stage(range.end - 1);
    }
    q_parity ^= 1;
    if (any)
      for (i32 n = range.end - 2; n >= range.begin - 1; --n) stage(n);
  }
  launch_dependents();  // all loads are on their way: the launch behind this one may take the places that become free
  for (int consumer = 0; consumer < kV.consumers; ++consumer) {
    mbarrier_wait(barriers.q_empty(consumer), q_parity);
    store_shared(kV.lengths ? barriers.sequence_work(consumer, q_parity) : barriers.q_tile(consumer), kNoMore);
    if constexpr (kV.lengths) mbarrier_arrive(barriers.work_full(consumer));
    mbarrier_arrive(barriers.q_full(consumer));
  }
}

// ---- consumer ---------------------------------------------------------------------------------------------------------

// The steps of one consumer. All members live in registers.
template <AttentionFwdSm90Variant kV>
struct Consumer {
  using L = Layout<kV>;
  static constexpr int kInTurn = 8;  // named barrier of the first consumer's turn

  const AttentionFwdSm90Params& a;
  const Barriers<kV> barriers;
  const int group, lane, warp;
  const u32 k_at, q_at, k_low, v_low;
  Ring<kV.stages> k_ring{0, 0};
  Ring<L::kStagesV> v_ring{0, 0};
  Queries<kV> q;
  Softmax state;
  float acc_o[L::kOut], acc_s[L::kScores];
  u32 probability[L::kKeySteps][4];

  __device__ __forceinline__ Consumer(const AttentionFwdSm90Params& params, u32 shared, const Barriers<kV>& b, int g)
      : a(params),
        barriers(b),
        group(g),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32 % 4),
        k_at(shared + L::kK),
        q_at(shared + g * L::kBytesQ),
        k_low(descriptor_low(shared + L::kK, 16)),
        v_low(descriptor_low(shared + L::kVAt, L::kChunkK)) {}

  __device__ __forceinline__ void release(u32 barrier) const {  // every lane has read what the stage held
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier);
  }
  __device__ __forceinline__ void release_k() {
    release(barriers.k_empty(k_ring.stage));
    k_ring.next();
  }
  __device__ __forceinline__ void release_v() {  // with one ring, the stage that K shares
    if constexpr (kV.rings == 1) {
      release_k();
    } else {
      release(barriers.v_empty(v_ring.stage));
      v_ring.next();
    }
  }
  __device__ __forceinline__ void wait_k() const { mbarrier_wait(barriers.k_full(k_ring.stage), k_ring.parity); }
  __device__ __forceinline__ void wait_v() const {
    if constexpr (kV.rings == 1)
      wait_k();
    else
      mbarrier_wait(barriers.v_full(v_ring.stage), v_ring.parity);
  }
  // A tile of keys that none of these rows sees.
  __device__ __forceinline__ void pass_tile() {
    wait_k();
    release_k();
    if constexpr (kV.rings == 2) {
      wait_v();
      release_v();
    }
  }

  __device__ __forceinline__ void start_qk() {
    // The same in all lanes, which the compiler does not see where loops end by what memory holds: then every product would take
    // its descriptor to uniform registers.
    const int stage = kV.lengths ? uniform(k_ring.stage) : k_ring.stage;
    multiply_qk<kV>(acc_s, q, k_low + stage * (L::kBytesK / 16));
  }
  __device__ __forceinline__ void start_pv() {
    int stage = kV.rings == 1 ? k_ring.stage : v_ring.stage;
    if constexpr (kV.lengths) stage = uniform(stage);
    multiply_pv<kV>(acc_o, probability, v_low + stage * (L::kBytesV / 16));
  }

  __device__ __forceinline__ void load_q() {
#pragma unroll
    for (int r = 0; r < 2; ++r) state.row_max[r] = __int_as_float(0xff800000), state.row_sum[r] = 0.0f;
#pragma unroll
    for (int i = 0; i < L::kOut; ++i) acc_o[i] = 0.0f;
    if constexpr (kV.q_in_registers) {
#pragma unroll
      for (int kk = 0; kk < kV.head_dim / 16; ++kk)
        ldmatrix_x4(q.fragments[kk], staged(q_at, L::kChunkQ, warp * 16 + lane % 16, kk * 16 + lane / 16 * 8));
      pin(q.fragments);
    } else {
      q.low = descriptor_low(q_at, 16);
    }
  }

  // What scores are still to be multiplied by.
  __device__ __forceinline__ float scale_log2() const { return kV.softcap ? 1.0f : a.common.softmax_scale_log2; }
  __device__ __forceinline__ void cap() {
    if constexpr (kV.softcap) take_tanh(a, acc_s);
  }

  // Scores of key tile n that rows first.. do not see.
  __device__ __forceinline__ void hide(const Visible<kV>& visible, i32 first, i32 n, bool before) {
    const float hidden = hidden_by(scale_log2());
    if constexpr (kV.lengths) return hide_in_sequence(n, before, hidden);
    const i32 row = first + warp * 16 + lane / 4, key = n * kV.tile_k + lane % 4 * 2;
    const i32 hi[2] = {visible.hi(row) - key, visible.hi(row + 8) - key};
    hide_from(acc_s, hi, hidden);
    if (kV.has_lower_end && before) {
      const i32 lo[2] = {visible.lo(row) - key, visible.lo(row + 8) - key};
      hide_before(acc_s, lo, hidden);
    }
  }

  // With lengths registers are short: each row's keys and the ends of loops wait in shared memory, and where that is is
  // worked out where it is read.
  __device__ __forceinline__ void hide_in_sequence(i32 n, bool before, float hidden) {
    const int thread = thread_here();
    const u32 bounds = barriers.row_keys(thread / 128, thread % 128 / 32 * 16 + thread % 32 / 4);
    const auto bound = [bounds](u32 at) { return static_cast<i32>(load_shared(bounds + at)); };
    const i32 key = n * kV.tile_k + thread % 4 * 2;
    const i32 hi[2] = {bound(4) - key, bound(8 * 8 + 4) - key};
    hide_from(acc_s, hi, hidden);
    if (!before) return;
    const i32 lo[2] = {bound(0) - key, bound(8 * 8) - key};
    hide_before(acc_s, lo, hidden);
  }
  // P of the first tile.
  __device__ __forceinline__ void first_step(const Visible<kV>& visible, i32 first, i32 n, bool before) {
    wait_k();
    wgmma_fence();
    start_qk();
    wgmma_wait<0>();
    pin(acc_s);
    release_k();
    cap();
    hide(visible, first, n, before);
    softmax_exact(acc_s, state, scale_log2());
    round_p<kV>(probability, acc_s);
  }

  // Whether some row of the warp has seen no key yet, so that there is no maximum to keep.
  __device__ __forceinline__ bool has_new_row() const {
    const float kInf = __int_as_float(0x7f800000);
    return __any_sync(0xffffffffu, state.row_max[0] == -kInf || state.row_max[1] == -kInf);
  }

  // O += P V of the tile before, and P of tile n.
  template <bool kMasked>
  __device__ __forceinline__ void step(const Visible<kV>& visible, i32 first, i32 n, bool before) {
    wait_k();
    if constexpr (kV.ping_pong) bar_sync(kInTurn + group, 256);
    pin(acc_o), pin(probability);
    wgmma_fence();
    start_qk();
    if constexpr (kV.rings == 2) {
      wait_v();
      wgmma_fence();  // the wait is a loop, behind which products without a fence would run one by one
    }
    start_pv();
    if constexpr (kV.ping_pong) bar_arrive(kInTurn + (group + 1) % kV.consumers, 256);
    wgmma_wait<1>();
    pin(acc_s);
    bool exact = kMasked;
    cap();
    if constexpr (kMasked) {
      hide(visible, first, n, before);
      softmax_exact(acc_s, state, scale_log2());
    } else if (!softmax_kept(acc_s, state, scale_log2())) {
      multiply_qk_again<kV>(acc_s, q_at, k_at + k_ring.stage * L::kBytesK);
      cap();
      softmax_exact(acc_s, state, scale_log2());
      exact = true;
    }
    if constexpr (kV.rings == 2) release_k();
    wgmma_wait<0>();
    pin(acc_o);
    if (exact) rescale(acc_o, state.alpha);
    round_p<kV>(probability, acc_s);
    release_v();
  }

  __device__ __forceinline__ void last_step() {
    wait_v();
    pin(acc_o), pin(probability);
    wgmma_fence();
    start_pv();
    wgmma_wait<0>();
    pin(acc_o);
    release_v();
  }

  // All steps of one tile of rows.
  __device__ __forceinline__ void run(const Work& work) {
    const Visible<kV> visible{a, static_cast<i32>(a.common.seqlen_k)};
    const i32 last_row = static_cast<i32>(a.common.seqlen_q) - 1;
    const auto tiles_of = [&](i32 from, i32 to) {
      return of_split<kV>(a.common, work, tiles_of_rows<kV>(visible, from, to));
    };
    const TileRange all = tiles_of(work.row0, min(work.row0 + L::kTileQ - 1, last_row));
    // This consumer's own rows: tiles that none of them sees are handed back, those that all see need no mask. (In turn,
    // consumers take the same steps.)
    const i32 first = work.row0 + group * 64, last = min(first + 63, last_row);
    TileRange own = all;
    if constexpr (!kV.ping_pong) own = tiles_of(first, last);
    if (own.end <= own.begin) own.begin = own.end = all.begin;
    const i32 unmasked_end = visible.hi(first_query<kV>(first)) / kV.tile_k;
    const i32 unmasked_begin = kV.has_lower_end ? (visible.lo(last) + kV.tile_k - 1) / kV.tile_k : 0;

    i32 n = all.end - 1;
    for (; n >= own.end; --n) pass_tile();
    if (own.end > own.begin) {
      first_step(visible, first, n, n < unmasked_begin);
      --n;
      // Both ends of a range share one masked loop, half the code.
#pragma unroll 1
      for (i32 masked_begin = max(unmasked_end, own.begin);; masked_begin = own.begin) {
#pragma unroll 1
        for (; n >= masked_begin; --n) step<true>(visible, first, n, n < unmasked_begin);
        if (n < own.begin) break;
#pragma unroll 1
        for (; n >= unmasked_begin && n >= own.begin; --n) step<false>(visible, first, n, false);
        if (!kV.has_lower_end || n < own.begin) break;
      }
      release(barriers.q_empty(group));
      last_step();
      if constexpr (kV.rings == 1) --n;
    } else {
      release(barriers.q_empty(group));
    }
    // With one ring a tile of rows has a stage more, which holds the last V.
    const i32 stop = kV.rings == 1 && all.end > all.begin ? all.begin - 1 : all.begin;
    for (; n >= stop; --n) pass_tile();
  }

  // The same, where lengths come from the device. Both ends of a range share one masked loop, half the code. What there is to
  // do is looked up where it is needed: registers are short.
  __device__ __forceinline__ void run_sequence(u32 steps) {
    const auto word = [steps](StepWord i) { return step_word(steps, i); };
    const Visible<kV> visible{a, 0};  // what rows see waits in shared memory
    i32 n = word(kAllEnd) - 1;
    for (const i32 end = word(kOwnEnd); n >= end; --n) pass_tile();
    const bool has_own = word(kOwnEnd) > word(kOwnBegin);
    if (has_own) {
      first_step(visible, 0, n, n < word(kFreeBegin));
      --n;
#pragma unroll 1
      for (i32 masked_begin = word(kFreeEnd);; masked_begin = word(kOwnBegin)) {
#pragma unroll 1
        for (; n >= masked_begin; --n) step<true>(visible, 0, n, n < word(kFreeBegin));
        if (n < word(kOwnBegin)) break;
#pragma unroll 1
        for (const i32 begin = word(kFreeBegin); n >= begin; --n) step<false>(visible, 0, 0, false);
        if (n < word(kOwnBegin)) break;
      }
    }
    end_sequence(n, has_own, steps);
  }

  // Behind the steps of a turn, if there were any: the last V, and key tiles of other consumers' rows.
  __device__ __forceinline__ void end_sequence(i32 n, bool has_steps, u32 steps) {
    release(barriers.q_empty(group));
    if (has_steps) {
      last_step();
      if constexpr (kV.rings == 1) --n;
    }
    for (const i32 stop = step_word(steps, kStop); n >= stop; --n) pass_tile();
  }

  // With terms, which are long: one body for all steps. It begins where S has come, and ends with the products of the next.
  __device__ __forceinline__ void run_terms(u32 steps, u32 work_at) {
    const auto word = [steps](StepWord i) { return step_word(steps, i); };
    i32 n = word(kAllEnd) - 1;
    for (const i32 end = word(kOwnEnd); n >= end; --n) pass_tile();
    const i32 own_begin = word(kOwnBegin);
    const bool has_own = word(kOwnEnd) > own_begin;
    if (has_own) {
      TermsOf<kV> terms(a, work_at);
      wait_k();
      wgmma_fence();
      start_qk();
      terms.ask(a, n);
      wgmma_wait<0>();
      pin(acc_s);
      // Read once, into registers of the whole warp: looked up in the loop, they would hold up every step.
      const i32 free_begin = word(kFreeBegin), free_end = word(kFreeEnd);
      bool is_first = true;
#pragma unroll 1
      while (true) {
        const bool masked = n >= free_end || n < free_begin;
        bool exact = is_first || has_new_row();
#pragma unroll 1
        while (true) {  // once, or again where the kept maximum did not hold
          const float scale_log2 = add_terms<kV>(a, acc_s, terms, work_at, n);
          if (masked) hide_in_sequence(n, n < free_begin, hidden_by(scale_log2));
          if (exact) {
            softmax_exact(acc_s, state, scale_log2);
            break;
          }
          if (softmax_kept(acc_s, state, scale_log2)) break;
          multiply_qk_again<kV>(acc_s, q_at, k_at + k_ring.stage * L::kBytesK);
          exact = true;
        }
        if (a.common.dropout_on) drop<kV>(a.common, acc_s, work_at, n * kV.tile_k);
        if constexpr (kV.rings == 2) release_k();
        wgmma_wait<0>();
        pin(acc_o);
        if (exact) rescale(acc_o, state.alpha);
        round_p<kV>(probability, acc_s);
        if constexpr (kV.rings == 1) {
          release_k();
        } else {
          if (!is_first) release_v();
        }
        is_first = false;
        if (--n < own_begin) break;
        wait_k();
        pin(acc_o), pin(probability);
        wgmma_fence();
        start_qk();
        if constexpr (kV.rings == 2) {
          wait_v();
          wgmma_fence();
        }
        start_pv();
        terms.ask(a, n);
        wgmma_wait<1>();
        pin(acc_s);
      }
    }
    end_sequence(n, has_own, steps);
  }
};

template <AttentionFwdSm90Variant kV>
__device__ __forceinline__ void consume(const AttentionFwdSm90Params& a, u32 shared, const Barriers<kV>& barriers,
                                        int group) {
  using L = Layout<kV>;
  Consumer<kV> consumer(a, shared, barriers, group);
  u32 q_parity = 0;
  if (kV.ping_pong && group == kV.consumers - 1) bar_arrive(Consumer<kV>::kInTurn, 256);
  while (true) {
    mbarrier_wait(barriers.q_full(group), q_parity);
    q_parity ^= 1;  // and the producer's is the same again
    Work work;
    if constexpr (kV.lengths) {
      const i32 row0 = uniform(static_cast<i32>(load_shared(barriers.sequence_work(group, q_parity))));
      if (static_cast<u32>(row0) == kNoMore) break;
      clear_rows_behind<kV>(consumer.q_at, step_word(barriers.steps(group, q_parity), kRows), group);
    } else {
      // Read by the lane that tells the producer, later, that it may be written again.
      const u32 read = consumer.lane == 0 ? load_shared(barriers.q_tile(group)) : 0;
      const u32 index = __shfl_sync(0xffffffffu, read, 0);
      if (index == kNoMore) break;
      work = work_at<kV>(a, uniform(static_cast<i32>(index)));
    }
    consumer.load_q();
    if constexpr (kV.lengths) {
      if constexpr (kV.terms)
        consumer.run_terms(barriers.steps(group, q_parity), barriers.sequence_work(group, q_parity));
      else
        consumer.run_sequence(barriers.steps(group, q_parity));
      work = load_work(barriers.sequence_work(group, q_parity));
    } else {
      consumer.run(work);
    }
    finish<kV>(a, work, consumer.acc_o, consumer.state, shared + L::kO + group * L::kBytesO, group);
  }
  if (L::kOutStaged && threadIdx.x % 128 == 0) tma_store_wait();
}

template <AttentionFwdSm90Variant kV>
__global__ void __launch_bounds__(128 * (kV.consumers + 1), kV.blocks)
    attention_fwd_sm90(const __grid_constant__ AttentionFwdSm90Params a) {
  using L = Layout<kV>;
  extern __shared__ __align__(1024) unsigned char smem[];
  const u32 shared = smem_address(smem);
  const Barriers<kV> barriers{shared + L::kBarriers};
  if (threadIdx.x == 0) {
    prefetch_tensormap(a.q_map), prefetch_tensormap(a.k_map), prefetch_tensormap(a.v_map);
    prefetch_tensormap(a.out_map);
    for (int i = 0; i < kV.stages; ++i) {
      mbarrier_init(barriers.k_full(i), 1), mbarrier_init(barriers.k_empty(i), 4 * kV.consumers);
    }
    for (int i = 0; i < L::kStagesV; ++i)
      mbarrier_init(barriers.v_full(i), 1), mbarrier_init(barriers.v_empty(i), 4 * kV.consumers);
    for (int i = 0; i < kV.consumers; ++i) {
      mbarrier_init(barriers.q_full(i), kV.lengths ? 1 + 32 : 1), mbarrier_init(barriers.q_empty(i), 4);
      if constexpr (kV.lengths) mbarrier_init(barriers.work_full(i), 1);
    }
    fence_mbarrier_init();
  }
  wait_for_primary();
  if (threadIdx.x == 32 && a.next_tile != nullptr) mark_counter(a.next_tile, a.mark);
  __syncthreads();
  const int group = uniform(threadIdx.x / 128);
  if (group == kV.consumers) {
    setmaxnreg_dec<L::kOfProducer>();
    if (threadIdx.x < 128 * kV.consumers + 32) {
      if (elect_sync()) produce<kV>(a, shared, barriers);
    } else if (kV.lengths && threadIdx.x < 128 * kV.consumers + 64) {
      scout<kV>(a, barriers);
    }
  } else {
    setmaxnreg_inc<L::kOfConsumer>();
    consume<kV>(a, shared, barriers, group);
  }
}

}  // namespace heed::cuda
