// Attention forward for few queries over many keys on Hopper: one warp keeps a ring of K and V full by bulk tensor copies, from one
// (sequence, kv head, split of its keys) to the next, so that memory is asked without a pause.
//
//   S^T = K Q^T  [keys, rows]     O^T = V^T P^T  [Dv, rows]      f16 or bf16, sums in f32
//
// A block has a multiprocessor to itself and takes tiles of tile_q (8 or 16) rows, one after the other. Its warps have 16 keys of
// each stage, and meet at the end of a tile; that memory does not wait for it is what the ring is for.
//
// Memory     stage: K [D / 64][tile_k][128 B], V alike, swizzled as bulk copies write | where the warps meet: decode.cuh |
//            barriers.
// Barriers   full (the loading warp's arrival and the bytes) and empty (an arrival of each warp) for every stage; merged (an
//            arrival of each warp): what the warps brought to their meeting has been read.
#include "decode.cuh"
#include "mma_sm90.cuh"
#include "output.cuh"
#include "params.h"
#include "ptx.cuh"
#include "rows.cuh"
#include "work_sm90.h"

namespace heed::cuda {

template <AttentionFwdVariant kV>
struct DecodeLayout {
  static constexpr int kChunks = kV.head_dim / 64, kAllChunks = kChunks + kV.head_dim_v / 64;  // boxes across rows of K; and V
  static constexpr u32 kChunk = kV.tile_k * 128, kBytes = kAllChunks * kChunk;                 // of a stage
  static constexpr u32 kMeeting = kV.stages * kBytes,
                       kBarriers = kMeeting + 4 * kV.warps * kV.tile_q * (kV.head_dim_v + kMeetingPad + 2),
                       kMerged = kBarriers + 16 * kV.stages;
  static_assert(kV.tile_k == kStep * kV.warps && kV.head_dim % 64 == 0 && kV.head_dim_v % 64 == 0 && kBarriers % 8 == 0);
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

// Tile `turn` of this block; false where there is none. Blocks change places every turn: their number and that of the splits, of
// which those behind a sequence's end have nothing to do, may have common factors. The first tile is worked out while the kernel
// ahead still runs, where the arguments alone say what it is: 126.5 us became 125.0 for 16 x 8,192 keys.
template <AttentionFwdVariant kV>
__device__ __forceinline__ bool queued_work(const AttentionFwdSm90Params& a, u32 turn, BlockWork& w) {
  const AttentionFwdParams& p = a.common;
  const u32 index = turn * gridDim.x + (blockIdx.x + turn) % gridDim.x;
  if (index >= static_cast<u32>(a.num_work_tiles)) return false;
  const bool reads_lengths = p.cu_seqlens_q != nullptr || p.cu_seqlens_k != nullptr || p.seqused_q != nullptr ||
                             p.seqused_k != nullptr || p.leftpad_k != nullptr || p.cache_batch_idx != nullptr ||
                             p.sequence_status != nullptr;
  if (reads_lengths) wait_for_primary();
  w = block_work<kV>(p, index);
  wait_for_primary();
  return true;
}

// The loading warp, a lane a box. A lane also holds the page of one box of the next stages, 32 boxes of them: those of the next 32
// are looked up while these are loaded, as a look-up may take as long as a stage. Boxes behind the last key, whose pages nobody
// has stated, are asked for behind the end of a page and come as 0.
template <AttentionFwdVariant kV>
__device__ __forceinline__ void fill_ring(const AttentionFwdSm90Params& a, u32 shared) {
  using L = DecodeLayout<kV>;
  const AttentionFwdParams& p = a.common;
  const int lane = threadIdx.x % 32;
  const bool paged = a.page_box > 0;
  const i32 box_rows = paged ? a.page_box : kV.tile_k, boxes = kV.tile_k / box_rows, stages_held = 32 / boxes;
  const u32 page_size = paged ? p.page_size : 1;
  DecodeRing<kV> ring{shared, 0, 1};
  BlockWork w;
  for (u32 turn = 0; queued_work<kV>(a, turn, w); ++turn) {
    if (w.idle) continue;
    const auto look_up = [&](i32 n) -> i32 {
      const u32 key = static_cast<u32>(n) * kV.tile_k + lane * box_rows;
      if (!paged || n >= w.tile_end || key >= static_cast<u32>(w.k_len)) return 0;
      return p.page_table[w.cache_row * p.page_table_stride + key / page_size * p.page_table_step];
    };
    i32 pages = 0, later = look_up(w.tile_begin);
    for (i32 n = w.tile_begin; n < w.tile_end; ++n) {
      const i32 held = (n - w.tile_begin) % stages_held;
      if (held == 0) pages = later, later = look_up(n + stages_held);
      mbarrier_wait(ring.empty(), ring.parity);
      if (lane == 0) mbarrier_arrive_expect_tx(ring.full(), L::kBytes);
      __syncwarp();
      for (i32 first = 0; first < boxes * L::kAllChunks; first += 32) {
        const i32 copy = first + lane, box = copy / L::kAllChunks, chunk = copy % L::kAllChunks, key = n * kV.tile_k + box * box_rows;
        i32 sequence = __shfl_sync(0xffffffffu, pages, held * boxes + box), row = static_cast<u32>(key) % page_size;
        if (!paged) sequence = static_cast<i32>(w.cache_row), row = static_cast<i32>(w.k_begin) + key;
        else if (key >= w.k_len) row = static_cast<i32>(page_size);
        if (box >= boxes) continue;
        const u32 to = ring.data() + chunk * L::kChunk + box * box_rows * 128;
        if (chunk < L::kChunks)
          tma_load(to, a.k_map, ring.full(), chunk * 64, row, w.head_kv, sequence, kEvictFirst);
        else
          tma_load(to, a.v_map, ring.full(), (chunk - L::kChunks) * 64, row, w.head_kv, sequence, kEvictFirst);
      }
      ring.next();
    }
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
__device__ __forceinline__ void clear_values(u32 v, int first_row, int last_row, int lane) {
  for (int row = first_row; row < last_row; ++row)
#pragma unroll
    for (int c = 0; c < kV.head_dim_v / 64; ++c) store_shared(v + c * DecodeLayout<kV>::kChunk + row * 128 + lane * 4, 0);
  __syncwarp();
  fence_proxy_async();
}

// O^T += V^T P^T for a step of keys, the rows first.. of a stage.
template <AttentionFwdVariant kV, int kGroups>
__device__ __forceinline__ void multiply_values(float (&acc_o)[kGroups][kV.head_dim_v / 16][4], u32 v, int first,
                                                const u32 (&probability)[kGroups][2], int lane) {
#pragma unroll
  for (int m = 0; m < kV.head_dim_v / 16; ++m) {
    u32 values[4];
    ldmatrix_x4_trans(values, staged(v, DecodeLayout<kV>::kChunk, first + lane / 16 * 8 + lane % 8, m * 16 + lane / 8 % 2 * 8));
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
      mma_m16n8k16<kV.is_bf16>(acc_o[group][m], values, probability[group][0], probability[group][1]);
  }
}

template <AttentionFwdVariant kV>
__device__ __forceinline__ void decode(const AttentionFwdSm90Params& a, u32 shared, float* memory) {
  using L = DecodeLayout<kV>;
  constexpr int kGroups = kV.tile_q / 8, kKeySteps = kV.head_dim / 16, kOut = kV.head_dim_v / 16;
  const AttentionFwdParams& p = a.common;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = warp * kStep;
  const Meeting<kV> meeting(memory + L::kMeeting / 4);
  const float scale_log2 = plain_scale(p);
  DecodeRing<kV> ring{shared, 0, 0};
  u32 merged = 1;  // parity
  BlockWork w;
  for (u32 turn = 0; queued_work<kV>(a, turn, w); ++turn) {
    if (w.idle) continue;
    const RowMap rows(p, w);
    const i32 end = min(w.tile_end * kV.tile_k, w.k_len);
    float acc_o[kGroups][kOut][4], top[kGroups][2], sum[kGroups][2];
    clear_sums(acc_o, top, sum);
    u32 q[kGroups][kKeySteps][2];
    load_queries<kV>(p, w, rows, q, lane);
    const SeenKeys seen = seen_keys<kV>(p, w, rows, end, lane);

#pragma unroll 1
    for (i32 n = w.tile_begin; n < w.tile_end; ++n) {
      const i32 j0 = n * kV.tile_k + first;
      const u32 k = ring.data(), v = k + L::kChunks * L::kChunk;
      mbarrier_wait(ring.full(), ring.parity);
      if (j0 < end) {
        if (j0 + kStep > end) clear_values<kV>(v, first + end - j0, first + kStep, lane);
        float s[kGroups][4] = {}, odd[kGroups][4] = {};  // two chains, half as long
#pragma unroll
        for (int kk = 0; kk < kKeySteps; ++kk) {
          u32 keys[4];
          ldmatrix_x4(keys, staged(k, L::kChunk, first + lane % 16, kk * 16 + lane / 16 * 8));
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
        multiply_values<kV>(acc_o, v, first, probability, lane);
        if (kGroups == 1 && p.out_is_f32) {
          round_rest<kV.is_bf16 != 0>(x, probability);
          multiply_values<kV>(acc_o, v, first, probability, lane);
        }
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(ring.empty());
      ring.next();
    }

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
    if (lane == 0) mbarrier_arrive(shared + L::kMerged);
    constexpr AttentionFwdVariant kScalar = [] {
      AttentionFwdVariant v = kV;
      v.gather = 1;
      return v;
    }();
    redo_rows<kV, kScalar>(p, w, rows, bad, warp, lane);
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
    mbarrier_init(shared + DecodeLayout<kV>::kMerged, kV.warps);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= kV.warps * 32)
    fill_ring<kV>(a, shared);
  else
    decode<kV>(a, shared, reinterpret_cast<float*>(smem));
}

}  // namespace heed::cuda
