// From the C interface's argument structs to a Problem (what is asked) and Args (of what). Implemented by the files of
// the C functions; the judge (capi_check.cpp) reads the same structs.
#pragma once

#include "base/status.h"
#include "heed/attention.h"
#include "ops/attention.h"
#include "ops/kv_append.h"

namespace heed {

// struct_size handled: missing members get their defaults, an unknown tail has to be zero.
Result<heed_attention_args> read_args(const heed_attention_args* args);
Result<heed_kv_append_args> read_args(const heed_kv_append_args* args);

// The problem that a complete struct poses, validated.
Result<AttentionProblem> problem_of(const heed_attention_args& args);
Result<KvAppendProblem> problem_of(const heed_kv_append_args& args);

// Pointers and numbers; softmax_scale and the executor are resolved.
AttentionArgs args_of(const heed_attention_args& args, const AttentionProblem& problem);
KvAppendArgs args_of(const heed_kv_append_args& args, const KvAppendProblem& problem);

}  // namespace heed
