// The one matrix product of the CPU backend, over f32, shared by forward and backward:
//
//   C[m][lane] (+)= sum_k A(m, k) * B[k][lane]
//
// B and C are rows of lanes (whole vectors, row strides free, no alignment asked); A is read one number at a time and
// broadcast, so it may be the caller's own K or V rows: nothing is ever packed or transposed to be an A.
//   S^T = K Q^T     A = K rows       (kRows),     B = Q^T [d][query],   C = S^T [key][query]
//   O^T = V^T P^T   A = V rows as V^T (kColumns), B = P^T [key][query], C = O^T [d][query]
//   dV  = P^T dO    A = P^T rows     (kRows),     B = dO [query][d],    C = dV [key][d]
// Every C is one chain of multiply-adds over k = 0, 1, 2, ... starting from what Start says, whatever the tiling, so a
// result does not depend on how many rows or vectors a call covers.
//
// Compiled once per instruction set: include inside a foreach_target file, after hwy/highway.h.
#if defined(HEED_CPU_KERNELS_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef HEED_CPU_KERNELS_TILE_INL_H_
#undef HEED_CPU_KERNELS_TILE_INL_H_
#else
#define HEED_CPU_KERNELS_TILE_INL_H_
#endif

#include <cstddef>
#include <cstdint>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace heed::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using F32Tag = hn::ScalableTag<float>;
using I32Tag = hn::ScalableTag<int32_t>;
using U32Tag = hn::ScalableTag<uint32_t>;
using F32 = hn::Vec<F32Tag>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(F32Tag()));  // 16 AVX-512, 8 AVX2, 4 NEON and emulation

// Accumulators of the register tile: 6 x 4 of 32 registers, 6 x 2 of 16.
constexpr int kTileRows = 6;
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_EMU128 || HWY_TARGET == HWY_SCALAR
constexpr int kTileVectors = 2;
#else
constexpr int kTileVectors = 4;
#endif

enum class AOrder {
  kRows,     // A(m, k) = a[m * a_stride + k]
  kColumns,  // A(m, k) = a[k * a_stride + m]
};

enum class Start {
  kZero,    // C = sum
  kLoad,    // C = C + sum
  kScaled,  // C = C * alpha[lane] + sum
};

template <AOrder kOrder, int kRows, int kVectors>
void register_tile(int64_t num_k, const float* HWY_RESTRICT a, ptrdiff_t a_stride, const float* HWY_RESTRICT b,
                   ptrdiff_t b_stride, float* HWY_RESTRICT c, ptrdiff_t c_stride, Start start,
                   const float* HWY_RESTRICT alpha) {
  const F32Tag f;
  F32 acc[kRows][kVectors];
  if (start == Start::kZero) {
    for (int m = 0; m < kRows; ++m)
      for (int v = 0; v < kVectors; ++v) acc[m][v] = hn::Zero(f);
  } else {
    for (int m = 0; m < kRows; ++m)
      for (int v = 0; v < kVectors; ++v) acc[m][v] = hn::LoadU(f, c + m * c_stride + v * kLanes);
    if (start == Start::kScaled) {
      for (int v = 0; v < kVectors; ++v) {
        const F32 scale = hn::LoadU(f, alpha + v * kLanes);
        for (int m = 0; m < kRows; ++m) acc[m][v] = hn::Mul(acc[m][v], scale);
      }
    }
  }
  for (int64_t k = 0; k < num_k; ++k) {
    F32 lanes[kVectors];
    for (int v = 0; v < kVectors; ++v) lanes[v] = hn::LoadU(f, b + v * kLanes);
    for (int m = 0; m < kRows; ++m) {
      const F32 factor = hn::Set(f, kOrder == AOrder::kRows ? a[m * a_stride] : a[m]);
      for (int v = 0; v < kVectors; ++v) acc[m][v] = hn::MulAdd(factor, lanes[v], acc[m][v]);
    }
    a += kOrder == AOrder::kRows ? 1 : a_stride;
    b += b_stride;
  }
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < kVectors; ++v) hn::StoreU(acc[m][v], f, c + m * c_stride + v * kLanes);
}

template <AOrder kOrder, int kVectors>
void register_tile_rows(int64_t num_rows, int64_t num_k, const float* a, ptrdiff_t a_stride, const float* b,
                        ptrdiff_t b_stride, float* c, ptrdiff_t c_stride, Start start, const float* alpha) {
  const ptrdiff_t a_step = kOrder == AOrder::kRows ? a_stride : 1;
  for (; num_rows >= kTileRows; num_rows -= kTileRows, a += kTileRows * a_step, c += kTileRows * c_stride)
    register_tile<kOrder, kTileRows, kVectors>(num_k, a, a_stride, b, b_stride, c, c_stride, start, alpha);
  // What is left goes in tiles of 4, 2 and 1 rows: half as many tiles to compile, and head dims and blocks of keys leave 4 or 2.
  if (num_rows >= 4) {
    register_tile<kOrder, 4, kVectors>(num_k, a, a_stride, b, b_stride, c, c_stride, start, alpha);
    num_rows -= 4, a += 4 * a_step, c += 4 * c_stride;
  }
  if (num_rows >= 2) {
    register_tile<kOrder, 2, kVectors>(num_k, a, a_stride, b, b_stride, c, c_stride, start, alpha);
    num_rows -= 2, a += 2 * a_step, c += 2 * c_stride;
  }
  if (num_rows == 1) register_tile<kOrder, 1, kVectors>(num_k, a, a_stride, b, b_stride, c, c_stride, start, alpha);
}

