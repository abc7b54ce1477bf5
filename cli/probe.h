// What this machine can do at best, measured in the same run as what it is compared with.
#pragma once

namespace heed::cli {

// Multiply-adds of f32 in registers, two operations each, on so many threads at once.
double probe_peak_gflops(int threads);
// Reading memory that no cache holds, on so many threads at once.
double probe_read_gbs(int threads);

}  // namespace heed::cli
