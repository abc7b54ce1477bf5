/* How long a plan takes, measured the one way that docs/measuring.md describes. */
#ifndef HEED_TIMING_H
#define HEED_TIMING_H

#include "heed/attention.h"
#include "heed/core.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct heed_timing_options {
  uint64_t struct_size;
  int32_t samples;  /* 0: 15; at most 100000 */
  int32_t calls;    /* calls of one sample; 0: so many that it takes about sample_us, at most 200 */
  double sample_us; /* 0: 5000 */
  double pause_ms;  /* rest before each sample: 60 for rested figures; 0: back to back; at most 10000 */
} heed_timing_options;

typedef struct heed_timing {
  uint64_t struct_size;
  double median_us, p10_us, p90_us; /* of one run. CUDA: on the device, from replayed graphs; CPU: until it returns */
  double host_run_us;               /* until heed_attention_run (heed_kv_append_run) returns; median */
  double host_call_us;              /* until heed_attention (heed_kv_append) returns, its plan in the cache; median */
  int32_t samples, calls;           /* as they were */
} heed_timing;

/* Runs the plan over `args` again and again: outputs are written, caches appended to. CUDA: on a stream of its own, whatever
 * args->stream is; it waits for that work, and must not be called while a stream of this thread is being captured. Where
 * args have no workspace for a plan that needs one, the error is that of the run. `options` may be NULL. */
HEED_API heed_status heed_attention_time(const heed_plan* plan, const heed_attention_args* args,
                                         const heed_timing_options* options, heed_timing* timing);
HEED_API heed_status heed_kv_append_time(const heed_plan* plan, const heed_kv_append_args* args,
                                         const heed_timing_options* options, heed_timing* timing);

#ifdef __cplusplus
}
#endif
#endif /* HEED_TIMING_H */
