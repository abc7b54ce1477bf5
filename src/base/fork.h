// What a forked child finds of the library. A child has the forking thread alone: whatever another thread was making for the
// first time stays half made, and a lock that it held stays locked. So fork() waits until nobody is making anything.
#pragma once

#include <atomic>

namespace heed {

// Called around fork(), each in turn, while nothing is being made: `before` and, after it, one of the other two. Null: nothing.
struct ForkHook {
  void (*before)() = nullptr;
  void (*in_parent)() = nullptr;
  void (*in_child)() = nullptr;
  ForkHook* next = nullptr;
};
// From inside make() of made_once. The hook must live as long as the library.
void add_fork_hook(ForkHook& hook);

// Held while something is made for the first time; a thread may take it again.
class FirstUse {
 public:
  FirstUse();
  ~FirstUse();
  FirstUse(const FirstUse&) = delete;
  FirstUse& operator=(const FirstUse&) = delete;
};

// make() returns a reference to its own static variable. `ready` is a constant-initialised static of the caller's.
template <class Make>
decltype(auto) made_once(std::atomic<bool>& ready, Make&& make) {
  if (ready.load(std::memory_order_acquire)) return make();
  const FirstUse lock;
  decltype(auto) made = make();
  ready.store(true, std::memory_order_release);
  return made;
}

}  // namespace heed
