// Memory of a device, and copies that are over when they return. What a run itself does goes by its stream instead.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/status.h"

namespace heed::cuda {

// At least 256-byte aligned; nothing (null) for 0 bytes.
Status allocate(int32_t device_index, size_t bytes, void*& pointer);
// Waits until the device no longer uses it. Null is fine.
Status release(int32_t device_index, void* pointer);

// These wait for the legacy default stream and every stream that it synchronises with, then for themselves. Work on a
// stream made without that (CU_STREAM_NON_BLOCKING) has to be waited for first.
Status copy_to_device(int32_t device_index, void* to, const void* from, size_t bytes);
Status copy_to_host(int32_t device_index, void* to, const void* from, size_t bytes);
Status copy_on_device(int32_t device_index, void* to, const void* from, size_t bytes);
Status fill(int32_t device_index, void* pointer, uint8_t value, size_t bytes);

Status synchronize(int32_t device_index, void* stream);

// operation_failed where work on the stream is being captured into a graph; `call` is what must not happen then.
Status refuse_capture(int32_t device_index, void* stream, const char* call);

}  // namespace heed::cuda
