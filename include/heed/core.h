/* heed: exact attention for C, C++ and Python. This header: status codes, tensors, problems, plans, configuration.
 *
 * Conventions, once for every function:
 *  - Everything that can fail returns a heed_status; 0 is success. On failure heed_last_error() holds a sentence that
 *    names the argument, its value and what is allowed, for this thread and until its next call into heed.
 *  - On an error no output is written. Nothing here prints, aborts or throws.
 *  - Structs other than heed_tensor start with `struct_size`; set it to sizeof the struct (the *_init functions do).
 *    They grow at the end: a library that meets a longer struct accepts it while the unknown tail is zero.
 *  - Text comes back through a caller's buffer: `needed` (may be NULL) receives the size with the final NUL; a buffer
 *    that is too small gets as much as fits, always terminated. Pass buffer NULL, bytes 0 to ask for the size.
 *  - Strides are in elements, times in microseconds, sizes in bytes. Every function may be called from any thread.
 */
#ifndef HEED_CORE_H
#define HEED_CORE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define HEED_API __declspec(dllexport)
#else
#define HEED_API __attribute__((visibility("default")))
#endif

#define HEED_ABI_VERSION 1

/* ---- status ---------------------------------------------------------------------------------------------------- */

typedef int32_t heed_status;
enum {
  HEED_OK = 0,
  HEED_INVALID_ARGUMENT = 1, /* the message names the argument, its value and what is allowed */
  HEED_NOT_SUPPORTED = 2,    /* the message names what is not, by which backend, and the nearest that is */
  HEED_NOT_FOUND = 3,        /* no such backend, file or variable */
  HEED_OUT_OF_MEMORY = 4,
  HEED_INITIALIZATION_FAILED = 5,
  HEED_OPERATION_FAILED = 6
};

HEED_API int32_t heed_abi_version(void);
HEED_API const char* heed_version(void);                   /* "0.1.0" */
HEED_API const char* heed_status_name(heed_status status); /* "invalid_argument" */
HEED_API const char* heed_last_error(void);                /* "" after a success */

/* ---- tensors --------------------------------------------------------------------------------------------------- */

typedef int32_t heed_dtype;
enum {
  HEED_DTYPE_NONE = 0, /* the tensor is absent */
  HEED_DTYPE_F32 = 1,
  HEED_DTYPE_F16 = 2,
  HEED_DTYPE_BF16 = 3,
  HEED_DTYPE_F64 = 4, /* the reference only */
  HEED_DTYPE_I32 = 5,
  HEED_DTYPE_BOOL = 6 /* one byte, 0 or not 0 */
};

HEED_API const char* heed_dtype_name(heed_dtype dtype); /* "bf16" */
HEED_API size_t heed_dtype_bytes(heed_dtype dtype);

typedef int32_t heed_device;
enum { HEED_DEVICE_CPU = 0, HEED_DEVICE_CUDA = 1 };

#define HEED_MAX_DIMS 4

/* A view of memory that the caller owns. Frozen: this struct never changes. */
typedef struct heed_tensor {
  void* data;
  heed_dtype dtype; /* HEED_DTYPE_NONE: absent */
  int32_t ndim;
  int64_t shape[HEED_MAX_DIMS];
  int64_t stride[HEED_MAX_DIMS]; /* elements; 0 broadcasts (inputs only) */
} heed_tensor;

/* ---- configuration, log, machine ------------------------------------------------------------------------------- */

/* One HEED_* environment variable. Read once, at the first call that needs it. */
typedef struct heed_config_entry {
  uint64_t struct_size;
  const char* name;  /* "HEED_THREADS" */
  const char* value; /* in force now */
  const char* default_value;
  const char* help;
  int32_t is_set; /* 1 if the environment gave it */
  int32_t reserved;
} heed_config_entry;

HEED_API int32_t heed_config_count(void);
HEED_API heed_status heed_config_get(int32_t index, heed_config_entry* entry);

enum { HEED_LOG_ERROR = 0, HEED_LOG_WARNING = 1, HEED_LOG_INFO = 2, HEED_LOG_DEBUG = 3 };
typedef void (*heed_log_fn)(void* context, int32_t level, const char* message);
/* Set once, before other calls; called from any thread; NULL turns the log off (the default). The level is the
 * callback's own or HEED_LOG, whichever says more. */
HEED_API heed_status heed_set_log(heed_log_fn callback, void* context, int32_t level);

/* The folder of NVRTC, the compiler of GPU kernels, as a package manager has laid it (a Python wheel: nvidia/cu13/lib).
 * Searched after HEED_NVRTC and a libnvrtc that the process has loaded, before CUDA_HOME and the system's own. Call it
 * before the first use of a GPU; NULL or "" forgets the folder. HEED_NOT_FOUND: there is no libnvrtc in it. */
HEED_API heed_status heed_set_nvrtc_folder(const char* folder);

/* The machine, its backends and why any is missing, as text for people. */
HEED_API heed_status heed_info(char* buffer, size_t buffer_bytes, size_t* needed);

/* ---- threads and memory ---------------------------------------------------------------------------------------- */

/* Where CPU work runs. `run` calls task(argument, i) for every i in [0, num_tasks), on any threads, in any order, even
 * one after another, and returns when all are done. Results never depend on it. */
