// A boolean mask tensor as bits, for attention_fwd_sm90: a mask is read many times, by every head where it is broadcast, and
// a row's bits of a tile of keys are one or two words.
//
//   bits[row][w] bit i = mask[row][32 w + i] != 0          a thread a word; bits behind the last key are 0
#include "params.h"
#include "ptx.cuh"

namespace heed::cuda {

struct PackMaskVariant {
  int threads = 256;
};

// Of four bytes, which are not 0: bits 0 .. 3.
__device__ __forceinline__ u32 bits_of_bytes(u32 x) {
  const u32 set = ((((x & 0x7f7f7f7fu) + 0x7f7f7f7fu) | x) >> 7) & 0x01010101u;
  return set * 0x01020408u >> 24 & 0xfu;
}

template <PackMaskVariant kV>
__global__ void __launch_bounds__(kV.threads) pack_mask(const __grid_constant__ PackMaskParams p) {
  constexpr int kKeys = 32;
  wait_for_primary();  // which may still read the bits of the run before
  launch_dependents();
  const i64 index = static_cast<i64>(blockIdx.x) * kV.threads + threadIdx.x;
  if (index >= p.total) return;
  const i64 word = index % p.words, line = index / p.words, row = line % p.rows, head = line / p.rows % p.heads;
  const i64 b = line / p.rows / p.heads, first = word * kKeys;
  const int keys = static_cast<int>(min(p.keys - first, static_cast<i64>(kKeys)));  // none or fewer at the end of a row
  const unsigned char* from =
      p.mask + b * p.stride.b + head * p.stride.h + row * p.stride.i + first * p.stride.j;
  const u64 address = reinterpret_cast<u64>(from);
  u32 bits = 0;
  if (keys == kKeys && p.stride.j == 1 && address % 16 == 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 x = reinterpret_cast<const uint4*>(from)[i];
      const u32 half = bits_of_bytes(x.x) | bits_of_bytes(x.y) << 4 | bits_of_bytes(x.z) << 8 | bits_of_bytes(x.w) << 12;
      bits |= half << (16 * i);
    }
  } else if (keys == kKeys && p.stride.j == 1 && address % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i)
      bits |= bits_of_bytes(reinterpret_cast<const unsigned short*>(from)[i]) << (2 * i);
  } else {
#pragma unroll 8
    for (int i = 0; i < keys; ++i) bits |= static_cast<u32>(from[i * p.stride.j] != 0) << i;
  }
  p.bits[index] = bits;
}

}  // namespace heed::cuda
