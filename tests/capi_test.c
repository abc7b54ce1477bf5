/* The headers are C, and the library does what they say: a small attention against numbers worked out by hand, a plan
 * run twice, errors. Linked with the shared library, so it sees what a user sees. */
#include <heed/heed.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures = 0;

#define CHECK(condition)                                                                         \
  do {                                                                                           \
    if (!(condition)) {                                                                          \
      printf("%s:%d: %s (last error: %s)\n", __FILE__, __LINE__, #condition, heed_last_error()); \
      ++failures;                                                                                \
    }                                                                                            \
  } while (0)

static heed_tensor rows(void* data, int64_t num_rows, int64_t width) { /* [1, num_rows, 1, width] */
  heed_tensor tensor;
  memset(&tensor, 0, sizeof tensor);
  tensor.data = data;
  tensor.dtype = HEED_DTYPE_F32;
  tensor.ndim = 4;
  tensor.shape[0] = 1, tensor.shape[1] = num_rows, tensor.shape[2] = 1, tensor.shape[3] = width;
  tensor.stride[0] = num_rows * width, tensor.stride[1] = width, tensor.stride[2] = width, tensor.stride[3] = 1;
  return tensor;
}

static int near(float got, double want) { return fabs((double)got - want) <= 1e-6; }

/* Scores ln 1, ln 3 for query 0 and 0, 0 for query 1, so weights (1/4, 3/4) and (1/2, 1/2). Causal hides key 1 from
 * query 0. */
static float q[2] = {1.0f, 0.0f}, k[2] = {0.0f, 1.0986123f}, v[4] = {4.0f, -8.0f, 8.0f, 16.0f};
static float out[4], lse[2];

static void make_args(heed_attention_args* args) {
  heed_attention_args_init(args);
  args->q = rows(q, 2, 1);
  args->k = rows(k, 2, 1);
  args->v = rows(v, 2, 2);
  args->out = rows(out, 2, 2);
  args->lse = rows(lse, 2, 1);
  args->lse.ndim = 3; /* [batch, nheads_q, seqlen_q] */
  args->lse.shape[0] = 1, args->lse.shape[1] = 1, args->lse.shape[2] = 2;
  args->lse.stride[0] = 2, args->lse.stride[1] = 2, args->lse.stride[2] = 1;
  args->has_softmax_scale = 1;
  args->softmax_scale = 1.0f;
}

static void test_numbers(const char* backend) {
  heed_attention_args args;
  heed_plan_options options;
  options.struct_size = sizeof options;
  options.backend = backend;
  make_args(&args);
  CHECK(heed_attention(&args, &options) == HEED_OK);
  CHECK(near(out[0], 7.0) && near(out[1], 10.0)); /* 4/4 + 8*3/4, -8/4 + 16*3/4 */
  CHECK(near(out[2], 6.0) && near(out[3], 4.0));
  CHECK(near(lse[0], log(4.0)) && near(lse[1], log(2.0)));

  args.causal = 1;
  CHECK(heed_attention(&args, &options) == HEED_OK);
  CHECK(near(out[0], 4.0) && near(out[1], -8.0) && near(out[2], 6.0) && near(out[3], 4.0));
  CHECK(near(lse[0], 0.0) && near(lse[1], log(2.0)));

  args.k.shape[1] = args.v.shape[1] = 0; /* no keys: 0, and lse = -inf */
  args.causal = 0;
  CHECK(heed_attention(&args, &options) == HEED_OK);
  CHECK(out[0] == 0.0f && out[3] == 0.0f && isinf(lse[0]) && lse[0] < 0);
}

static void test_plan(void) {
  heed_attention_args args;
  heed_problem* problem = NULL;
  heed_plan* plan = NULL;
  char line[256];
  size_t needed = 0;
  void* workspace;
  int i;
  make_args(&args);
  CHECK(heed_attention_problem(&args, &problem) == HEED_OK);
  CHECK(strcmp(heed_problem_op(problem), "attention") == 0);
  CHECK(heed_problem_print(problem, line, sizeof line, &needed) == HEED_OK && needed == strlen(line) + 1);
  CHECK(heed_plan_create(problem, NULL, &plan) == HEED_OK);
  CHECK(strncmp(heed_plan_impl(plan), "cpu/", 4) == 0);
  workspace = aligned_alloc(64, (heed_plan_workspace_bytes(plan) / 64 + 1) * 64);
  args.workspace = workspace;
  args.workspace_bytes = heed_plan_workspace_bytes(plan);
  for (i = 0; i < 2; ++i) {
    memset(out, 0, sizeof out);
    CHECK(heed_attention_run(plan, &args) == HEED_OK);
    CHECK(near(out[0], 7.0) && near(out[3], 4.0));
  }
  free(workspace);
  heed_plan_destroy(plan);
  heed_problem_destroy(problem);
}

static void test_errors(void) {
  heed_attention_args args;
  heed_plan_options options;
  heed_problem* problem = NULL;
  options.struct_size = sizeof options;
  options.backend = "abacus";
  make_args(&args);
  CHECK(heed_attention(&args, &options) == HEED_NOT_FOUND);
  CHECK(strstr(heed_last_error(), "abacus") != NULL);
  args.k.shape[3] = 2;
  CHECK(heed_attention(&args, NULL) == HEED_INVALID_ARGUMENT);
  CHECK(strcmp(heed_last_error(), "k.shape[3] = 2: must equal q.shape[3] = 1 (head_dim)") == 0);
  CHECK(heed_problem_parse("attention sq=3 sk=3 d=8 wings=2", &problem) == HEED_INVALID_ARGUMENT);
  CHECK(strstr(heed_last_error(), "wings") != NULL);
  CHECK(problem == NULL);
  make_args(&args);
  CHECK(heed_attention(&args, NULL) == HEED_OK);
  CHECK(strcmp(heed_last_error(), "") == 0);
}

int main(void) {
  CHECK(heed_abi_version() == HEED_ABI_VERSION);
  test_numbers(NULL);
  test_numbers("ref");
  test_plan();
  test_errors();
  if (failures == 0) printf("ok\n");
  return failures == 0 ? 0 : 1;
}
