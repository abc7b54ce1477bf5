/* Inputs for a problem line, and the judge: results against the double-precision reference within docs/conventions.md's
 * error bound. The reference itself is the backend "ref": force it, with out of dtype f64 for its result unrounded. */
#ifndef HEED_CHECK_H
#define HEED_CHECK_H

#include "heed/attention.h"
#include "heed/core.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Tensors made from a problem line's plan and data fields, in the memory of its device: the same line, the same bits,
 * everywhere. Outputs are filled with NaN, memory around and between tensors' elements too. On CUDA the calls below copy
 * between host and device; wait for the run's stream before you call one. */
typedef struct heed_inputs heed_inputs;

HEED_API heed_status heed_inputs_create(const char* line, heed_inputs** inputs);
/* Arguments over those tensors, to run as they are; NULL if the line is not of that op. Backward: out and lse hold the
 * reference's forward result (above 2 GFLOP, the planner's choice's). The caller may change options and data, not the
 * tensors' sizes. */
HEED_API heed_attention_args* heed_inputs_attention(heed_inputs* inputs);
HEED_API heed_kv_append_args* heed_inputs_kv_append(heed_inputs* inputs);
HEED_API const heed_problem* heed_inputs_problem(const heed_inputs* inputs);
/* Before a run: fills the outputs with NaN again, restores the caches, takes note of the inputs. */
HEED_API heed_status heed_inputs_poison(heed_inputs* inputs);
/* A byte written outside the outputs' elements, or an input changed? invalid_argument naming the tensor and place. */
HEED_API heed_status heed_inputs_check_guards(const heed_inputs* inputs);
HEED_API void heed_inputs_destroy(heed_inputs* inputs);

/* One output against the reference. `max_bound` = 2 max|e_plain| + ulp_out(max|ref|) + 2^-20 max|visible v|, where plain is
 * the same formula with S and softmax in f32, P and the result rounded once; the Frobenius norm likewise. */
typedef struct heed_check_tensor {
  uint64_t struct_size;
  char name[16]; /* "out", "lse", "dq", ... */
  int32_t passed;
  int32_t reserved;
  int64_t num_checked; /* elements compared; above 2 GFLOP a seeded sample and every edge */
  double max_error, max_bound;
  double norm_error, norm_bound;
  int64_t worst[4]; /* (b, h, row, column) of max_error */
  double worst_got, worst_want;
  char reason[160]; /* empty if passed */
} heed_check_tensor;

#define HEED_CHECK_MAX_TENSORS 8

typedef struct heed_check_report {
  uint64_t struct_size;
  int32_t passed;
  int32_t num_tensors;
  heed_check_tensor tensors[HEED_CHECK_MAX_TENSORS];
} heed_check_report;

/* Judges the outputs that `args` holds, after a run, against the reference on its inputs. On CUDA it waits for
 * args->stream and copies the tensors to the host first; not during capture. HEED_OK with report->passed 0 is a wrong
 * result; other statuses mean that it could not be judged. */
HEED_API heed_status heed_attention_check(const heed_attention_args* args, heed_check_report* report);
/* The same of heed_inputs_attention's arguments. What the reference gives is kept in `inputs`, unless it is more than 32 Mi numbers,
 * and counts again as long as the arguments and what their tensors hold stay the same. Not two calls at a time. */
HEED_API heed_status heed_inputs_check(heed_inputs* inputs, heed_check_report* report);
/* For kv_append: `before` are the arguments with the caches as they were before the run that `after` holds. */
HEED_API heed_status heed_kv_append_check(const heed_kv_append_args* before, const heed_kv_append_args* after,
                                          heed_check_report* report);

#ifdef __cplusplus
}
#endif
#endif /* HEED_CHECK_H */
