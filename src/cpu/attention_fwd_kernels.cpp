// The forward kernels, compiled once per instruction set, and the loop over a unit's chunks that both inner loops
// share.
#include "cpu/kernels/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/attention_fwd_kernels.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#include "cpu/attention_fwd.h"
#include "cpu/kernels/attention_decode-inl.h"
#include "cpu/kernels/attention_fwd-inl.h"
#include "cpu/kernels/attention_fwd_amx-inl.h"

HWY_BEFORE_NAMESPACE();
namespace heed::cpu::HWY_NAMESPACE {

// Chunks [first, end) of the keys [lo, hi) that some row of the unit sees.
struct UnitKeys {
  int64_t lo = 0, hi = 0;
};

// Runs a task of a unit. Unit gives attend(origin, lo, hi, partial), merge(partial, sum), finish(sum) and
// partial_at(floats).
template <class Unit>
void run_chunks(const UnitTask& task, Unit& unit, const UnitKeys& keys, float* sum_floats, float* part_floats,
                int64_t partial_stride) {
  const int64_t size = task.work->chunk_keys;
  const int64_t first = keys.lo < keys.hi ? keys.lo / size : 0,
                end = keys.lo < keys.hi ? (keys.hi + size - 1) / size : 0;
  const auto attend = [&](int64_t chunk, float* to) {
    unit.attend(chunk * size, HWY_MAX(keys.lo, chunk * size), HWY_MIN(keys.hi, chunk * size + size),
                unit.partial_at(to));
  };
  float* sum = sum_floats;
  if (task.chunk < 0) {
    for (int64_t chunk = first; chunk < end; ++chunk) {
      attend(chunk, chunk == first ? sum : part_floats);
      if (chunk > first) unit.merge(unit.partial_at(part_floats), unit.partial_at(sum));
    }
  } else {
    if (task.chunk >= first && task.chunk < end) attend(task.chunk, task.partials + task.chunk * partial_stride);
    if (task.pending->fetch_sub(1, std::memory_order_acq_rel) != 1) return;  // not the last chunk of this unit
    if (first < end) sum = task.partials + first * partial_stride;
    for (int64_t chunk = first + 1; chunk < end; ++chunk)
      unit.merge(unit.partial_at(task.partials + chunk * partial_stride), unit.partial_at(sum));
  }
  if (first >= end) unit.attend(0, 0, 0, unit.partial_at(sum));  // nothing visible: m = -inf, l = 0, O = 0
  unit.finish(unit.partial_at(sum));
}

struct RowsLoop : RowUnit {
  RowPartial partial_at(float* floats) const {
    float* m = floats + num_blocks * block_floats();
    return {floats, m, m + num_blocks * kBlockLanes};
  }
  void attend(int64_t origin, int64_t lo, int64_t hi, const RowPartial& to) {
#if HWY_TARGET == HWY_AVX3
    if (run.shape.products == Products::kAmx) return attend_rows_chunk_amx(*this, origin, lo, hi, to);
#endif
    attend_rows_chunk(*this, origin, lo, hi, to);
  }
  void merge(const RowPartial& part, const RowPartial& sum) { merge_rows(*this, part, sum); }
  void finish(const RowPartial& sum) { finish_rows(*this, sum); }
};

void attend_rows(const ForwardRun& run, const UnitTask& task, float* scratch) {
  const ScratchLayout& at = run.layout;
  const Sequence& sequence = task.work->where;
  RowsLoop unit{{run,
                 sequence,
                 task.kv_head,
                 (task.num_rows + kBlockLanes - 1) / kBlockLanes,
                 reinterpret_cast<LaneBlock*>(scratch + at.lanes),
                 scratch + at.q,
                 scratch + at.s,
                 scratch + at.tile,
                 scratch + at.row,
                 scratch + at.k,
                 scratch + at.v,
                 {},
                 {},
                 {}}};
  unit.k_rows = locate_keys(*run.problem, *run.args, sequence, Slot::kK, task.kv_head);
  unit.v_rows = locate_keys(*run.problem, *run.args, sequence, Slot::kV, task.kv_head);
  for (int64_t block = 0; block < unit.num_blocks; ++block) {
    const int64_t first = block * kBlockLanes;
    fill_lanes(*run.problem, run.terms, sequence, task.kv_head, task.first_row + first,
               HWY_MIN(task.num_rows - first, int64_t{kBlockLanes}), unit.lanes + block);
  }
  const LaneBlock& last = unit.lanes[unit.num_blocks - 1];
  const UnitKeys keys{unit.lanes[0].lo[0], last.hi[last.count - 1]};
  unit.pairs.tiles = run.bf16;
  unit.pairs.q = reinterpret_cast<uint32_t*>(scratch + at.q_pairs);
  unit.pairs.v = reinterpret_cast<uint32_t*>(scratch + at.v_pairs);
  unit.pairs.p = reinterpret_cast<uint32_t*>(scratch + at.p_pairs);
  unit.pairs.k = reinterpret_cast<uint16_t*>(scratch + at.k_rows16);
  for (int64_t block = 0; block < unit.num_blocks; ++block) {
    if (run.bf16 != nullptr) {
      pair_queries(unit, block);
    } else {
      transpose_queries(unit, block);
    }
  }
#if HWY_TARGET == HWY_AVX3
  const AmxInUse tiles(run.shape.products == Products::kAmx);
#endif
  run_chunks(task, unit, keys, scratch + at.sum, scratch + at.part, run.partial_stride);
}

struct DecodeLoop : DecodeUnit {
  DecodePartial partial_at(float* floats) const {
    return {floats, floats + num_rows * width_v(), floats + num_rows * (width_v() + 1)};
  }
  void attend(int64_t origin, int64_t lo, int64_t hi, const DecodePartial& to) {
    decode_chunk(*this, origin, lo, hi, to);
  }
  void merge(const DecodePartial& part, const DecodePartial& sum) { merge_decode(*this, part, sum); }
  void finish(const DecodePartial& sum) { finish_decode(*this, sum); }
};

void attend_decode(const ForwardRun& run, const UnitTask& task, float* scratch) {
  const ScratchLayout& at = run.layout;
  DecodeLoop unit{{run,
                   task,
                   task.num_rows,
                   task.num_rows * task.num_heads,
                   {},
                   scratch + at.q,
                   scratch + at.s,
                   scratch + at.row,
                   scratch + at.k,
                   scratch + at.v,
                   {},
                   {}}};
  unit.k_rows = locate_keys(*run.problem, *run.args, task.work->where, Slot::kK, task.kv_head);
  unit.v_rows = locate_keys(*run.problem, *run.args, task.work->where, Slot::kV, task.kv_head);
  load_decode_rows(unit);
  const UnitKeys keys{unit.rows[0].keys.lo, unit.rows[unit.num_rows - 1].keys.hi};
  run_chunks(task, unit, keys, scratch + at.sum, scratch + at.part, run.partial_stride);
}

void attend(const ForwardRun& run, const UnitTask& task, float* scratch) {
  if (task.work->decode) {
    attend_decode(run, task, scratch);
  } else {
    attend_rows(run, task, scratch);
  }
}

extern const ForwardKernels kForward;
const ForwardKernels kForward = {attend};

}  // namespace heed::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace heed::cpu {

const ForwardKernels* forward_kernels_avx512() {
#if HWY_TARGETS & HWY_AVX3
  return &N_AVX3::kForward;
#else
  return nullptr;
#endif
}

const ForwardKernels* forward_kernels_avx2() {
#if HWY_TARGETS & HWY_AVX2
  return &N_AVX2::kForward;
#else
  return nullptr;
#endif
}

const ForwardKernels* forward_kernels_neon() {
#if HWY_TARGETS & HWY_NEON
  return &N_NEON::kForward;
#else
  return nullptr;
#endif
}

const ForwardKernels* forward_kernels_generic() {
#if HWY_TARGETS & HWY_EMU128
  return &N_EMU128::kForward;
#else
  return nullptr;
#endif
}

}  // namespace heed::cpu
#endif
