// Stands in for src/cuda/kernels/mma_sm90.cuh where kernels run on the host.
#pragma once

#include <array>

#include "params.h"
#include "ptx.cuh"

namespace heed::cuda {

// ---- barriers -------------------------------------------------------------------------------------------------------

inline void mbarrier_init(u32 barrier, u32 count) {
  emulated::block->mbarriers[barrier] = {static_cast<int>(count), static_cast<int>(count), 0, 0};
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(u32 barrier) {
  emulated::arrive(barrier, 0);
  emulated::dawdle();
}
inline void mbarrier_arrive_expect_tx(u32 barrier, u32 bytes) {
  emulated::arrive(barrier, bytes);
  emulated::dawdle();
}
inline void mbarrier_wait(u32 barrier, u32 parity) {
  const emulated::Mbarrier& m = emulated::mbarrier(barrier);
  emulated::wait_until("an mbarrier", [&] { return m.completed % 2 != parity; });
}
inline void bar_sync(int barrier, int threads) {
  emulated::NamedBarrier& b = emulated::block->named[barrier];
  const uint64_t generation = emulated::arrive(b, threads);
  emulated::wait_until("a named barrier", [&] { return b.generation != generation; });
}
inline void bar_arrive(int barrier, int threads) { emulated::arrive(emulated::block->named[barrier], threads); }
inline void store_shared(u32 address, u32 x) { emulated::store(address, x); }
inline u32 load_shared(u32 address) { return emulated::load<u32>(address); }
inline uint4 load_shared_16(u32 address) { return emulated::load<uint4>(address); }
inline int thread_here() { return static_cast<int>(threadIdx.x); }
inline bool elect_sync() { return threadIdx.x % 32 == 0; }
template <int kRegisters>
void setmaxnreg_inc() {}
template <int kRegisters>
void setmaxnreg_dec() {}

// ---- bulk copies ----------------------------------------------------------------------------------------------------

// A tensor map here: address, sizes of four dimensions, strides of the last three in bytes, a box's extent in the second and the
// third; chunks of 64 columns that a row and a box have, where they are a fifth.
constexpr u64 kEvictFirst = 0, kEvictLast = 0;
inline void prefetch_tensormap(const TensorMap&) {}

inline char* element_of_tensor(const TensorMap& map, const i64 (&at)[4]) {
  i64 offset = at[0] * 2;
  for (int i = 0; i < 4; ++i) {
    if (at[i] < 0 || at[i] >= static_cast<i64>(map.opaque[1 + i])) return nullptr;
    if (i > 0) offset += at[i] * static_cast<i64>(map.opaque[4 + i]);
  }
  return reinterpret_cast<char*>(map.opaque[0]) + offset;
}
inline u32 swizzled(u32 base, int row, int column) {
  return base + row * 128 + ((column / 8 ^ row % 8) << 4) + column % 8 * 2;
}
// visit(element or null, place in shared memory) for a box.
template <class Visit>
void for_box(const TensorMap& map, u32 place, i32 column, i32 inner, i32 outer, i32 sequence, const Visit& visit) {
  const int extent = static_cast<int>(map.opaque[8]);
  for (int r = 0; r < extent * static_cast<int>(map.opaque[9]); ++r)
    for (int c = 0; c < 64; ++c)
      visit(element_of_tensor(map, {i64{column} + c, i64{inner} + r % extent, i64{outer} + r / extent, sequence}),
            swizzled(place, r, c));
}

inline void tma_load(u32 dst, const TensorMap& map, u32 barrier, i32 column, i32 inner, i32 outer, i32 sequence, u64) {
  if (dst % 1024 != 0) emulated::fail("a bulk copy off the swizzle's period");
  emulated::add_copy([=, m = map] {
    for_box(m, dst, column, inner, outer, sequence, [](const char* from, u32 to) {
      unsigned short x = 0;
      if (from != nullptr) std::memcpy(&x, from, 2);
      std::memcpy(emulated::shared + to, &x, 2);
    });
    emulated::Mbarrier& b = emulated::block->mbarriers[barrier];
    b.bytes -= static_cast<i64>(128 * m.opaque[8] * m.opaque[9]);
    emulated::end_phase_if_complete(b);
  });
}
inline void tma_load_chunks(u32 dst, const TensorMap& map, u32 barrier, i32 column, i32 row, i32 head, i32 sequence, u64) {
  if (dst % 1024 != 0) emulated::fail("a bulk copy off the swizzle's period");
  emulated::add_copy([=, m = map] {
    const u32 bytes = static_cast<u32>(128 * m.opaque[8]);  // of a chunk
    for (u32 chunk = 0; chunk < m.opaque[11]; ++chunk)
      for_box(m, dst + chunk * bytes, column, row, head, sequence, [&](const char* from, u32 to) {
        unsigned short x = 0;
        if (from != nullptr && chunk < m.opaque[10]) std::memcpy(&x, from + chunk * 128, 2);
        std::memcpy(emulated::shared + to, &x, 2);
      });
    emulated::Mbarrier& b = emulated::block->mbarriers[barrier];
    b.bytes -= static_cast<i64>(bytes * m.opaque[11]);
    emulated::end_phase_if_complete(b);
  });
}
inline void tma_store(const TensorMap& map, u32 src, i32 column, i32 inner, i32 outer, i32 sequence) {
  if (column < 0 || inner < 0 || outer < 0 || sequence < 0) emulated::fail("a bulk store that begins before the tensor");
  emulated::Fiber* const fiber = emulated::block->current;
  ++fiber->stores_left;
  emulated::add_copy([=, m = map] {
    for_box(m, src, column, inner, outer, sequence, [](char* to, u32 from) {
      if (to != nullptr) std::memcpy(to, emulated::shared + from, 2);
    });
    --fiber->stores_left;
  });
}
inline void tma_store_commit() {}
inline void tma_store_wait_read() {
  const emulated::Fiber* const fiber = emulated::block->current;
  emulated::wait_until("its bulk stores", [&] { return fiber->stores_left == 0; });
}
inline void tma_store_wait() { tma_store_wait_read(); }
inline void fence_proxy_async() {}

inline void stmatrix_x4(u32 address, u32 r0, u32 r1, u32 r2, u32 r3) {
  const emulated::Lanes rows = emulated::exchange(address);
  const u32 lane = threadIdx.x % 32, r[4] = {r0, r1, r2, r3};
  for (u32 m = 0; m < 4; ++m)
    emulated::store(static_cast<u32>(rows.value[m * 8 + lane / 4][0]) + lane % 4 * 4, r[m]);
}

// ---- warpgroup products ---------------------------------------------------------------------------------------------

inline void wgmma_fence() {}
inline void wgmma_commit() {
  emulated::Fiber& f = *emulated::block->current;
  if (f.open == nullptr) return;
  if (emulated::block->random() % 2 == 0) f.open->multiply();
  f.groups.push_back(std::move(f.open));
}
template <int kPending>
void wgmma_wait() {
  emulated::Fiber& f = *emulated::block->current;
  for (; f.groups.size() > kPending; f.groups.pop_front()) {
    f.groups.front()->multiply();
    for (const auto& [d, sums] : f.groups.front()->sums) std::copy(sums.begin(), sums.end(), d);
  }
}
template <int kN>
void pin(float (&)[kN]) {}
template <int kN, int kM>
void pin(u32 (&)[kN][kM]) {}

inline u32 descriptor_low(u32 address, u32 leading_bytes) { return address >> 4 | leading_bytes >> 4 << 16; }
inline u64 descriptor(u32 low) { return low; }

// Element (k, n) of an operand in rows of 128 bytes: k along the rows, or, transposed, n.
template <bool kBf16, bool kTransposed>
float element_of_operand(u64 low, u32 k, u32 n) {
  const u32 start = static_cast<u32>(low & 0x3fff) << 4, leading = static_cast<u32>(low >> 16 & 0x3fff) << 4;
  const u32 plain = kTransposed ? start + n / 64 * leading + k * 128 + n % 64 * 2 : start + n * 128 + k * 2;
  return emulated::to_float<kBf16>(emulated::load<uint16_t>(plain ^ (plain >> 7 & 7) << 4));
}

// This thread's part of d = a b (+ d), in rows g and g + 8 of its warp's 16; a(r, k): of row g + 8 r.
template <bool kBf16, bool kKeep, bool kTransposed, int kN, class OfA>
void product(float (&d)[kN], const OfA& a, u64 b) {
  emulated::Fiber& f = *emulated::block->current;
  if (f.open == nullptr) f.open = std::make_unique<emulated::Products>();
  const auto [place, is_first] = f.open->sums.try_emplace(d);
  std::vector<float>& sums = place->second;
  if (is_first) sums.assign(d, d + kN);
  std::fill(d, d + kN, __int_as_float(0x7fc00000));
  const u32 column = threadIdx.x % 4 * 2;
  f.open->left.push_back([=, &sums] {
    if (!kKeep) std::fill(sums.begin(), sums.end(), 0.0f);
    for (u32 k = 0; k < 16; ++k) {
      const float of_a[2] = {a(0, k), a(1, k)};
      for (u32 i = 0; i < kN; ++i)
        sums[i] += of_a[i / 2 % 2] * element_of_operand<kBf16, kTransposed>(b, k, i / 4 * 8 + column + i % 2);
    }
  });
}
template <bool kBf16, bool kKeep, int kN>
void wgmma_ss(float (&d)[kN], u64 a, u64 b) {
  const u32 row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
  product<kBf16, kKeep, false>(
      d, [=](u32 r, u32 k) { return element_of_operand<kBf16, false>(a, k, row + r * 8); }, b);
}
template <bool kBf16, bool kKeep, bool kTransposed, int kN>
void wgmma_rs(float (&d)[kN], const u32 (&a)[4], u64 b) {
  const emulated::Lanes all = emulated::exchange(a[0], a[1], a[2], a[3]);
  std::array<float, 32> rows;  // only this thread's two
  for (u32 r = 0; r < 2; ++r)
    for (u32 k = 0; k < 16; ++k)
      rows[r * 16 + k] = element_of_fragment<kBf16>(all, threadIdx.x % 32 / 4 + r * 8, k);
  product<kBf16, kKeep, kTransposed>(d, [=](u32 r, u32 k) { return rows[r * 16 + k]; }, b);
}

}  // namespace heed::cuda
