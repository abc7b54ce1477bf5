/* Causal attention in C, one call; the plan behind it; the result checked against heed's double-precision reference. */
#include <heed/heed.h>
#include <stdio.h>
#include <stdlib.h>

enum { BATCH = 2, SEQLEN = 512, HEADS_Q = 8, HEADS_KV = 2, HEAD_DIM = 64 };

/* A contiguous [batch, seqlen, nheads, head_dim] tensor. */
static heed_tensor bshd(float* data, int64_t nheads) {
  const heed_tensor tensor = {.data = data,
                              .dtype = HEED_DTYPE_F32,
                              .ndim = 4,
                              .shape = {BATCH, SEQLEN, nheads, HEAD_DIM},
                              .stride = {SEQLEN * nheads * HEAD_DIM, nheads * HEAD_DIM, HEAD_DIM, 1}};
  return tensor;
}

static float* numbers(size_t count) {
  float* data = malloc(count * sizeof(float));
  for (size_t i = 0; data != NULL && i < count; ++i) data[i] = (float)rand() / (float)RAND_MAX - 0.5f;
  return data;
}

static int fail(const char* what) {
  fprintf(stderr, "%s: %s\n", what, heed_last_error());
  return EXIT_FAILURE;
}

int main(void) {
  const size_t size_q = (size_t)BATCH * SEQLEN * HEADS_Q * HEAD_DIM, size_kv = size_q / (HEADS_Q / HEADS_KV);
  float *q = numbers(size_q), *k = numbers(size_kv), *v = numbers(size_kv), *out = numbers(size_q);
  if (q == NULL || k == NULL || v == NULL || out == NULL) return EXIT_FAILURE;

  heed_attention_args args;
  heed_attention_args_init(&args);
  args.q = bshd(q, HEADS_Q);
  args.k = bshd(k, HEADS_KV); /* four query heads share a key head */
  args.v = bshd(v, HEADS_KV);
  args.out = bshd(out, HEADS_Q);
  args.causal = 1;
  if (heed_attention(&args, NULL) != HEED_OK) return fail("attention");

  heed_problem* problem = NULL;
  heed_plan* plan = NULL;
  char line[256];
  if (heed_attention_problem(&args, &problem) != HEED_OK) return fail("problem");
  if (heed_problem_print(problem, line, sizeof line, NULL) != HEED_OK) return fail("print");
  if (heed_plan_create(problem, NULL, &plan) != HEED_OK) return fail("plan");
  printf("%s\nis done by %s\n", line, heed_plan_impl(plan));

  heed_check_report report = {.struct_size = sizeof report};
  if (heed_attention_check(&args, &report) != HEED_OK) return fail("check");
  printf("largest error %.3g, allowed %.3g\n", report.tensors[0].max_error, report.tensors[0].max_bound);

  heed_plan_destroy(plan);
  heed_problem_destroy(problem);
  free(q), free(k), free(v), free(out);
  return report.passed ? EXIT_SUCCESS : EXIT_FAILURE;
}
