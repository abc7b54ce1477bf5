// Workspace of the one-call functions. The driver's own pool takes 2 us for a block and its release, and 50 us after every
// synchronisation, which empties it; so a small block stays with the stream it was taken for, which is all its users' order.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/status.h"

namespace heed::cuda {

struct StreamBlock {
  void* pointer = nullptr;
  int32_t slot = -1;  // where it stays; -1: it goes back to the driver
};

// Memory for work that is put into the stream from now on and before release_on_stream. Waits for nothing.
Status allocate_on_stream(int32_t device_index, size_t bytes, void* stream, StreamBlock& block);
Status release_on_stream(int32_t device_index, const StreamBlock& block, void* stream);

}  // namespace heed::cuda
