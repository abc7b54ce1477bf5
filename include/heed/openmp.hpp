// heed's CPU work on OpenMP's threads: for programs whose own loops run there, so that one set of threads serves both.
// It is compiled into your program, with -fopenmp; libheed itself links no OpenMP.
#ifndef HEED_OPENMP_HPP
#define HEED_OPENMP_HPP

#if !defined(_OPENMP)
#error "heed/openmp.hpp needs OpenMP: compile with -fopenmp"
#endif

#include <omp.h>

#include <cstdint>

#include "heed/core.h"

namespace heed {

inline void run_on_openmp(void* /*context*/, int32_t num_tasks, void (*task)(void* argument, int32_t index),
                          void* argument) {
#pragma omp parallel for schedule(dynamic, 1)
  for (int32_t i = 0; i < num_tasks; ++i) task(argument, i);
}

// args.executor = heed::openmp_executor(). From inside a parallel region the tasks run on the calling thread, as nested
// regions do by default.
inline const heed_executor* openmp_executor() {
  static const heed_executor executor = {sizeof(heed_executor), nullptr, omp_get_max_threads(), 0, &run_on_openmp};
  return &executor;
}

}  // namespace heed
#endif  // HEED_OPENMP_HPP
