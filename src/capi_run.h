// The one-call form, the same for every op: problem, cached plan, workspace, run.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "base/format.h"
#include "base/log.h"
#include "base/status.h"
#include "capi_handles.h"
#include "cuda/jit.h"
#include "cuda/stream_memory.h"
#include "heed/core.h"
#include "plan/planner.h"

namespace heed {

constexpr size_t kWorkspaceAlignment = 64;

// Memory for one run: from the caller's allocator, else aligned malloc or, on CUDA, in the order of the call's stream,
// so that the call waits for nothing and may be captured.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    if (pointer_ == nullptr) return;
    if (allocator_ != nullptr) {
      allocator_->deallocate(allocator_->context, pointer_, bytes_, stream_);
    } else if (device_ == Device::kCuda) {
      try {
        const Status status = cuda::release_on_stream(device_index_, block_, stream_);
        if (!status.ok()) log_message(HEED_LOG_ERROR, heed::format("workspace: {}", status.message()));
      } catch (...) {  // no memory for the sentence: the call's own status counts
      }
    } else {
      std::free(pointer_);
    }
  }

  Status allocate(size_t bytes, Device device, int32_t device_index, const heed_allocator* allocator, void* stream) {
    bytes_ = (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
    device_ = device;
    device_index_ = device_index;
    stream_ = stream;
    if (allocator != nullptr && (allocator->allocate != nullptr || allocator->deallocate != nullptr)) {
      if (allocator->allocate == nullptr || allocator->deallocate == nullptr) {
        return invalid_argument("allocator: allocate and deallocate must both be functions, or both NULL");
      }
      allocator_ = allocator;
      pointer_ = allocator->allocate(allocator->context, bytes_, kWorkspaceAlignment, stream);
    } else if (device == Device::kCuda) {
      const Status status = cuda::allocate_on_stream(device_index, bytes_, stream, block_);
      if (!status.ok()) return {status.code(), heed::format("workspace: {}", status.message())};
      pointer_ = block_.pointer;
    } else {
      pointer_ = std::aligned_alloc(kWorkspaceAlignment, bytes_);
    }
    if (pointer_ == nullptr) return out_of_memory(heed::format("workspace: no memory for {} bytes", bytes_));
    return {};
  }

  void* pointer() const { return pointer_; }
  size_t bytes() const { return bytes_; }

 private:
  const heed_allocator* allocator_ = nullptr;
  void* pointer_ = nullptr;
  cuda::StreamBlock block_;  // CUDA, without an allocator
  size_t bytes_ = 0;
  Device device_ = Device::kCpu;
  int32_t device_index_ = 0;
  void* stream_ = nullptr;
};

template <class Problem>
Status run_once(const Problem& problem, typename ArgsOf<Problem>::type args, std::string_view backend,
                const heed_allocator* allocator) {
  std::optional<cuda::PreparingFor> preparing;
  if (problem.device == Device::kCuda) preparing.emplace(args.stream);
  const Result<std::shared_ptr<const Plan<Problem>>> made = cached_plan(problem, backend);
  if (!made.ok()) return made.status();
  const Plan<Problem>& plan = *made.value();
  Workspace workspace;
  if (args.workspace == nullptr && plan.workspace_bytes > 0) {
    HEED_RETURN_IF_ERROR(
        workspace.allocate(plan.workspace_bytes, problem.device, problem.device_index, allocator, args.stream));
    args.workspace = workspace.pointer();
    args.workspace_bytes = workspace.bytes();
  }
  return run(plan, args);
}

// The plan behind a handle, if it is of this op.
template <class Problem>
Status plan_of(const heed_plan* handle, std::string_view op, const Plan<Problem>*& plan) {
  if (handle == nullptr) return invalid_argument("plan = NULL: must be an address");
  const auto* const pointer = std::get_if<std::shared_ptr<const Plan<Problem>>>(&handle->plan);
  if (pointer == nullptr) return invalid_argument(heed::format("plan: made for another op, must be of {}", op));
  plan = pointer->get();
  return {};
}

// The first field of the two problem lines that differs, in words.
Status differs(const std::string& planned_line, const std::string& asked_line);

// Strides and extents of size 1 say nothing; two problems that differ only there are the same.
template <class Problem, class SlotOf>
void forget_unused_strides(Problem& problem, SlotOf slot) {
  const std::array<int64_t, 4> shape = slot_shape(problem, slot);
  for (size_t dim = 0; dim < 4; ++dim) {
    if (shape[dim] <= 1) problem.strides(slot)[dim] = 0;
  }
}

// Do these arguments pose the plan's problem? Threads may differ, and addresses may be better aligned than promised.
template <class SlotOf, class Problem, class Normalise>
Status check_same(const Problem& planned, Problem asked, Normalise normalise) {
  asked.threads = planned.threads;
  for (size_t i = 0; i < planned.align.size(); ++i) {
    if (asked.align[i] >= planned.align[i] && planned.align[i] != 0) asked.align[i] = planned.align[i];
  }
  if (asked == planned) return {};
  Problem expected = planned;
  normalise(expected);
  normalise(asked);
  for (size_t i = 0; i < planned.align.size(); ++i) {
    forget_unused_strides(expected, static_cast<SlotOf>(i));
    forget_unused_strides(asked, static_cast<SlotOf>(i));
  }
  if (asked == expected) return {};
  return differs(to_string(planned), to_string(asked));
}

}  // namespace heed
