#include "base/fork.h"

#include <pthread.h>

namespace heed {
namespace {

// Recursive: what is made may ask for something else that is made first. A child begins anew with it, as a mutex of this
// kind knows its owner by a number that the child's thread does not have.
constexpr pthread_mutex_t kUnlocked = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
constinit pthread_mutex_t g_first_use = kUnlocked;
constinit ForkHook* g_hooks = nullptr;  // held by g_first_use

void call_all(void (*ForkHook::*which)()) {
  for (const ForkHook* hook = g_hooks; hook != nullptr; hook = hook->next)
    if (hook->*which != nullptr) (hook->*which)();
}

// When the library is loaded, and never later: pthread_atfork may wait for a fork that waits for g_first_use.
struct Registration {
  Registration() {
    pthread_atfork(
        [] {
          pthread_mutex_lock(&g_first_use);
          call_all(&ForkHook::before);
        },
        [] {
          call_all(&ForkHook::in_parent);
          pthread_mutex_unlock(&g_first_use);
        },
        [] {
          g_first_use = kUnlocked;
          call_all(&ForkHook::in_child);
        });
  }
};
const Registration g_registration;

}  // namespace

void add_fork_hook(ForkHook& hook) {
  const FirstUse lock;
  hook.next = g_hooks;
  g_hooks = &hook;
}

FirstUse::FirstUse() { pthread_mutex_lock(&g_first_use); }
FirstUse::~FirstUse() { pthread_mutex_unlock(&g_first_use); }

}  // namespace heed
