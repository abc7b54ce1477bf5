// CPU parallelism: everything runs through a heed_executor; the default is a small pool of heed's own.
#pragma once

#include <cstdint>
#include <type_traits>

#include "heed/core.h"

namespace heed {

// heed's pool: HEED_THREADS threads counting the caller's; workers spin HEED_SPIN_US, then sleep; rebuilt in a forked child;
// a call from inside one of its own tasks, or while another caller has the workers, runs on the caller's thread alone.
const heed_executor& pool_executor();
const heed_executor& serial_executor();

// body(i) for i in [0, num_tasks).
template <class Body>
void run_tasks(const heed_executor& executor, int32_t num_tasks, Body&& body) {
  if (num_tasks <= 1) {
    if (num_tasks == 1) body(0);
    return;
  }
  auto trampoline = [](void* argument, int32_t index) {
    (*static_cast<std::remove_reference_t<Body>*>(argument))(index);
  };
  executor.run(executor.context, num_tasks, trampoline, &body);
}

}  // namespace heed
