// Timing on a GPU, without one: the driver is tests/gpu/fake_driver.cpp, on which work takes as long as a test says.
#include "cuda/graph_timer.h"

#include <gtest/gtest.h>

#include <string>

#include "gpu/fake_driver.h"

namespace heed::cuda {
namespace {

constexpr double kWorkUs = 20;

class GraphTimerTest : public ::testing::Test {
 protected:
  void TearDown() override { EXPECT_EQ(fake_cuda_live_objects(), 0) << "a stream, event or graph was not destroyed"; }

  int runs_ = 0;
  Enqueue work_ = [this](CUstream stream) {
    ++runs_;
    fake_cuda_work(stream, kWorkUs);
    return Status();
  };
};

TEST_F(GraphTimerTest, TimeOfOneCall) {
  const ContextScope scope(0);
  ASSERT_TRUE(scope.status().ok());
  GraphTimer timer;
  ASSERT_TRUE(timer.open(0).ok());
  const Result<double> rough = timer.rough_us(work_);
  ASSERT_TRUE(rough.ok()) << rough.status().message();
  EXPECT_NEAR(rough.value(), kWorkUs, 0.01);
  EXPECT_EQ(runs_, 4);  // one that is not counted, to load what the work needs

  const int64_t launches = fake_cuda_calls("cuGraphLaunch");
  ASSERT_TRUE(timer.capture(work_, 7).ok());
  EXPECT_EQ(runs_, 11);
  for (int i = 0; i < 3; ++i) {
    const Result<double> sample = timer.sample_us();
    ASSERT_TRUE(sample.ok()) << sample.status().message();
    EXPECT_NEAR(sample.value(), kWorkUs, 0.01);
  }
  EXPECT_EQ(runs_, 11);  // what was captured is replayed, not run again
  EXPECT_EQ(fake_cuda_calls("cuGraphLaunch") - launches, 4);

  const Result<double> host = timer.host_us(work_, 5);
  ASSERT_TRUE(host.ok()) << host.status().message();
  EXPECT_EQ(runs_, 17);
  EXPECT_GT(host.value(), 0);
  EXPECT_LT(host.value(), 1e5);
}

TEST_F(GraphTimerTest, ARunThatFailsEndsTheCapture) {
  const ContextScope scope(0);
  GraphTimer timer;
  ASSERT_TRUE(timer.open(0).ok());
  const Enqueue failing = [this](CUstream) {
    return ++runs_ == 3 ? Status(StatusCode::kInvalidArgument, "q = NULL") : Status();
  };
  const Status status = timer.capture(failing, 5);
  EXPECT_EQ(status.message(), "q = NULL");
  EXPECT_EQ(runs_, 3);
  EXPECT_TRUE(timer.capture(work_, 2).ok());  // the stream is free again
  EXPECT_TRUE(timer.capture(work_, 3).ok());  // in place of the first
  EXPECT_NEAR(timer.sample_us().value(), kWorkUs, 0.01);
}

TEST_F(GraphTimerTest, EveryFailureOfTheDriverIsAnErrorAndLeavesNothing) {
  const ContextScope scope(0);
  for (const char* function :
       {"cuStreamCreate", "cuEventCreate", "cuEventRecord", "cuEventSynchronize", "cuEventElapsedTime",
        "cuStreamBeginCapture_v2", "cuStreamSynchronize", "cuGraphInstantiateWithFlags", "cuGraphLaunch"}) {
    fake_cuda_fail(function, 2, 1);
    const auto all = [&]() -> Status {
      GraphTimer timer;
      HEED_RETURN_IF_ERROR(timer.open(0));
      HEED_RETURN_IF_ERROR(timer.rough_us(work_).status());
      HEED_RETURN_IF_ERROR(timer.capture(work_, 2));
      return timer.sample_us().status();
    };
    const Status status = all();
    EXPECT_EQ(status.code(), StatusCode::kOutOfMemory) << function;
    const std::string name(function);
    const std::string plain = name.substr(0, name.find('_'));
    EXPECT_NE(status.message().find(plain), std::string::npos) << function << ": " << status.message();
    EXPECT_EQ(fake_cuda_live_objects(), 0) << function;
    EXPECT_TRUE(all().ok()) << function;
  }
}

}  // namespace
}  // namespace heed::cuda
