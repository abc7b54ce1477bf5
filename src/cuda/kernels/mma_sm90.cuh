// Hopper's instructions (sm_90a): bulk tensor copies, mbarriers, register budgets, warpgroup products. One wrapper per
// PTX instruction form, named after it; no logic inside.
#pragma once

#include "params.h"

namespace heed::cuda {

// ---- mbarrier -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and lets the phase end only when so many bytes have come.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Returns when the phase of this parity has ended.
__device__ __forceinline__ void mbarrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE_%=;\n"
      "bra WAIT_%=;\n"
      "DONE_%=:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void store_shared(u32 address, u32 x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
__device__ __forceinline__ u32 load_shared(u32 address) {
  u32 x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}

__device__ __forceinline__ uint4 load_shared_16(u32 address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

// threadIdx.x, read where this stands: what follows from it is not worked out before.
__device__ __forceinline__ int thread_here() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// ---- named barriers, register budget ----------------------------------------------------------------------------------

__device__ __forceinline__ void bar_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void bar_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
__device__ __forceinline__ bool elect_sync() {
  u32 elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected != 0;
}

// ---- bulk tensor copies -----------------------------------------------------------------------------------------------

// What the L2 cache is told of a load (the policies that createpolicy would make).
constexpr u64 kEvictFirst = 0x12F0000000000000ull, kEvictLast = 0x14F0000000000000ull;

__device__ __forceinline__ void prefetch_tensormap(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// A box at (column, row, head, sequence) to shared memory; the barrier counts its bytes, rows and columns outside the
// tensor, which come as 0, included.
__device__ __forceinline__ void tma_load(u32 dst, const TensorMap& map, u32 barrier, i32 column, i32 row, i32 head,
                                         i32 sequence, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(dst),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(sequence), "l"(policy)
      : "memory");
}
// The same of a map whose fifth dimension is chunks of 64 columns, from the first on.
__device__ __forceinline__ void tma_load_chunks(u32 dst, const TensorMap& map, u32 barrier, i32 column, i32 row, i32 head,
                                                i32 sequence, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6, %8}], [%2], %7;" ::"r"(dst),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(sequence), "l"(policy), "r"(0)
      : "memory");
}
// A box from shared memory; rows and columns outside the tensor are not written.
__device__ __forceinline__ void tma_store(const TensorMap& map, u32 src, i32 column, i32 row, i32 head, i32 sequence) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(src), "r"(column), "r"(row), "r"(head), "r"(sequence)
               : "memory");
}
__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until this thread's stores have read shared memory.
__device__ __forceinline__ void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void tma_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Between ordinary writes to shared memory and bulk copies or warpgroup products that read them.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void stmatrix_x4(u32 address, u32 r0, u32 r1, u32 r2, u32 r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r0), "r"(r1),
               "r"(r2), "r"(r3)
               : "memory");
}

// ---- warpgroup products -----------------------------------------------------------------------------------------------

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Registers that a product reads or writes behind the compiler's back: no use of them moves across this.
template <int kN>
__device__ __forceinline__ void pin(float (&r)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) asm volatile("" : "+f"(r[i])::"memory");
}
template <int kN, int kM>
__device__ __forceinline__ void pin(u32 (&r)[kN][kM]) {
#pragma unroll
  for (int i = 0; i < kN; ++i)
#pragma unroll
    for (int j = 0; j < kM; ++j) asm volatile("" : "+r"(r[i][j])::"memory");
}

// Shared-memory operand in rows of 128 bytes, swizzled, groups of eight rows 1024 bytes apart. Low word: address and the
// leading offset, in units of 16 bytes, so that a step inside the tile is one 32-bit addition.
__device__ __forceinline__ u32 descriptor_low(u32 address, u32 leading_bytes) {
  return address >> 4 | leading_bytes >> 4 << 16;
}
__device__ __forceinline__ u64 descriptor(u32 low) {
  constexpr u32 kHigh = 1u << 30 | 1024 >> 4;  // 128-byte swizzle; 1024 bytes
  u64 d;
  asm("mov.b64 %0, {%1, %2};" : "=l"(d) : "r"(low), "r"(kHigh));
  return d;
}

// The accumulators of m64nNk16 are N / 2 registers a thread: their names in the text, and as operands.
#define HEED_REGISTERS_32 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28," \
  "%29,%30,%31"
#define HEED_REGISTERS_40 \
  HEED_REGISTERS_32 "," \
  "%32,%33,%34,%35,%36,%37,%38,%39"
#define HEED_REGISTERS_48 \
  HEED_REGISTERS_40 "," \
  "%40,%41,%42,%43,%44,%45,%46,%47"
#define HEED_REGISTERS_64 \
  HEED_REGISTERS_48 "," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define HEED_REGISTERS_96 \
  HEED_REGISTERS_64 "," \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89," \
  "%90,%91,%92,%93,%94,%95"
