// The instructions of AMX that the forward pass uses, one function each, and no logic. A tile is 16 rows of 64 bytes.
// They are written as assembly because compilers offer their intrinsics only in functions of a target that the rest is
// not compiled for; the volatile order is the program's order, and no compiler touches a tile by itself.
//
// tests/emulated_amx has plain C++ with the same names, to prove the kernel on machines without AMX.
#pragma once

#include <cstddef>
#include <cstdint>

namespace heed::cpu {

struct AmxTiles {
  // All eight tiles at full size. A thread's tiles are its own; their state costs at every context switch until
  // released.
  static void configure() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static_assert(sizeof(Config) == 64);
    static constexpr Config kConfig;
    asm volatile("ldtilecfg %0" : : "m"(kConfig));
  }
  static void release() { asm volatile("tilerelease"); }

  template <int kTile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  template <int kTile>
  static void load(const void* rows, ptrdiff_t stride_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride_bytes), "i"(kTile) : "memory");
  }
  template <int kTile>
  static void store(void* rows, ptrdiff_t stride_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride_bytes), "i"(kTile) : "memory");
  }
  // C[m][n] += sum over k of A[m][2k] B[k][2n] + A[m][2k + 1] B[k][2n + 1]: A 16 x 32 bf16, B 16 rows of 16 pairs, C
  // f32. Even and odd products are summed apart, then together, then into C; denormals are read and written as 0.
  template <int kC, int kA, int kB>
  static void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }
};

}  // namespace heed::cpu
