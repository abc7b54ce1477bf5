// In place of src/cpu/kernels/amx_tiles.h: what the instructions do, by their description, in plain C++.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace heed::cpu {

struct AmxTiles {
  static void configure() { std::memset(tiles(), 0, kAllBytes), configured() = true; }
  static void release() { configured() = false; }

  template <int kTile>
  static void zero() {
    std::memset(at<kTile>(), 0, kBytes);
  }
  template <int kTile>
  static void load(const void* rows, ptrdiff_t stride_bytes) {
    for (int r = 0; r < 16; ++r)
      std::memcpy(at<kTile>() + r * 64, static_cast<const char*>(rows) + r * stride_bytes, 64);
  }
  template <int kTile>
  static void store(void* rows, ptrdiff_t stride_bytes) {
    for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(rows) + r * stride_bytes, at<kTile>() + r * 64, 64);
  }
  template <int kC, int kA, int kB>
  static void dot() {
    const uint16_t *a = numbers<kA>(), *b = numbers<kB>();
    for (int m = 0; m < 16; ++m) {
      float even[16] = {}, odd[16] = {}, row[16];
      for (int k = 0; k < 16; ++k) {
        const float a0 = widen(a[m * 32 + k * 2]), a1 = widen(a[m * 32 + k * 2 + 1]);
        for (int n = 0; n < 16; ++n) {  // a product of two bf16 is exact in f32
          even[n] = flush(even[n] + a0 * widen(b[k * 32 + n * 2]));
          odd[n] = flush(odd[n] + a1 * widen(b[k * 32 + n * 2 + 1]));
        }
      }
      std::memcpy(row, at<kC>() + m * 64, sizeof row);
      for (int n = 0; n < 16; ++n) row[n] = flush(flush(row[n]) + flush(even[n] + odd[n]));
      std::memcpy(at<kC>() + m * 64, row, sizeof row);
    }
  }

 private:
  static constexpr int kBytes = 16 * 64, kAllBytes = 8 * kBytes;
  static char* tiles() {
    alignas(64) static thread_local char all[kAllBytes];
    return all;
  }
  static bool& configured() {
    static thread_local bool state = false;
    return state;
  }
  template <int kTile>
  static char* at() {
    static_assert(kTile >= 0 && kTile < 8);
    if (!configured()) __builtin_trap();  // as the instruction would
    return tiles() + kTile * kBytes;
  }
  template <int kTile>
  static const uint16_t* numbers() {
    return reinterpret_cast<const uint16_t*>(at<kTile>());
  }
  static float flush(float x) { return std::fabs(x) < 0x1p-126f ? 0.0f : x; }
  static float widen(uint16_t bf16) { return flush(std::bit_cast<float>(uint32_t{bf16} << 16)); }
};

}  // namespace heed::cpu
