// What the C functions share: the text of heed_last_error and the turning of every failure, exceptions included, into a
// status. capi.cpp owns the text.
#pragma once

#include <new>
#include <string>
#include <utility>

#include "base/status.h"
#include "heed/core.h"

namespace heed {

// Sets this thread's error text (empty on success) and returns the code.
heed_status report(const Status& status) noexcept;

// body() -> Status. Nothing that it throws crosses the C ABI.
template <class Body>
heed_status guarded(Body&& body) noexcept {
  try {
    return report(std::forward<Body>(body)());
  } catch (const std::bad_alloc&) {
    return report(Status(StatusCode::kOutOfMemory, {}));  // report supplies a text that needs no memory
  } catch (const std::exception& error) {
    return report(operation_failed(error.what()));
  } catch (...) {
    return report(Status(StatusCode::kOperationFailed, {}));
  }
}

}  // namespace heed
