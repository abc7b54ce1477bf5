// Facts about the machine that checks, costs and blocking depend on. Read once.
#pragma once

#include <cstdint>
#include <string>

namespace heed {

struct CpuFacts {
  std::string vendor;  // "AuthenticAMD"
  std::string model;   // "AMD EPYC"
  int32_t family = 0;
  int32_t model_number = 0;
  int32_t num_cores = 1;  // that this process may run on
  int64_t l1d_bytes = 32 << 10;
  int64_t l2_bytes = 1 << 20;  // of one core
  int64_t l3_bytes = 0;        // shared; 0 unknown
  bool avx2 = false;           // with FMA, F16C and BMI2, and the OS saves ymm
  bool avx512 = false;         // F, BW, CD, DQ, VL, and the OS saves zmm
  bool avx512_bf16 = false;    // the dot product of pairs
  bool amx_bf16 = false;       // tiles and their product, with AVX-512, and the OS knows their state; see cpu/amx.h
  bool neon = false;
  // The bf16 dot product does at least 1.5x the multiply-adds of f32 FMA (AMD Zen 4 and later; Intel without AMX: half).
  bool bf16_dot_pays = false;
};

struct Machine {
  CpuFacts cpu;
};

const Machine& machine();

}  // namespace heed
