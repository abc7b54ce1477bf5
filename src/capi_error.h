// What the C functions share: the text of heed_last_error and the turning of every failure, exceptions included, into a
// status. capi.cpp owns the text.
#pragma once

#include <exception>
#include <new>
#include <string_view>
#include <utility>

#include "base/status.h"
#include "heed/core.h"

namespace heed {

// Sets this thread's error text (empty on success) and returns the code. Needs no memory.
heed_status report(StatusCode code, std::string_view message) noexcept;
inline heed_status report(const Status& status) noexcept { return report(status.code(), status.message()); }

// body() -> Status. Nothing that it throws crosses the C ABI.
template <class Body>
heed_status guarded(Body&& body) noexcept {
  try {
    return report(std::forward<Body>(body)());
  } catch (const std::bad_alloc&) {
    return report(StatusCode::kOutOfMemory, "out of memory on the host");
  } catch (const std::exception& error) {
    return report(StatusCode::kOperationFailed, error.what());
  } catch (...) {
    return report(StatusCode::kOperationFailed, "unknown exception");
  }
}

}  // namespace heed
