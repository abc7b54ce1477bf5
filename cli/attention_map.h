// The attention map of one head, for people to look at: the probabilities P[i, j] that query i gives key j.
#pragma once

#include "heed/heed.h"
#include "tensor_file.h"

namespace heed::cli {

// f32 [queries, keys] of one sequence and query head. Every option that acts on scores is in it; dropout is not.
Tensor attention_map(const heed_attention_args& arguments, int64_t batch, int64_t head);

}  // namespace heed::cli
