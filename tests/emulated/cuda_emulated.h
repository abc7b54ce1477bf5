// CUDA threads on the host, for kernels that a machine without their GPU shall run: every thread of a block is a fiber, all
// of them in one host thread. Warps go ahead at random, bulk copies are done late and in any order, and accumulators hold
// NaN until the product is waited for: what lacks a barrier or a wait fails for some seed. What the memory model leaves
// open between a GPU's own units (proxies, fences) is not emulated.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "base/dtype.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __shared__
#define __align__(bytes)
#define __launch_bounds__(...)

namespace emulated {

struct Index {
  unsigned x = 0;
};

// Products committed together: what is left to multiply, and what the accumulators, which hold NaN meanwhile, will hold.
struct Products {
  std::vector<std::function<void()>> left;
  std::map<float*, std::vector<float>> sums;

  void multiply() {
    for (const std::function<void()>& one : left) one();
    left.clear();
  }
};

struct Fiber {
  ucontext_t context = {};
  std::unique_ptr<char[]> stack;
  unsigned thread = 0;
  bool done = false;
  const char* waits_for = "";
  uint64_t collectives = 0;                      // of the warp, so far
  std::unique_ptr<Products> open;                // not yet committed
  std::deque<std::unique_ptr<Products>> groups;  // committed, not waited for
  int stores_left = 0;                           // bulk stores that have not read shared memory
};

struct Warp {
  uint64_t value[2][32][4];  // by turns, so that a fast lane cannot overwrite what a slow one has not read
  uint64_t arrived[2] = {0, 0};
};
struct Mbarrier {
  int expected = 0, pending = 0;
  int64_t bytes = 0;
  uint64_t completed = 0;
};
struct NamedBarrier {
  int arrived = 0;
  uint64_t generation = 0;
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::map<uint32_t, Mbarrier> mbarriers;
  NamedBarrier named[16];
  std::vector<std::function<void()>> copies;  // not yet done
  std::deque<std::function<void()>> lazy;     // nor to be done before somebody must wait for them
  ucontext_t scheduler = {};
  Fiber* current = nullptr;
  std::function<void()> body;
  std::mt19937 random{1};
  uint64_t progress = 0;
  std::string failure;
};

inline Block* block = nullptr;
inline Index thread_index, block_index, grid_size, block_size;
alignas(1024) inline unsigned char shared[228 << 10];

inline void yield(const char* waits_for) {
  Fiber* const self = block->current;
  self->waits_for = waits_for;
  swapcontext(&self->context, &block->scheduler);
  thread_index.x = self->thread;
}
template <class Condition>
void wait_until(const char* what, const Condition& condition) {
  while (!condition()) yield(what);
  ++block->progress;
}
// Lets others go ahead, now and then, where an instruction is one that they may wait for.
inline void dawdle() {
  for (; block->random() % 2 == 0; ++block->progress) yield("its turn");
}
inline void fail(const std::string& why) {
  if (block->failure.empty()) block->failure = why;
  yield("failed");
}

inline void run_fiber() {
  thread_index.x = block->current->thread;
  block->body();
  block->current->done = true;
  ++block->progress;
  swapcontext(&block->current->context, &block->scheduler);
}

// One turn of every warp that is not left out, and some of the copies.
inline void run_turn(Block& b, std::vector<unsigned>& order) {
  std::shuffle(order.begin(), order.end(), b.random);
  for (const unsigned warp : order) {
    if (b.random() % 4 == 0) continue;
    for (unsigned t = warp * 32; t < warp * 32 + 32 && b.failure.empty(); ++t) {
      if (b.fibers[t]->done) continue;
      b.current = b.fibers[t].get();
      thread_index.x = t;
      swapcontext(&b.scheduler, &b.current->context);
    }
  }
  while (!b.copies.empty() && b.random() % 3 == 0) {  // in any order
    const size_t n = b.random() % b.copies.size();
    const std::function<void()> copy = std::move(b.copies[n]);
    b.copies.erase(b.copies.begin() + static_cast<std::ptrdiff_t>(n));
    copy();
    ++b.progress;
  }
}

// Apart, as getcontext is a function that may return twice.
[[gnu::noinline]] inline void start(Fiber& f, unsigned thread) {
  constexpr size_t kStackBytes = 512 << 10;
  f.thread = thread;
  f.stack.reset(new char[kStackBytes]);
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.get();
  f.context.uc_stack.ss_size = kStackBytes;
  makecontext(&f.context, run_fiber, 0);
}

inline void add_copy(std::function<void()> copy) {
  if (block->random() % 3 == 0)
    block->lazy.push_back(std::move(copy));
  else
    block->copies.push_back(std::move(copy));
}

// Runs one block: "", or what went wrong, a deadlock included.
inline std::string run_block(unsigned threads, unsigned index, unsigned grid, unsigned seed,
                             std::function<void()> body) {
  constexpr int kTurnsOfPatience = 2000;
  Block b;
  block = &b;
  b.random.seed(seed);
  b.body = std::move(body);
  b.warps.resize(threads / 32);
  block_index.x = index, grid_size.x = grid, block_size.x = threads;
  std::mt19937 garbage(seed);  // whatever lay there before
  for (size_t at = 0; at < sizeof shared; at += 4) {
    const auto word = static_cast<uint32_t>(garbage());
    std::memcpy(shared + at, &word, sizeof word);
  }
  std::vector<unsigned> order(threads / 32);
  for (unsigned w = 0; w < order.size(); ++w) order[w] = w;
  for (unsigned t = 0; t < threads; ++t) {
    b.fibers.push_back(std::make_unique<Fiber>());
    start(*b.fibers.back(), t);
  }
  uint64_t before = 0;
  for (int idle = 0; idle < kTurnsOfPatience; idle = b.progress == before ? idle + 1 : 0) {
    before = b.progress;
    run_turn(b, order);
    if (!b.failure.empty()) return b.failure;
    if (b.progress == before && b.copies.empty() && !b.lazy.empty()) {
      b.lazy.front()();
      b.lazy.pop_front();
      ++b.progress;
    }
    if (b.copies.empty() && b.lazy.empty() &&
        std::all_of(b.fibers.begin(), b.fibers.end(), [](const auto& f) { return f->done; }))
      return {};
  }
  std::string text = "deadlock, by the first thread of each warp:";
  for (const auto& f : b.fibers)
    if (!f->done && f->thread % 32 == 0) text += " " + std::to_string(f->thread) + " " + f->waits_for + ";";
  return text;
}

// ---- warp collectives -----------------------------------------------------------------------------------------------

struct Lanes {
  uint64_t value[32][4];
};
// What every lane of the warp brought.
inline Lanes exchange(uint64_t x0, uint64_t x1 = 0, uint64_t x2 = 0, uint64_t x3 = 0) {
  Fiber& f = *block->current;
  Warp& warp = block->warps[f.thread / 32];
  const uint64_t turn = f.collectives++, mine[4] = {x0, x1, x2, x3};
  std::memcpy(warp.value[turn % 2][f.thread % 32], mine, sizeof mine);
  ++warp.arrived[turn % 2];
  wait_until("its warp", [&] { return warp.arrived[turn % 2] >= (turn / 2 + 1) * 32; });
  Lanes all;
  std::memcpy(all.value, warp.value[turn % 2], sizeof all.value);
  return all;
}
template <class T>
uint64_t bits_of(T x) {
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
template <class T, class Fold>
T fold(T x, const Fold& both) {
  const Lanes all = exchange(bits_of(x));
  T folded = from_bits<T>(all.value[0][0]);
  for (int lane = 1; lane < 32; ++lane) folded = both(folded, from_bits<T>(all.value[lane][0]));
  return folded;
}

// ---- memory, numbers, barriers --------------------------------------------------------------------------------------

template <class T>
T load(uint32_t at) {
  if (at + sizeof(T) > sizeof shared) fail("a load outside shared memory");
  T x;
  std::memcpy(&x, shared + at, sizeof x);
  return x;
}
template <class T>
void store(uint32_t at, T x) {
  if (at + sizeof(T) > sizeof shared) fail("a store outside shared memory");
  std::memcpy(shared + at, &x, sizeof x);
}

template <bool kBf16>
float to_float(uint64_t low16) {
  const auto bits = static_cast<uint16_t>(low16);
  return kBf16 ? heed::to_float(heed::Bf16{bits}) : heed::to_float(heed::F16{bits});
}
template <bool kBf16>
uint16_t to_16(float x) {
  return kBf16 ? heed::to_bf16(x).bits : heed::to_f16(x).bits;
}

inline Mbarrier& mbarrier(uint32_t at) {
  if (!block->mbarriers.contains(at)) fail("an mbarrier that nobody has initialised");
  return block->mbarriers[at];
}
inline void end_phase_if_complete(Mbarrier& m) {
  if (m.pending == 0 && m.bytes == 0) ++m.completed, m.pending = m.expected;
}
inline void arrive(uint32_t at, int64_t bytes) {
  Mbarrier& m = mbarrier(at);
  m.bytes += bytes;
  --m.pending;
  end_phase_if_complete(m);
  ++block->progress;
}
inline uint64_t arrive(NamedBarrier& b, int threads) {
  const uint64_t generation = b.generation;
  if (++b.arrived == threads) b.arrived = 0, ++b.generation;
  ++block->progress;
  return generation;
}

}  // namespace emulated

// ---- what CUDA C++ has by itself ------------------------------------------------------------------------------------

#define threadIdx emulated::thread_index
#define blockIdx emulated::block_index
#define gridDim emulated::grid_size
#define blockDim emulated::block_size

struct uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
struct uint2 {
  uint32_t x, y;
};
struct float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
struct alignas(16) float4 {
  float x, y, z, w;
};

inline void __syncwarp() { emulated::exchange(0); }
inline void __syncthreads() {
  emulated::NamedBarrier& b = emulated::block->named[0];
  const uint64_t generation = arrive(b, static_cast<int>(emulated::block->fibers.size()));
  emulated::wait_until("__syncthreads", [&] { return b.generation != generation; });
}
template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  return emulated::from_bits<T>(emulated::exchange(emulated::bits_of(x)).value[lane % 32][0]);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int other) {
  return __shfl_sync(mask, x, static_cast<int>(threadIdx.x % 32) ^ other);
}
inline unsigned __ballot_sync(unsigned, bool p) {
  const unsigned mine = p ? 1u << threadIdx.x % 32 : 0;
  return emulated::fold(mine, [](unsigned a, unsigned b) { return a | b; });
}
inline bool __any_sync(unsigned mask, bool p) { return __ballot_sync(mask, p) != 0; }
inline bool __all_sync(unsigned mask, bool p) { return __ballot_sync(mask, p) == 0xffffffffu; }
inline unsigned __reduce_or_sync(unsigned, unsigned x) {
  return emulated::fold(x, [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_max_sync(unsigned, unsigned x) {
  return emulated::fold(x, [](unsigned a, unsigned b) { return std::max(a, b); });
}
inline unsigned __reduce_add_sync(unsigned, unsigned x) {
  return emulated::fold(x, [](unsigned a, unsigned b) { return a + b; });
}
inline int __reduce_max_sync(unsigned, int x) {
  return emulated::fold(x, [](int a, int b) { return std::max(a, b); });
}
inline int __reduce_min_sync(unsigned, int x) {
  return emulated::fold(x, [](int a, int b) { return std::min(a, b); });
}
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
template <class T>
T atomicAdd(T* p, T x) {
  return std::exchange(*p, *p + x);
}
template <class T>
T atomicExch(T* p, T x) {
  return std::exchange(*p, x);
}
template <class T>
T atomicCAS(T* p, T expected, T x) {
  return *p == expected ? std::exchange(*p, x) : *p;
}
using std::max;
using std::min;
inline long long max(int a, long long b) { return std::max<long long>(a, b); }
inline long long max(long long a, int b) { return std::max<long long>(a, b); }
inline long long min(int a, long long b) { return std::min<long long>(a, b); }
inline long long min(long long a, int b) { return std::min<long long>(a, b); }