#define HEED_REGISTERS_128 \
  HEED_REGISTERS_96 "," \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117," \
  "%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define HEED_ACCUMULATORS_8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define HEED_ACCUMULATORS_16(i) HEED_ACCUMULATORS_8(i), HEED_ACCUMULATORS_8(i + 8)
#define HEED_ACCUMULATORS_32 HEED_ACCUMULATORS_16(0), HEED_ACCUMULATORS_16(16)
#define HEED_ACCUMULATORS_40 HEED_ACCUMULATORS_32, HEED_ACCUMULATORS_8(32)
#define HEED_ACCUMULATORS_48 HEED_ACCUMULATORS_32, HEED_ACCUMULATORS_16(32)
#define HEED_ACCUMULATORS_64 HEED_ACCUMULATORS_48, HEED_ACCUMULATORS_16(48)
#define HEED_ACCUMULATORS_96 HEED_ACCUMULATORS_64, HEED_ACCUMULATORS_16(64), HEED_ACCUMULATORS_16(80)
#define HEED_ACCUMULATORS_128 HEED_ACCUMULATORS_96, HEED_ACCUMULATORS_16(96), HEED_ACCUMULATORS_16(112)

// d = a b (+ d where kKeep). wgmma_ss: a and b in shared memory, both with k along the rows of 128 bytes. wgmma_rs: a in
// registers; kTransposed: b with its n columns along those rows. kRegisters: how many accumulators; o0 to o6: the names of
// the operands behind them.
#define HEED_WGMMA(kShape, kRegisters, o0, o1, o2, o3, o4, o5, o6)                                             \
  template <bool kBf16, bool kKeep>                                                                            \
  __device__ __forceinline__ void wgmma_ss(float (&d)[kRegisters], u64 a, u64 b) {                             \
    if constexpr (kBf16)                                                                                       \
      asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, " o2 ", 0;\nwgmma.mma_async.sync.aligned." kShape   \
                   ".f32.bf16.bf16 {" HEED_REGISTERS_##kRegisters "}, " o0 ", " o1 ", keep, 1, 1, 0, 0;\n}"    \
                   : HEED_ACCUMULATORS_##kRegisters                                                            \
                   : "l"(a), "l"(b), "n"(int{kKeep}));                                                         \
    else                                                                                                       \
      asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, " o2 ", 0;\nwgmma.mma_async.sync.aligned." kShape   \
                   ".f32.f16.f16 {" HEED_REGISTERS_##kRegisters "}, " o0 ", " o1 ", keep, 1, 1, 0, 0;\n}"      \
                   : HEED_ACCUMULATORS_##kRegisters                                                            \
                   : "l"(a), "l"(b), "n"(int{kKeep}));                                                         \
  }                                                                                                            \
  template <bool kBf16, bool kKeep, bool kTransposed>                                                          \
  __device__ __forceinline__ void wgmma_rs(float (&d)[kRegisters], const u32 (&a)[4], u64 b) {                 \
    if constexpr (kBf16)                                                                                       \
      asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, " o5 ", 0;\nwgmma.mma_async.sync.aligned." kShape   \
                   ".f32.bf16.bf16 {" HEED_REGISTERS_##kRegisters "}, {" o0 "," o1 "," o2 "," o3 "}, " o4      \
                   ", keep, 1, 1, " o6 ";\n}"                                                                  \
                   : HEED_ACCUMULATORS_##kRegisters                                                            \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int{kKeep}), "n"(int{kTransposed})); \
    else                                                                                                       \
      asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, " o5 ", 0;\nwgmma.mma_async.sync.aligned." kShape   \
                   ".f32.f16.f16 {" HEED_REGISTERS_##kRegisters "}, {" o0 "," o1 "," o2 "," o3 "}, " o4        \
                   ", keep, 1, 1, " o6 ";\n}"                                                                  \
                   : HEED_ACCUMULATORS_##kRegisters                                                            \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int{kKeep}), "n"(int{kTransposed})); \
  }

HEED_WGMMA("m64n64k16", 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
HEED_WGMMA("m64n80k16", 40, "%40", "%41", "%42", "%43", "%44", "%45", "%46")
HEED_WGMMA("m64n96k16", 48, "%48", "%49", "%50", "%51", "%52", "%53", "%54")
HEED_WGMMA("m64n128k16", 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
HEED_WGMMA("m64n192k16", 96, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
HEED_WGMMA("m64n256k16", 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")

#undef HEED_WGMMA
#undef HEED_REGISTERS_32
#undef HEED_REGISTERS_40
#undef HEED_REGISTERS_48
#undef HEED_REGISTERS_64
#undef HEED_REGISTERS_96
#undef HEED_REGISTERS_128
#undef HEED_ACCUMULATORS_8
#undef HEED_ACCUMULATORS_16
#undef HEED_ACCUMULATORS_32
#undef HEED_ACCUMULATORS_40
#undef HEED_ACCUMULATORS_48
#undef HEED_ACCUMULATORS_64
#undef HEED_ACCUMULATORS_96
#undef HEED_ACCUMULATORS_128

}  // namespace heed::cuda
