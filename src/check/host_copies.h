// Copies in host memory of what arguments on a GPU point at: what the judge and the checks of lengths and page tables
// read.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "base/status.h"
#include "heed/attention.h"

namespace heed::check {

class HostCopies {
 public:
  // The arguments, as they are for the CPU; on CUDA with every tensor in host memory, at the same address modulo 128
  // and with the same strides, after the work on args.stream is over. `call` is named where that is being captured.
  Status all(heed_attention_args& args, int32_t device_index, const char* call);
  Status all(heed_kv_append_args& args, int32_t device_index, const char* call);
  // Only what says how long sequences are and where they lie; the other tensors stay where they are.
  Status indices(heed_attention_args& args, int32_t device_index, const char* call);
  Status indices(heed_kv_append_args& args, int32_t device_index, const char* call);

 private:
  template <class Args>
  Status copy(Args& args, int32_t device_index, const char* call, bool indices_only);
  Status copy_tensor(heed_tensor& tensor, const char* name);
  Status copy_bytes(const void*& pointer, size_t bytes, const char* name);

  int32_t device_index_ = 0;
  std::deque<std::vector<unsigned char>> memory_;
};

}  // namespace heed::check
