/* Attention, forward and backward, and the key/value cache append. docs/conventions.md says what results are. */
#ifndef HEED_ATTENTION_H
#define HEED_ATTENTION_H

#include "heed/core.h"

#ifdef __cplusplus
extern "C" {
#endif

/* out_i = sum_j softmax_j(s_ij) v_j, s_ij = softmax_scale * dot(q_i, k_j), then softcap, + bias - alibi, masks, sink.
 * Query i stands at position p = i + offset on the key axis. */

enum { HEED_LAYOUT_BSHD = 0, HEED_LAYOUT_BHSD = 1, HEED_LAYOUT_THD = 2 };
enum { HEED_PASS_FORWARD = 0, HEED_PASS_BACKWARD = 1 };
enum {
  HEED_OFFSET_BOTTOM_RIGHT = 0, /* seqlen_k - seqlen_q, per sequence: the default */
  HEED_OFFSET_TOP_LEFT = 1,     /* 0 */
  HEED_OFFSET_GIVEN = 2         /* q_offset */
};
/* Bits of `status`, one int32 per sequence: what was wrong with data that the host does not read. */
enum {
  HEED_STATUS_BAD_LENGTH_Q = 1,
  HEED_STATUS_BAD_LENGTH_K = 2,
  HEED_STATUS_BAD_PAGE = 4,
  HEED_STATUS_APPEND_PAST_CAPACITY = 8
};

typedef struct heed_attention_args {
  uint64_t struct_size;

  int32_t pass;      /* HEED_PASS_* */
  int32_t layout_q;  /* of q, out, dout, dq */
  int32_t layout_kv; /* of k, v, dk, dv; with pages, of one page: bshd or bhsd */
  heed_device device;

  /* Inputs, in the memory of `device`. dtype f32, f16 or bf16, the same for q, k, v; head_dim and head_dim_v from 1 to
   * 512. */
  heed_tensor q;    /* bshd [batch, seqlen_q, nheads_q, head_dim]; thd [total_q, nheads_q, head_dim] */
  heed_tensor k;    /* bshd [batch, seqlen_k, nheads_kv, head_dim]; pages [num_pages, page_size, nheads_kv, head_dim] */
  heed_tensor v;    /* like k with head_dim_v */
  heed_tensor bias; /* [batch|1, nheads_q|1, seqlen_q|1, seqlen_k|1], f32 or q's dtype; additive */
  heed_tensor mask; /* same shape, bool; true: may attend */
  heed_tensor alibi_slopes;    /* f32 [nheads_q] or [batch, nheads_q] */
  heed_tensor sinks;           /* f32 [nheads_q] */
  heed_tensor cu_seqlens_q;    /* i32 [batch + 1]; with layout_q thd */
  heed_tensor cu_seqlens_k;    /* i32 [batch + 1]; with layout_kv thd */
  heed_tensor seqused_q;       /* i32 [batch] */
  heed_tensor seqused_k;       /* i32 [batch] */
  heed_tensor leftpad_k;       /* i32 [batch]: keys to skip at the start of each sequence */
  heed_tensor page_table;      /* i32 [batch or cache rows, max_pages] */
  heed_tensor cache_batch_idx; /* i32 [batch]: the row of k, v (or of page_table) that a sequence reads */

  /* Outputs of the forward pass, inputs of the backward pass. */
  heed_tensor out; /* like q with head_dim_v; q's dtype or f32 */
  heed_tensor lse; /* f32 [batch, nheads_q, seqlen_q]; thd [nheads_q, total_q]; natural log; optional forward */

  /* Backward: inputs dout, dlse (optional); outputs, each optional but at least one. */
  heed_tensor dout;          /* like out */
  heed_tensor dlse;          /* like lse */
  heed_tensor dq, dk, dv;    /* like q, k, v */
  heed_tensor dbias;         /* bias's shape and dtype; broadcast dimensions are summed */
  heed_tensor dsinks;        /* f32 [nheads_q]; with out of dtype f64 every output is f64 */
  heed_tensor dalibi_slopes; /* f32, alibi_slopes's shape */

  heed_tensor status; /* i32 [batch], HEED_STATUS_* bits; optional output */

  int32_t has_softmax_scale; /* 0: 1/sqrt(head_dim) */
  float softmax_scale;       /* any finite value */
  float softcap;             /* 0: off; > 0: s = softcap * tanh(s / softcap) */
  float dropout_p;           /* 0 <= p <= 1 */
  int32_t causal;            /* key j visible iff j <= p */
  int32_t offset_kind;       /* HEED_OFFSET_* */
  int64_t q_offset;          /* with HEED_OFFSET_GIVEN */
  int64_t window_left;       /* inclusive, -1: unbounded */
  int64_t window_right;
  int64_t chunk;        /* 0: off; floor(p / chunk) == floor(j / chunk) */
  int64_t max_seqlen_q; /* thd: a hint, 0: unknown; never changes results */
  int64_t max_seqlen_k;
  int64_t num_splits; /* 0: choose; N: every sequence's keys in N chunks */
  int32_t deterministic;
  int32_t batch_invariant;

  uint64_t dropout_seed;
  uint64_t dropout_offset;
  const uint64_t* dropout_seed_ptr; /* not NULL: read where the kernel runs, instead of dropout_seed */
  const uint64_t* dropout_offset_ptr;
  int64_t index_base[4]; /* added to b, h, i, j in the dropout mask */

  /* How to run it. */
  void* workspace; /* heed_plan_workspace_bytes, 64-byte aligned; one per concurrent run */
  size_t workspace_bytes;
  const heed_allocator* allocator; /* one-call form without a workspace */
  const heed_executor* executor;   /* NULL: heed_executor_pool() */
  void* stream;                    /* CUDA: a CUstream, NULL is the legacy default stream. CPU: NULL */
  int32_t num_threads;             /* CPU: at most so many, 0: all of the executor's. CUDA: 0 */
  int32_t device_index; /* CUDA: which device; -1: the current one of the calling thread, else 0. CPU: 0 or -1 */
} heed_attention_args;

/* Zeroes, struct_size, windows and device_index -1. */
HEED_API void heed_attention_args_init(heed_attention_args* args);

/* The problem these arguments pose. Data pointers count for alignment only; NULL counts as 128-byte aligned. */
HEED_API heed_status heed_attention_problem(const heed_attention_args* args, heed_problem** problem);

/* Runs a plan made from the problem of these arguments. Allocates, synchronises and compiles nothing. */
HEED_API heed_status heed_attention_run(const heed_plan* plan, const heed_attention_args* args);

/* One call: problem, cached plan, workspace, run. `options` may be NULL. */
HEED_API heed_status heed_attention(const heed_attention_args* args, const heed_plan_options* options);

/* Reads the lengths, offsets and page table that run never looks at, and says what is wrong with them. On CUDA it waits
 * for args->stream and copies them to the host: not during capture. */
HEED_API heed_status heed_attention_validate(const heed_attention_args* args);

/* ---- kv_append: new keys and values into a cache, with rotary embedding ------------------------------------------ */

enum { HEED_ROTARY_HALF = 0, HEED_ROTARY_INTERLEAVED = 1 }; /* NeoX; GPT-J */

typedef struct heed_kv_append_args {
  uint64_t struct_size;
  int32_t layout_new;   /* of k_new, v_new, q, q_out */
  int32_t layout_cache; /* bshd or bhsd; with pages, of one page */
  heed_device device;
  int32_t rotary_style; /* HEED_ROTARY_* */

  heed_tensor k_new;   /* bshd [batch, seqlen_new, nheads_kv, head_dim]; thd [total_new, ...]; optional */
  heed_tensor v_new;   /* like k_new with head_dim_v; present iff k_new is */
  heed_tensor k_cache; /* bshd [cache rows, seqlen_k, nheads_kv, head_dim]; pages [num_pages, page_size, ...] */
  heed_tensor v_cache;
  heed_tensor q;          /* bshd [batch, seqlen_q, nheads_q, head_dim]; optional: turned into q_out */
  heed_tensor q_out;      /* like q; may be q itself */
  heed_tensor rotary_cos; /* [n, rotary_dim/2], f32 or the cache's dtype; optional */
  heed_tensor rotary_sin;
  heed_tensor cu_seqlens_new;  /* i32 [batch + 1]; k_new with layout thd */
  heed_tensor cu_seqlens_q;    /* i32 [batch + 1]; q with layout thd */
  heed_tensor cache_seqlens;   /* i32 [batch]: keys in the cache before this call, left padding included */
  heed_tensor rotary_seqlens;  /* i32 [batch]: position of the first new key, instead of cache_seqlens (- leftpad) */
  heed_tensor leftpad_k;       /* i32 [batch] */
  heed_tensor page_table;      /* i32 [rows, max_pages] */
  heed_tensor cache_batch_idx; /* i32 [batch] */
  heed_tensor status;          /* i32 [batch]; optional output */

  int32_t q_positions; /* 0: every query at the first new position; 1: query i at that + i (causal, windows) */
  int32_t num_threads;
  const heed_executor* executor;
  void* stream;

  void* workspace; /* as in heed_attention_args */
  size_t workspace_bytes;
  const heed_allocator* allocator;
  int32_t device_index; /* CUDA: which device; -1: the current one of the calling thread, else 0. CPU: 0 or -1 */
  int32_t reserved;
} heed_kv_append_args;

HEED_API void heed_kv_append_args_init(heed_kv_append_args* args);
HEED_API heed_status heed_kv_append_problem(const heed_kv_append_args* args, heed_problem** problem);
HEED_API heed_status heed_kv_append_run(const heed_plan* plan, const heed_kv_append_args* args);
HEED_API heed_status heed_kv_append(const heed_kv_append_args* args, const heed_plan_options* options);
HEED_API heed_status heed_kv_append_validate(const heed_kv_append_args* args);

#ifdef __cplusplus
}
#endif
#endif /* HEED_ATTENTION_H */
