// heed_attention_time and heed_kv_append_time: options, errors, and figures that can be true.
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <string>
#include <vector>

#include "heed/heed.h"

namespace heed {
namespace {

struct Planned {
  explicit Planned(const char* line) {
    EXPECT_EQ(heed_inputs_create(line, &inputs), HEED_OK) << heed_last_error();
    EXPECT_EQ(heed_plan_create(heed_inputs_problem(inputs), nullptr, &plan), HEED_OK) << heed_last_error();
    workspace.resize(heed_plan_workspace_bytes(plan) + 64);
    void* const pointer = workspace.data() + (64 - reinterpret_cast<uintptr_t>(workspace.data()) % 64);
    if (heed_attention_args* args = heed_inputs_attention(inputs)) {
      args->workspace = pointer;
      args->workspace_bytes = workspace.size() - 64;
    }
    if (heed_kv_append_args* args = heed_inputs_kv_append(inputs)) {
      args->workspace = pointer;
      args->workspace_bytes = workspace.size() - 64;
    }
  }
  ~Planned() {
    heed_plan_destroy(plan);
    heed_inputs_destroy(inputs);
  }
  heed_status time(const heed_timing_options* options, heed_timing* timing) const {
    return heed_attention_time(plan, heed_inputs_attention(inputs), options, timing);
  }
  heed_inputs* inputs = nullptr;
  heed_plan* plan = nullptr;
  std::vector<unsigned char> workspace;
};

heed_timing empty() {
  heed_timing timing = {};
  timing.struct_size = sizeof timing;
  return timing;
}

TEST(Timing, FiguresAreOrdered) {
  const Planned planned("attention b=1 hq=2 hkv=2 sq=64 sk=64 d=32 f32 lse");
  const heed_timing_options options = {sizeof options, 7, 0, 200, 0};
  heed_timing timing = empty();
  ASSERT_EQ(planned.time(&options, &timing), HEED_OK) << heed_last_error();
  EXPECT_GT(timing.p10_us, 0);
  EXPECT_LE(timing.p10_us, timing.median_us);
  EXPECT_LE(timing.median_us, timing.p90_us);
  EXPECT_GT(timing.host_call_us, 0);
  EXPECT_EQ(timing.host_run_us, timing.median_us);  // a run on the CPU is over when it returns
  EXPECT_EQ(timing.samples, 7);
  EXPECT_GE(timing.calls, 1);
  EXPECT_FALSE(std::isnan(*static_cast<const float*>(heed_inputs_attention(planned.inputs)->out.data)));
}

TEST(Timing, TimeIsThatOfTheWork) {
  const heed_timing_options options = {sizeof options, 5, 2, 0, 0};
  heed_timing small = empty(), large = empty();
  ASSERT_EQ(Planned("attention b=1 hq=1 hkv=1 sq=64 sk=64 d=64 f32 threads=1").time(&options, &small), HEED_OK);
  ASSERT_EQ(Planned("attention b=1 hq=1 hkv=1 sq=512 sk=512 d=64 f32 threads=1").time(&options, &large), HEED_OK);
  EXPECT_GT(large.median_us, 4 * small.median_us);  // 64 times the work
  EXPECT_EQ(large.calls, 2);
}

TEST(Timing, RestsBeforeEachSample) {
  const Planned planned("attention b=1 hq=1 hkv=1 sq=4 sk=4 d=8 f32");
  const heed_timing_options options = {sizeof options, 4, 1, 0, 20};
  heed_timing timing = empty();
  const auto start = std::chrono::steady_clock::now();
  ASSERT_EQ(planned.time(&options, &timing), HEED_OK) << heed_last_error();
  EXPECT_GE(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(80));
}

TEST(Timing, KvAppend) {
  const Planned planned("kv_append b=2 hkv=2 sn=3 sk=64 d=32 f32");
  const heed_timing_options options = {sizeof options, 3, 2, 0, 0};
  heed_timing timing = empty();
  ASSERT_EQ(heed_kv_append_time(planned.plan, heed_inputs_kv_append(planned.inputs), &options, &timing), HEED_OK)
      << heed_last_error();
  EXPECT_GT(timing.median_us, 0);
  // A plan of the other op.
  EXPECT_EQ(planned.time(&options, &timing), HEED_INVALID_ARGUMENT);
}

TEST(Timing, WrongOptionsAreNamed) {
  const Planned planned("attention b=1 hq=1 hkv=1 sq=4 sk=4 d=8 f32");
  const double nan = std::nan("");
  const struct {
    heed_timing_options options;
    const char* named;
  } wrong[] = {
      {{sizeof(heed_timing_options), -1, 0, 0, 0}, "options.samples = -1"},
      {{sizeof(heed_timing_options), 200000, 0, 0, 0}, "options.samples = 200000"},
      {{sizeof(heed_timing_options), 0, -2, 0, 0}, "options.calls = -2"},
      {{sizeof(heed_timing_options), 0, 0, -1, 0}, "options.sample_us = -1"},
      {{sizeof(heed_timing_options), 0, 0, nan, 0}, "options.sample_us = nan"},
      {{sizeof(heed_timing_options), 0, 0, 0, 1e6}, "options.pause_ms = 1000000"},
      {{8, 0, 0, 0, 0}, "options.struct_size = 8"},
  };
  for (const auto& row : wrong) {
    heed_timing timing = empty();
    timing.median_us = -5;
    EXPECT_EQ(planned.time(&row.options, &timing), HEED_INVALID_ARGUMENT) << row.named;
    EXPECT_NE(std::string(heed_last_error()).find(row.named), std::string::npos) << heed_last_error();
    EXPECT_EQ(timing.median_us, -5);  // nothing written on an error
  }
  heed_timing timing = {};
  EXPECT_EQ(planned.time(nullptr, &timing), HEED_INVALID_ARGUMENT);
  EXPECT_NE(std::string(heed_last_error()).find("timing.struct_size"), std::string::npos);
  EXPECT_EQ(planned.time(nullptr, nullptr), HEED_INVALID_ARGUMENT);
  timing = empty();
  EXPECT_EQ(heed_attention_time(nullptr, heed_inputs_attention(planned.inputs), nullptr, &timing),
            HEED_INVALID_ARGUMENT);
  EXPECT_EQ(heed_attention_time(planned.plan, nullptr, nullptr, &timing), HEED_INVALID_ARGUMENT);
}

TEST(Timing, AFailingRunIsItsError) {
  Planned planned("attention b=1 hq=1 hkv=1 sq=4 sk=4 d=8 f32");
  heed_inputs_attention(planned.inputs)->q.data = nullptr;
  heed_timing timing = empty();
  EXPECT_EQ(planned.time(nullptr, &timing), HEED_INVALID_ARGUMENT);
  EXPECT_NE(std::string(heed_last_error()).find("q"), std::string::npos) << heed_last_error();
}

}  // namespace
}  // namespace heed