typedef struct heed_executor {
  uint64_t struct_size;
  void* context;
  int32_t num_threads; /* how many tasks can run at once, the caller's thread included; >= 1 */
  int32_t reserved;
  void (*run)(void* context, int32_t num_tasks, void (*task)(void* argument, int32_t index), void* argument);
} heed_executor;

HEED_API const heed_executor* heed_executor_pool(void);   /* heed's own threads: HEED_THREADS of them; the default */
HEED_API const heed_executor* heed_executor_serial(void); /* the caller's thread alone */

/* Workspace for the one-call functions. NULL functions mean aligned malloc on the CPU and, on CUDA, cuMemAllocAsync and
 * cuMemFreeAsync on the call's stream. */
typedef struct heed_allocator {
  uint64_t struct_size;
  void* context;
  void* (*allocate)(void* context, size_t bytes, size_t alignment, void* stream); /* NULL on failure */
  void (*deallocate)(void* context, void* pointer, size_t bytes, void* stream);
} heed_allocator;

/* ---- problems and plans ---------------------------------------------------------------------------------------- */

/* What is asked, without pointers. Immutable. `attention b=4 hq=32 hkv=8 sq=4096 sk=4096 d=128 bf16 causal` */
typedef struct heed_problem heed_problem;

/* Reads a problem line (docs/conventions.md has the grammar). Data fields (scale=, lq=, ...) are checked and dropped
 * here; heed_inputs_create uses them. */
HEED_API heed_status heed_problem_parse(const char* line, heed_problem** problem);
HEED_API heed_status heed_problem_print(const heed_problem* problem, char* buffer, size_t buffer_bytes, size_t* needed);
HEED_API const char* heed_problem_op(const heed_problem* problem); /* "attention" or "kv_append" */
HEED_API double heed_problem_flops(const heed_problem* problem);   /* as the field counts them */
HEED_API double heed_problem_bytes(const heed_problem* problem);   /* inputs read + outputs written once */
HEED_API void heed_problem_destroy(heed_problem* problem);

typedef struct heed_plan_options {
  uint64_t struct_size;
  const char* backend; /* NULL: choose. "cpu", "ref", or a full name: that one or an error */
} heed_plan_options;

/* How a problem will be done: an ordered list of steps. Immutable, owns no mutable memory: any number of threads may run
 * one plan at once, each with its own workspace. */
typedef struct heed_plan heed_plan;

HEED_API heed_status heed_plan_create(const heed_problem* problem, const heed_plan_options* options, heed_plan** plan);
HEED_API void heed_plan_destroy(heed_plan* plan);
HEED_API size_t heed_plan_workspace_bytes(const heed_plan* plan);
HEED_API const char* heed_plan_impl(const heed_plan* plan); /* "cpu/attention_fwd_avx512" */
HEED_API heed_status heed_plan_print(const heed_plan* plan, char* buffer, size_t buffer_bytes, size_t* needed);

/* One row of the registry and what it says of a problem. Strings live as long as the process, `reason` until this
 * thread's next call. */
typedef struct heed_verdict {
  uint64_t struct_size;
  const char* impl;
  int32_t accepted;
  int32_t chosen;
  const char* reason; /* why not; or, where accepted, a remark, often empty */
  double cost_us;     /* the planner's estimate; negative where declined */
} heed_verdict;

HEED_API int32_t heed_verdict_count(const heed_problem* problem);
HEED_API heed_status heed_verdict_get(const heed_problem* problem, const heed_plan_options* options, int32_t index,
                                      heed_verdict* verdict);
/* All of it as text: the problem, its flops and bytes, each verdict, the choice and its steps. */
HEED_API heed_status heed_explain(const heed_problem* problem, const heed_plan_options* options, char* buffer,
                                  size_t buffer_bytes, size_t* needed);

/* The plan cache behind the one-call functions. */
typedef struct heed_plan_cache_stats {
  uint64_t struct_size;
  int64_t hits, misses, entries, capacity;
} heed_plan_cache_stats;
HEED_API heed_status heed_plan_cache_get(heed_plan_cache_stats* stats);
HEED_API void heed_plan_cache_clear(void);

/* ---- GPU kernels ahead of time --------------------------------------------------------------------------------- */

typedef struct heed_warm_options {
  uint64_t struct_size;
  const char* arch;              /* "sm_90a": for the usual GPU of that architecture; none needs to be here. NULL: for
                                     the GPU that each problem names */
  const heed_executor* executor; /* compiles on these threads; NULL: heed's pool */
  /* NULL, or called before the first kernel ("") and after each, from any thread, one call at a time. */
  void (*progress)(void* progress_context, int32_t done, int32_t total, const char* kernel);
  void* progress_context;
} heed_warm_options;

typedef struct heed_warm_result {
  uint64_t struct_size;
  int32_t num_kernels;    /* that the problems launch, each counted once */
  int32_t num_compiled;   /* of them, by this process; the others were in the kernel cache */
  double compile_seconds; /* summed over kernels, whatever ran at the same time */
} heed_warm_result;

/* Compiles the kernels that these problems launch on a GPU and keeps them in the cache on disk, so that no later process
 * compiles them. Needs NVRTC, and neither GPU nor driver where `arch` is given. All are tried; the first error is
 * returned then, not_supported for a problem that no kernel does. `options` and `result` may be NULL. */
HEED_API heed_status heed_warm(const heed_problem* const* problems, int32_t num_problems,
                               const heed_warm_options* options, heed_warm_result* result);

#ifdef __cplusplus
}
#endif
#endif /* HEED_CORE_H */
