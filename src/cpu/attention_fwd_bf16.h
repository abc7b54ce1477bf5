// Register tiles over the bf16 dot product of AVX-512 (vdpbf16ps: two multiply-adds a lane, f32 sums), used by the
// forward pass where the CPU runs it faster than f32 FMA. Operands are pairs: a 32-bit word holds two consecutive k.
// What moves operands into place serves AMX as well (kernels/attention_fwd_amx-inl.h) and needs AVX-512 BW alone.
#pragma once

#include <cstddef>
#include <cstdint>

namespace heed::cpu {

// The instruction takes denormal inputs as 0 and flushes denormal sums. Every function that moves operands into place
// says whether they are safe from that; a block that is not goes through f32 instead.
struct Bf16Tiles {
  // Rows of K side by side. True: no number but 0 lies below 2^-126.
  bool (*copy_keys)(const uint16_t* src, int64_t count, uint16_t* dst);
  // 16 rows of Q into [head_dim / 2][64 lanes]. True as for keys.
  bool (*pack_queries)(const uint16_t* const rows[16], int64_t head_dim, uint32_t* dst);
  // Two rows of V (row1 null: zeros) into [head_dim_v] pairs. True: no number but 0 lies below 2^-80, so that a flushed
  // product is far below the last bit of the result.
  bool (*pack_values)(const uint16_t* row0, const uint16_t* row1, int64_t head_dim_v, uint32_t* dst);
  // 32 rows of V (null: zeros) into V^T [head_dim_v rounded up to 16][32], rows dst_stride bf16 apart. True as for
  // pairs.
  bool (*transpose_values)(const uint16_t* const rows[32], int64_t head_dim_v, uint16_t* dst, ptrdiff_t dst_stride);
  // Rows 2i and 2i + 1 of P^T ([key][64] f32, vectors [first, end) of 16 lanes, keys outside [begin, end_key) taken as
  // 0), rounded to bf16, into pairs [key / 2][64].
  void (*pack_probabilities)(const float* p, int32_t begin, int32_t end_key, int32_t vector, uint32_t* dst);
  // S^T = K Q^T: num_keys rows of K, k_stride bf16 apart; num_vectors of 16 lanes.
  void (*multiply_keys)(int64_t num_keys, int64_t num_vectors, int64_t num_pairs, const uint16_t* k, ptrdiff_t k_stride,
                        const uint32_t* q, float* s);
  // O^T = O^T * alpha + V^T P^T; alpha null: 1.
  void (*multiply_values)(int64_t head_dim_v, int64_t num_vectors, int64_t num_pairs, const uint32_t* v,
                          ptrdiff_t v_stride, const uint32_t* p, float* o, const float* alpha);
};

const Bf16Tiles* bf16_tiles();  // null: not compiled in

}  // namespace heed::cpu
