// A CUDA driver that is none: device memory is host memory at other addresses, which the host cannot touch; streams do
// their work at once; kernels do not run. With it, what heed does around kernels is tested without a GPU.
#pragma once

#include <cstdint>

extern "C" {

// The next `times` calls of this driver function ("cuMemAlloc_v2") fail with the code.
void fake_cuda_fail(const char* function, int32_t code, int32_t times);
// Work on the stream is being captured from now on, or no longer.
void fake_cuda_capture(void* stream, int32_t on);
// Allocations that were not freed, of cuMemAlloc and cuMemAllocAsync together.
int64_t fake_cuda_live_allocations();
// How often a driver function was called.
int64_t fake_cuda_calls(const char* function);
// Counts a call of this driver function: the code with which it has to fail, or 0.
int32_t fake_cuda_enter(const char* function);
// Work of so many microseconds on the stream, or in the graph that it is being captured into.
void fake_cuda_work(void* stream, double us);
// Streams, events and graphs that were not destroyed.
int64_t fake_cuda_live_objects();
// Whether code loads and kernels may be launched; at first they may not.
void fake_cuda_accept_kernels(int32_t on);
int64_t fake_cuda_launches();
int64_t fake_cuda_encoded_maps();
// The first 8 bytes of the last launch's parameters.
uint64_t fake_cuda_first_parameter();
// The stream of the last cuMemAllocAsync or cuMemFreeAsync.
void* fake_cuda_last_stream();
}
