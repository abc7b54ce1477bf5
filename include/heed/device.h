/* Memory and queues of a device, for programs that have no CUDA runtime of their own: heed's tools and tests use
 * nothing else. The same calls serve the CPU, so that a program needs no branches.
 *
 * `device` is HEED_DEVICE_CPU or HEED_DEVICE_CUDA; `index` says which GPU, -1 the calling thread's current one, else 0;
 * of the CPU 0 or -1. On CUDA a call works in the thread's current context where that is one of the device, else in the
 * device's primary context, the one that frameworks use. Where there is no driver or no GPU, every call on CUDA is
 * initialization_failed, and the sentence says what is missing. */
#ifndef HEED_DEVICE_H
#define HEED_DEVICE_H

#include "heed/core.h"

#ifdef __cplusplus
extern "C" {
#endif

/* CPU: 1. CUDA: the GPUs that the driver shows; without any it is an error and `count` is not written. */
HEED_API heed_status heed_device_count(heed_device device, int32_t* count);
/* "NVIDIA H200"; of the CPU the model that the operating system names. */
HEED_API heed_status heed_device_name(heed_device device, int32_t index, char* buffer, size_t buffer_bytes,
                                      size_t* needed);

/* 128-byte aligned at least. 0 bytes give NULL. */
HEED_API heed_status heed_memory_allocate(heed_device device, int32_t index, size_t bytes, void** pointer);
/* Only what heed_memory_allocate gave, with the same device and index, or NULL. CUDA: waits for work that uses it. */
HEED_API heed_status heed_memory_free(heed_device device, int32_t index, void* pointer);

/* These are over when they return. On CUDA they wait for the legacy default stream and all that it synchronises with;
 * wait for a non-blocking stream first. `index`: the GPU on either side; with two sides on the CPU 0 or -1. */
HEED_API heed_status heed_memory_copy(void* to, heed_device to_device, const void* from, heed_device from_device,
                                      int32_t index, size_t bytes);
/* Every byte becomes `value`, 0 to 255. */
HEED_API heed_status heed_memory_fill(heed_device device, int32_t index, void* pointer, int32_t value, size_t bytes);

/* Waits for the work on the stream, a CUstream; NULL is the legacy default stream. CPU: NULL, and nothing to wait for.
 * An error of earlier work on the stream is reported here. */
HEED_API heed_status heed_stream_synchronize(heed_device device, int32_t index, void* stream);

#ifdef __cplusplus
}
#endif
#endif /* HEED_DEVICE_H */
