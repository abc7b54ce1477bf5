#include "base/machine.h"

#include <gtest/gtest.h>

#include "cpu/amx.h"

#if defined(__linux__)
#include <sched.h>
#endif

namespace heed {
namespace {

TEST(Machine, FactsAreConsistent) {
  const CpuFacts& cpu = machine().cpu;
  EXPECT_GE(cpu.num_cores, 1);
  EXPECT_GE(cpu.l1d_bytes, 8 << 10);
  EXPECT_GE(cpu.l2_bytes, cpu.l1d_bytes);
  EXPECT_TRUE(cpu.l3_bytes == 0 || cpu.l3_bytes >= cpu.l2_bytes);
  EXPECT_TRUE(cpu.avx2 || !cpu.avx512);
  EXPECT_TRUE(cpu.avx512 || !cpu.avx512_bf16);
  EXPECT_TRUE(cpu.avx512_bf16 || !cpu.bf16_dot_pays);
  EXPECT_TRUE(cpu.avx512 || !cpu.amx_bf16);
  EXPECT_EQ(&machine(), &machine());
}

TEST(Machine, AmxIsUsedOrRefusedWithASentence) {
  const std::string& refusal = cpu::amx_refusal();
  if (machine().cpu.amx_bf16) {
    EXPECT_TRUE(refusal.empty() || refusal.find("operating system") != std::string::npos) << refusal;
  } else {
    EXPECT_EQ(refusal, "needs a CPU with AMX BF16");
  }
  EXPECT_EQ(&cpu::amx_refusal(), &refusal);  // asked once
}

#if defined(__x86_64__)
TEST(Machine, AgreesWithTheCompilersProbe) {
  const CpuFacts& cpu = machine().cpu;
  EXPECT_EQ(cpu.avx2,
            __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"));
  EXPECT_EQ(cpu.avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl"));
  EXPECT_EQ(cpu.vendor == "AuthenticAMD", __builtin_cpu_is("amd") != 0);
  EXPECT_FALSE(cpu.neon);
  EXPECT_FALSE(cpu.model.empty());
}
#endif

#if defined(__linux__)
TEST(Machine, CountsTheCoresThisProcessMayUse) {
  cpu_set_t set;
  ASSERT_EQ(sched_getaffinity(0, sizeof set, &set), 0);
  EXPECT_LE(machine().cpu.num_cores, CPU_COUNT(&set));
}
#endif

}  // namespace
}  // namespace heed