// The product above: C is num_rows x (num_vectors * kLanes). alpha (one factor a lane) is read for kScaled only. num_k
// may be 0. Rows of B and C must be whole vectors long; A is read exactly where the formula says.
template <AOrder kOrder>
void multiply(int64_t num_rows, int64_t num_vectors, int64_t num_k, const float* a, ptrdiff_t a_stride, const float* b,
              ptrdiff_t b_stride, float* c, ptrdiff_t c_stride, Start start, const float* alpha = nullptr) {
  while (num_vectors > 0) {
    int step = kTileVectors;
    if (num_vectors >= kTileVectors) {
      register_tile_rows<kOrder, kTileVectors>(num_rows, num_k, a, a_stride, b, b_stride, c, c_stride, start, alpha);
    } else if (kTileVectors > 2 && num_vectors == 3) {
      step = 3;
      register_tile_rows<kOrder, kTileVectors - 1>(num_rows, num_k, a, a_stride, b, b_stride, c, c_stride, start,
                                                   alpha);
    } else if (kTileVectors > 2 && num_vectors == 2) {
      step = 2;
      register_tile_rows<kOrder, 2>(num_rows, num_k, a, a_stride, b, b_stride, c, c_stride, start, alpha);
    } else {
      step = 1;
      register_tile_rows<kOrder, 1>(num_rows, num_k, a, a_stride, b, b_stride, c, c_stride, start, alpha);
    }
    num_vectors -= step;
    b += step * kLanes;
    c += step * kLanes;
    if (alpha != nullptr) alpha += step * kLanes;
  }
}

// dst[column][row] = src(row)[column] * factor for rows in [0, num_rows), columns in [0, num_columns): 4 x 4 blocks in
// 128-bit vectors. src_row gives a row's first element; dst rows have room for num_rows rounded up to 4, and what is
// written past num_rows repeats the last row.
template <class RowAt>
void transpose_rows(const RowAt& src_row, int64_t num_rows, int64_t num_columns, float factor, float* HWY_RESTRICT dst,
                    ptrdiff_t dst_stride) {
  const hn::Full128<float> d4;
  const hn::Repartition<double, decltype(d4)> d2;
  const auto scale = hn::Set(d4, factor);
  for (int64_t r = 0; r < num_rows; r += 4) {
    const float* row[4];
    for (int64_t i = 0; i < 4; ++i) row[i] = src_row(HWY_MIN(r + i, num_rows - 1));
    float* out = dst + r;
    const int64_t whole = num_columns / 4 * 4;
    for (int64_t c = 0; c < whole; c += 4) {
      const auto r0 = hn::Mul(hn::LoadU(d4, row[0] + c), scale), r1 = hn::Mul(hn::LoadU(d4, row[1] + c), scale);
      const auto r2 = hn::Mul(hn::LoadU(d4, row[2] + c), scale), r3 = hn::Mul(hn::LoadU(d4, row[3] + c), scale);
      const auto t0 = hn::BitCast(d2, hn::InterleaveLower(d4, r0, r1)),
                 t1 = hn::BitCast(d2, hn::InterleaveLower(d4, r2, r3));
      const auto t2 = hn::BitCast(d2, hn::InterleaveUpper(d4, r0, r1)),
                 t3 = hn::BitCast(d2, hn::InterleaveUpper(d4, r2, r3));
      hn::StoreU(hn::BitCast(d4, hn::InterleaveLower(d2, t0, t1)), d4, out + (c + 0) * dst_stride);
      hn::StoreU(hn::BitCast(d4, hn::InterleaveUpper(d2, t0, t1)), d4, out + (c + 1) * dst_stride);
      hn::StoreU(hn::BitCast(d4, hn::InterleaveLower(d2, t2, t3)), d4, out + (c + 2) * dst_stride);
      hn::StoreU(hn::BitCast(d4, hn::InterleaveUpper(d2, t2, t3)), d4, out + (c + 3) * dst_stride);
    }
    for (int64_t c = whole; c < num_columns; ++c)
      for (int64_t i = 0; i < 4; ++i) out[c * dst_stride + i] = row[i][c] * factor;
  }
}

}  // namespace heed::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include guard, flipped per target
