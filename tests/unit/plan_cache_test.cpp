// The plan cache: keys, eviction order, counters, many threads.
#include "plan/plan_cache.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

namespace heed {
namespace {

struct Question {
  int64_t number = 0;
  int64_t words[90] = {};
};

const char kOp = 0, kOtherOp = 0;

PlanKey key_of(const Question& question, std::string_view backend = "", const void* op = &kOp) {
  return {op, std::as_bytes(std::span(&question, 1)), backend};
}

std::shared_ptr<const void> plan_number(int64_t number) { return std::make_shared<const int64_t>(number); }
int64_t number_of(const std::shared_ptr<const void>& plan) {
  return plan == nullptr ? -1 : *static_cast<const int64_t*>(plan.get());
}

TEST(PlanCache, FindsWhatWasPut) {
  PlanCache cache(1024);
  for (int64_t i = 0; i < 100; ++i) {
    const Question question{i, {}};
    EXPECT_EQ(cache.find(key_of(question)), nullptr);
    cache.insert(key_of(question), plan_number(i));
  }
  for (int64_t i = 0; i < 100; ++i) EXPECT_EQ(number_of(cache.find(key_of(Question{i, {}}))), i);
  const PlanCacheStats stats = cache.stats();
  EXPECT_EQ(stats.hits, 100);
  EXPECT_EQ(stats.misses, 100);
  EXPECT_EQ(stats.entries, 100);
  EXPECT_EQ(stats.capacity, 1024);
}

TEST(PlanCache, EveryPartOfTheKeyCounts) {
  PlanCache cache(1024);
  Question question{1, {}};
  cache.insert(key_of(question), plan_number(1));
  cache.insert(key_of(question, "ref"), plan_number(2));
  cache.insert(key_of(question, "", &kOtherOp), plan_number(3));
  EXPECT_EQ(number_of(cache.find(key_of(question))), 1);
  EXPECT_EQ(number_of(cache.find(key_of(question, "ref"))), 2);
  EXPECT_EQ(number_of(cache.find(key_of(question, "", &kOtherOp))), 3);
  EXPECT_EQ(cache.find(key_of(question, "re")), nullptr);
  for (int64_t& word : question.words) {
    word = 1;
    EXPECT_EQ(cache.find(key_of(question)), nullptr);
    word = 0;
  }
}

TEST(PlanCache, TheLeastRecentlyUsedGoesFirst) {
  PlanCache cache(3);
  for (int64_t i = 0; i < 3; ++i) cache.insert(key_of(Question{i, {}}), plan_number(i));
  cache.find(key_of(Question{0, {}}));
  cache.insert(key_of(Question{3, {}}), plan_number(3));
  EXPECT_EQ(cache.find(key_of(Question{1, {}})), nullptr);
  for (const int64_t kept : {0, 2, 3}) EXPECT_EQ(number_of(cache.find(key_of(Question{kept, {}}))), kept);
  EXPECT_EQ(cache.stats().entries, 3);
}

TEST(PlanCache, IsBounded) {
  for (const int64_t capacity : {1, 2, 63, 64, 100, 128, 1000, 1024}) {
    PlanCache cache(capacity);
    for (int64_t i = 0; i < 3 * capacity; ++i) cache.insert(key_of(Question{i, {}}), plan_number(i));
    const PlanCacheStats stats = cache.stats();
    EXPECT_LE(stats.entries, capacity);
    EXPECT_LE(stats.capacity, capacity);
    EXPECT_GT(stats.capacity, capacity / 2);
  }
}

TEST(PlanCache, CapacityZeroKeepsNothing) {
  PlanCache cache(0);
  EXPECT_EQ(number_of(cache.insert(key_of(Question{1, {}}), plan_number(1))), 1);
  EXPECT_EQ(cache.find(key_of(Question{1, {}})), nullptr);
  EXPECT_EQ(cache.stats().entries, 0);
}

TEST(PlanCache, APlanInUseOutlivesItsEntry) {
  PlanCache cache(1);
  const std::shared_ptr<const void> held = cache.insert(key_of(Question{1, {}}), plan_number(1));
  cache.insert(key_of(Question{2, {}}), plan_number(2));
  EXPECT_EQ(cache.find(key_of(Question{1, {}})), nullptr);
  EXPECT_EQ(number_of(held), 1);
  cache.clear();
  EXPECT_EQ(cache.stats().entries, 0);
  EXPECT_EQ(cache.stats().hits, 0);
}

TEST(PlanCache, TheFirstOfTwoWins) {
  PlanCache cache(8);
  cache.insert(key_of(Question{1, {}}), plan_number(1));
  EXPECT_EQ(number_of(cache.insert(key_of(Question{1, {}}), plan_number(2))), 1);
  EXPECT_EQ(cache.stats().entries, 1);
}

TEST(PlanCache, ManyThreads) {
  PlanCache cache(128);
  std::vector<std::thread> threads;
  std::atomic<int64_t> wrong{0};
  for (int64_t t = 0; t < 6; ++t) {
    threads.emplace_back([&, t] {
      for (int64_t i = 0; i < 3000; ++i) {
        const int64_t number = (i * 7 + t * 13) % 200;
        const Question question{number, {}};
        std::shared_ptr<const void> plan = cache.find(key_of(question));
        if (plan == nullptr) plan = cache.insert(key_of(question), plan_number(number));
        wrong.fetch_add(number_of(plan) != number);
        if (i % 1000 == 999) cache.clear();
        if (i % 100 == 0) wrong.fetch_add(cache.stats().entries > 128);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong.load(), 0);
}

TEST(PlanCache, CostOfAHitIsPrinted) {
  PlanCache cache(1024);
  for (int64_t i = 0; i < 500; ++i) cache.insert(key_of(Question{i, {}}), plan_number(i));
  const Question question{250, {}};
  double best = 1e30;
  for (int attempt = 0; attempt < 5; ++attempt) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < 10000; ++i) cache.find(key_of(question));
    const auto spent = std::chrono::steady_clock::now() - start;
    best = std::min(best, std::chrono::duration<double, std::nano>(spent).count() / 10000);
  }
  std::printf("[   note   ] a hit in a cache of 500 plans: %.0f ns\n", best);
}

}  // namespace
}  // namespace heed
