// Whether two runs have the same right answer.
#pragma once

#include <array>
#include <cstdint>

#include "ops/attention.h"

namespace heed::check {

// 128 bits of what an answer depends on: the problem, the numbers, and the contents of the inputs, device memory having been copied
// to the host. Against chance, not against an adversary.
using Fingerprint = std::array<uint64_t, 2>;
Fingerprint fingerprint(const AttentionProblem& problem, const AttentionArgs& args);

}  // namespace heed::check
