// The registry: one ordered array per op. Order breaks ties of cost; the reference is last.
#pragma once

#include <span>

#include "plan/impl.h"

namespace heed {

template <class Problem>
std::span<const Impl<Problem>* const> impls();
template <>
std::span<const Impl<AttentionProblem>* const> impls<AttentionProblem>();
template <>
std::span<const Impl<KvAppendProblem>* const> impls<KvAppendProblem>();

}  // namespace heed
