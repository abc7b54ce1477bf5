// Which instruction sets the kernels are compiled for: AVX-512 (Highway's AVX3), AVX2 and plain C++ (EMU128) on x86,
// NEON on ARM. Include before any Highway header. Kernels are taken from their namespaces (N_AVX3, ...) by the
// registry's rows; the dispatch of libhwy is not used, so that library is not needed.
#pragma once

#define HWY_DISABLED_TARGETS (~(HWY_EMU128 | HWY_AVX2 | HWY_AVX3 | HWY_NEON))
// Highway avoids EMU128 with GCC before 12.3, whose vectoriser miscompiles a 16-bit multiply-high (GCC PR 106322).
// Nothing here multiplies 16-bit integers, and EMU128's one-lane substitute has no shuffles.
#define HWY_BROKEN_EMU128 0
