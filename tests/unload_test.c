/* The library is loaded, computes on its threads and is unloaded, three times: it leaves no thread or handler behind. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <heed/heed.h>

static float memory[4][4096];

static heed_tensor tensor(float* data) { /* [2, 32, 4, 16] */
  heed_tensor t;
  memset(&t, 0, sizeof t);
  t.data = data;
  t.dtype = HEED_DTYPE_F32;
  t.ndim = 4;
  t.shape[0] = 2, t.shape[1] = 32, t.shape[2] = 4, t.shape[3] = 16;
  t.stride[0] = 2048, t.stride[1] = 64, t.stride[2] = 16, t.stride[3] = 1;
  return t;
}

static int num_threads(void) {
  char line[256];
  int count = -1;
  FILE* status = fopen("/proc/self/status", "r");
  if (status == NULL) return 1; /* not Linux: nothing to compare */
  while (fgets(line, sizeof line, status) != NULL) {
    if (sscanf(line, "Threads: %d", &count) == 1) break;
  }
  fclose(status);
#if defined(__SANITIZE_THREAD__)
  --count; /* the sanitizer's own */
#endif
  return count;
}

static void nothing(void* argument, int32_t index) { (void)argument, (void)index; }

int main(int argc, char** argv) {
  int round, status = 0;
  pid_t child;
  if (argc < 2) return 2;
  setenv("HEED_THREADS", "3", 1);
  for (round = 0; round < 3; ++round) {
    void (*init)(heed_attention_args*);
    heed_status (*attention)(const heed_attention_args*, const heed_plan_options*);
    const heed_executor* (*pool)(void);
    heed_attention_args args;
    void* const library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) return printf("%s\n", dlerror()), 1;
    *(void**)&init = dlsym(library, "heed_attention_args_init");
    *(void**)&attention = dlsym(library, "heed_attention");
    *(void**)&pool = dlsym(library, "heed_executor_pool");
    init(&args);
    args.q = tensor(memory[0]), args.k = tensor(memory[1]), args.v = tensor(memory[2]), args.out = tensor(memory[3]);
    if (attention(&args, NULL) != HEED_OK) return printf("round %d: attention failed\n", round), 1;
    pool()->run(pool()->context, 8, nothing, NULL); /* whatever the plan did, now there are workers */
    if (num_threads() != 3) return printf("round %d: %d threads while loaded\n", round, num_threads()), 1;
    if (dlclose(library) != 0) return printf("%s\n", dlerror()), 1;
    if (num_threads() != 1) return printf("round %d: %d threads after dlclose\n", round, num_threads()), 1;
  }
  child = fork(); /* a fork handler left behind would be called at an address that is gone */
  if (child == 0) _exit(0);
  if (waitpid(child, &status, 0) != child || !WIFEXITED(status)) return printf("fork after dlclose\n"), 1;
  printf("ok\n");
  return 0;
}
