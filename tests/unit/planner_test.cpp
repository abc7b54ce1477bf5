// The planner: who is asked, who is chosen, what is said when nobody can.
#include "plan/planner.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cstdio>
#include <set>
#include <string>
#include <thread>

#include "base/threads.h"
#include "ops/problem_line.h"
#include "plan/registry.h"

namespace heed {
namespace {

AttentionProblem attention(const char* line) {
  Result<ProblemLine> parsed = parse_problem_line(line);
  EXPECT_TRUE(parsed.ok()) << parsed.status().message();
  return std::get<AttentionProblem>(parsed.value().problem);
}

const char kLine[] = "attention b=2 hq=4 hkv=2 sq=33 sk=70 d=64 causal lse";

bool contains(const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; }

TEST(Registry, NamesAreUniqueAndTheReferenceIsLast) {
  std::set<std::string_view> names;
  for (const auto* row : impls<AttentionProblem>()) names.insert(row->name);
  EXPECT_EQ(names.size(), impls<AttentionProblem>().size());
  EXPECT_EQ(impls<AttentionProblem>().back()->name, "ref/attention");
  EXPECT_EQ(impls<KvAppendProblem>().back()->name, "ref/kv_append");
  for (const auto* row : impls<AttentionProblem>()) {
    EXPECT_EQ(row->only_forced, row->name.starts_with("ref/"));
    EXPECT_FALSE(row->summary.empty());
    EXPECT_EQ(row->name.data()[row->name.size()], '\0') << "the C interface hands it out as it is";
  }
}

TEST(Planner, TheCheapestThatAcceptsIsChosen) {
  auto candidates = judge(attention(kLine), "");
  ASSERT_TRUE(candidates.ok()) << candidates.status().message();
  ASSERT_EQ(candidates.value().size(), impls<AttentionProblem>().size());
  int chosen = 0;
  double chosen_cost = 0;
  for (const auto& candidate : candidates.value()) {
    if (!candidate.verdict.accepted) {
      EXPECT_FALSE(candidate.chosen);
      EXPECT_LT(candidate.cost_us, 0);
      EXPECT_FALSE(candidate.verdict.reason.empty()) << candidate.impl->name;
      continue;
    }
    EXPECT_GE(candidate.cost_us, 0);
    if (candidate.chosen) ++chosen, chosen_cost = candidate.cost_us;
  }
  EXPECT_EQ(chosen, 1);
  for (const auto& candidate : candidates.value()) {
    if (!candidate.verdict.accepted) continue;
    EXPECT_LE(chosen_cost, candidate.cost_us);
  }
}

TEST(Planner, TheReferenceIsNeverChosenByItself) {
  auto candidates = judge(attention(kLine), "");
  ASSERT_TRUE(candidates.ok());
  EXPECT_FALSE(candidates.value().back().verdict.accepted);
  EXPECT_TRUE(contains(candidates.value().back().verdict.reason, "forced"));
  // f64 is for the reference alone: an error that says so, not a fall to it.
  const auto plan = make_plan(attention("attention sq=4 sk=4 d=8 f64"), "");
  ASSERT_FALSE(plan.ok());
  EXPECT_EQ(plan.status().code(), StatusCode::kNotSupported);
  EXPECT_TRUE(contains(plan.status().message(), "nearest: ref/attention")) << plan.status().message();
}

TEST(Planner, AForcedBackendIsThatOneOrAnError) {
  for (const char* backend : {"ref", "ref/attention"}) {
    const auto plan = make_plan(attention(kLine), backend);
    ASSERT_TRUE(plan.ok()) << plan.status().message();
    EXPECT_EQ(plan.value()->impl->name, "ref/attention");
  }
  const auto folder = make_plan(attention(kLine), "cpu");
  ASSERT_TRUE(folder.ok()) << folder.status().message();
  EXPECT_TRUE(folder.value()->impl->name.starts_with("cpu/attention_fwd"));

  const auto unknown = make_plan(attention(kLine), "gpu");
  ASSERT_FALSE(unknown.ok());
  EXPECT_EQ(unknown.status().code(), StatusCode::kNotFound);
  for (const auto* row : impls<AttentionProblem>()) EXPECT_TRUE(contains(unknown.status().message(), row->name));

  EXPECT_EQ(make_plan(attention(kLine), "cpu/").status().code(), StatusCode::kNotFound);
  EXPECT_EQ(make_plan(attention(kLine), "re").status().code(), StatusCode::kNotFound);

  const auto other_op = make_plan(attention(kLine), "cpu/kv_append");
  EXPECT_EQ(other_op.status().code(), StatusCode::kNotSupported);
  EXPECT_TRUE(contains(other_op.status().message(), "does not do attention")) << other_op.status().message();

  const auto declines = make_plan(attention(kLine), "cpu/attention_bwd_generic");
  EXPECT_EQ(declines.status().code(), StatusCode::kNotSupported);
  EXPECT_TRUE(contains(declines.status().message(), "cpu/attention_bwd_generic")) << declines.status().message();
}

TEST(Planner, EveryForcedRowThatAcceptsIsTheOneThatRuns) {
  for (const char* line : {kLine, "attention b=1 hq=2 sq=9 sk=9 d=32 pass=bwd grads=dq,dk,dv"}) {
    const AttentionProblem problem = attention(line);
    for (const auto* row : impls<AttentionProblem>()) {
      const auto plan = make_plan(problem, row->name);
      if (plan.ok()) {
        EXPECT_EQ(plan.value()->impl, row);
        EXPECT_FALSE(plan.value()->steps.empty());
      } else {
        EXPECT_EQ(plan.status().code(), StatusCode::kNotSupported) << plan.status().message();
      }
    }
  }
}

TEST(Planner, ThreadsAreResolved) {
  AttentionProblem problem = attention(kLine);
  problem.threads = 0;
  EXPECT_EQ(make_plan(problem, "ref").value()->problem.threads, pool_executor().num_threads);
  problem.threads = 3;
  EXPECT_EQ(make_plan(problem, "ref").value()->problem.threads, 3);
}

TEST(Planner, AnInvalidProblemIsNotPlanned) {
  AttentionProblem problem = attention(kLine);
  problem.nheads_kv = 3;
  EXPECT_EQ(make_plan(problem, "").status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(judge(problem, "").status().code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(contains(explain(problem, ""), "nheads_q"));
}

TEST(Planner, ExplainSaysAll) {
  const AttentionProblem problem = attention(kLine);
  const std::string text = explain(problem, "");
  EXPECT_TRUE(contains(text, "problem   attention b=2"));
  EXPECT_TRUE(contains(text, "FLOP per byte"));
  for (const auto* row : impls<AttentionProblem>()) EXPECT_TRUE(contains(text, row->name)) << text;
  EXPECT_TRUE(contains(text, "step 1:")) << text;
  EXPECT_TRUE(contains(text, "workspace")) << text;
  EXPECT_TRUE(contains(explain(problem, "nobody"), "no such backend"));
  EXPECT_TRUE(contains(explain(problem, "ref"), "> ref/attention"));
}

TEST(Planner, CachedPlansAreSharedAndCounted) {
  plan_cache_clear();
  const AttentionProblem problem = attention(kLine);
  const auto first = cached_plan(problem, "ref");
  const auto second = cached_plan(problem, "ref");
  ASSERT_TRUE(first.ok());
  EXPECT_EQ(first.value(), second.value());
  EXPECT_EQ(plan_cache_stats().hits, 1);
  EXPECT_EQ(plan_cache_stats().misses, 1);
  EXPECT_EQ(plan_cache_stats().entries, 1);
  EXPECT_FALSE(cached_plan(problem, "nobody").ok());
  EXPECT_EQ(plan_cache_stats().entries, 1) << "errors are not kept";

  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 500; ++i) EXPECT_EQ(cached_plan(problem, "ref").value(), first.value());
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(plan_cache_stats().hits, 2001);
}

TEST(Planner, CostOfAMissIsPrinted) {
  AttentionProblem problem = attention(kLine);
  constexpr int kMisses = 2000;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < kMisses; ++i) {
    problem.window_left = 100 + i;
    ASSERT_TRUE(cached_plan(problem, "").ok());
  }
  const auto spent = std::chrono::steady_clock::now() - start;
  std::printf("[   note   ] a plan miss: %.1f us\n",
              std::chrono::duration<double, std::micro>(spent).count() / kMisses);
}

}  // namespace
}  // namespace heed
