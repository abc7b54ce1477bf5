// Stands in for src/cuda/kernels/ptx.cuh where kernels run on the host: what attention_fwd_sm90 uses of it.
#pragma once

#include "params.h"

namespace heed::cuda {

inline u32 smem_address(const void*) { return 0; }
inline void store_shared_16(u32 address, unsigned short x) { emulated::store(address, x); }
inline void wait_for_primary() {}
inline void launch_dependents() {}
inline int uniform(int x) { return __reduce_max_sync(0xffffffffu, x); }
inline u64 count_arrival(u64* counter, u64 count) {
  const u64 before = *counter;
  *counter += count;
  return before;
}
inline float load_from_l2(const float* from) { return *from; }
inline float4 load_from_l2_16(const float* from) { return {from[0], from[1], from[2], from[3]}; }
inline float ex2(float x) { return std::exp2(x); }
inline float lg2(float x) { return std::log2(x); }

// Only named by what is not run here.
inline void cp_async_16(u32, const void*, int) { emulated::fail("cp.async is not emulated"); }

inline void ldmatrix_x4(u32 (&r)[4], u32 address) {
  const emulated::Lanes rows = emulated::exchange(address);
  const u32 lane = threadIdx.x % 32;
  for (u32 m = 0; m < 4; ++m) r[m] = emulated::load<u32>(static_cast<u32>(rows.value[m * 8 + lane / 4][0]) + lane % 4 * 4);
}
// Lane g * 4 + t gets rows 2 t and 2 t + 1 of column g of each matrix.
inline void ldmatrix_x4_trans(u32 (&r)[4], u32 address) {
  const emulated::Lanes rows = emulated::exchange(address);
  const u32 lane = threadIdx.x % 32;
  const auto element = [&](u32 m, u32 row) {
    return emulated::load<unsigned short>(static_cast<u32>(rows.value[m * 8 + row][0]) + lane / 4 * 2);
  };
  for (u32 m = 0; m < 4; ++m) r[m] = element(m, lane % 4 * 2) | u32{element(m, lane % 4 * 2 + 1)} << 16;
}
inline u32 movmatrix_trans(u32 x) {
  const emulated::Lanes all = emulated::exchange(x);
  const u32 lane = threadIdx.x % 32;
  const auto element = [&](u32 row) {  // of column lane / 4
    return static_cast<u32>(all.value[row * 4 + lane / 8][0] >> lane / 4 % 2 * 16) & 0xffff;
  };
  return element(lane % 4 * 2) | element(lane % 4 * 2 + 1) << 16;
}

// Rows and columns of a 16 x 16 fragment: lane g * 4 + t holds of registers r the row g + r % 2 * 8, columns
// r / 2 * 8 + t * 2 and the next.
template <bool kBf16>
float element_of_fragment(const emulated::Lanes& fragment, u32 row, u32 column) {
  const uint64_t pair = fragment.value[row % 8 * 4 + column % 8 / 2][row / 8 + column / 8 * 2];
  return emulated::to_float<kBf16>(pair >> column % 2 * 16);
}

template <bool kBf16>
void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  const emulated::Lanes of_a = emulated::exchange(a[0], a[1], a[2], a[3]), of_b = emulated::exchange(b0, 0, b1);
  const u32 lane = threadIdx.x % 32;
  for (u32 i = 0; i < 4; ++i)
    for (u32 k = 0; k < 16; ++k)
      d[i] += element_of_fragment<kBf16>(of_a, lane / 4 + i / 2 * 8, k) *
              element_of_fragment<kBf16>(of_b, lane % 4 * 2 + i % 2, k);
}

template <bool kBf16>
u32 cvt_pair(float lo, float hi) {
  return emulated::to_16<kBf16>(lo) | u32{emulated::to_16<kBf16>(hi)} << 16;
}
template <bool kBf16>
float cvt_to_float(unsigned short bits) {
  return emulated::to_float<kBf16>(bits);
}

template <bool kBf16>
u32 rest_of_pair(float x, float y, u32 rounded) {
  return cvt_pair<kBf16>(x - cvt_to_float<kBf16>(static_cast<unsigned short>(rounded)),
                         y - cvt_to_float<kBf16>(static_cast<unsigned short>(rounded >> 16)));
}

}  // namespace heed::cuda
