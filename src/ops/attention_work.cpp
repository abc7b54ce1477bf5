// How much work a problem is: multiply-adds over the pairs that are visible, and bytes that have to move once.
#include <algorithm>

#include "ops/attention.h"
#include "ops/attention_slots.h"

namespace heed {
namespace {

// Positions that the masks leave: query positions [first, last], keys [0, keys).
struct Band {
  int64_t first = 0, last = -1;  // of the queries on the key axis
  int64_t keys = 0;
  int64_t left = -1, right = -1, chunk = 0;
};

// Sum over p in [first, last] of min(max(p + shift + 1, 0), keys): pairs with 0 <= j <= p + shift.
double pairs_up_to(int64_t first, int64_t last, int64_t shift, int64_t keys) {
  const int64_t from = std::max(first, -shift);           // p + shift + 1 >= 1 from here on
  const int64_t full = std::max(from, keys - shift - 1);  // p + shift + 1 >= keys
  double pairs = 0;
  if (const int64_t end = std::min(last + 1, full); end > from) {
    const double low = static_cast<double>(from + shift + 1), high = static_cast<double>(end + shift);
    pairs += (low + high) * static_cast<double>(end - from) / 2;
  }
  if (last >= full) pairs += static_cast<double>(keys) * static_cast<double>(last + 1 - full);
  return pairs;
}

double window_pairs(const Band& band) {
  if (band.last < band.first || band.keys <= 0) return 0;
  const double rows = static_cast<double>(band.last - band.first + 1);
  double pairs = band.right < 0 ? rows * static_cast<double>(band.keys)
                                : pairs_up_to(band.first, band.last, band.right, band.keys);
  if (band.left >= 0) pairs -= pairs_up_to(band.first, band.last, -band.left - 1, band.keys);
  return pairs;
}

// The part of `band` in chunk `index`, its keys counted from the chunk's start.
double chunk_pairs(const Band& band, int64_t index) {
  const int64_t start = index * band.chunk;
  Band part = band;
  part.first = std::max(band.first, start) - start;
  part.last = std::min(band.last, start + band.chunk - 1) - start;
  part.keys = std::min(band.chunk, band.keys - start);
  return window_pairs(part);
}

double visible_pairs(const Band& band) {
  if (band.chunk == 0) return window_pairs(band);
  const int64_t low = std::max<int64_t>(band.first, 0) / band.chunk;
  const int64_t end = std::min(band.last, band.keys - 1);
  if (end < 0) return 0;
  const int64_t high = end / band.chunk;
  if (high < low) return 0;
  double pairs = chunk_pairs(band, low);
  if (high > low) pairs += chunk_pairs(band, high);
  // All between are whole in both directions, hence alike.
  if (high > low + 1) pairs += chunk_pairs(band, low + 1) * static_cast<double>(high - low - 1);
  return pairs;
}

// Keys that at least one query sees, for the bytes.
int64_t visible_keys(const Band& band) {
  if (band.last < band.first) return 0;
  int64_t low = band.left < 0 ? 0 : std::max<int64_t>(0, band.first - band.left);
  int64_t high = band.right < 0 ? band.keys - 1 : std::min(band.keys - 1, band.last + band.right);
  if (band.chunk > 0) {
    if (band.last < 0) return 0;
    low = std::max(low, std::max<int64_t>(band.first, 0) / band.chunk * band.chunk);
    high = std::min(high, band.last / band.chunk * band.chunk + band.chunk - 1);
  }
  return std::max<int64_t>(0, high - low + 1);
}

// One sequence at capacity; packed: the mean one.
Band band_of(const AttentionProblem& p) {
  const int64_t sequences = std::max<int64_t>(p.batch, 1);
  const int64_t queries = p.packed_q() ? p.total_q / sequences : p.seqlen_q;
  Band band;
  band.keys = p.packed_k() ? p.total_k / sequences : p.seqlen_k;
  switch (p.offset_kind) {
    case OffsetKind::kBottomRight: band.first = band.keys - queries; break;
    case OffsetKind::kTopLeft: break;
    case OffsetKind::kGiven: band.first = p.q_offset; break;
  }
  band.last = band.first + queries - 1;
  band.left = p.window_left;
  band.right = p.window_right;
  band.chunk = p.chunk;
  return band;
}

double elements(const std::array<int64_t, 4>& shape) {
  return static_cast<double>(shape[0]) * static_cast<double>(shape[1]) * static_cast<double>(shape[2]) *
         static_cast<double>(shape[3]);
}

}  // namespace

double flops(const AttentionProblem& p) {
  const double pairs = visible_pairs(band_of(p)) * static_cast<double>(p.batch) * static_cast<double>(p.nheads_q);
  const double forward = 2.0 * static_cast<double>(p.head_dim + p.head_dim_v) * pairs;
  return p.pass == Pass::kForward ? forward : 2.5 * forward;
}

double bytes(const AttentionProblem& p) {
  const Band band = band_of(p);
  double total = 0;
  for (int i = 0; i < kNumSlots; ++i) {
    const Slot slot = static_cast<Slot>(i);
    if (!has_slot(p, slot)) continue;
    double count = elements(slot_shape(p, slot));
    const bool cached = slot == Slot::kK || slot == Slot::kV;
    if (cached && !p.packed_k()) {  // what the masks leave of each sequence's keys, wherever they lie
      const int64_t dim = slot == Slot::kK ? p.head_dim : p.head_dim_v;
      count = elements({p.batch, p.nheads_kv, visible_keys(band), dim});
    }
    total += count * static_cast<double>(dtype_bytes(slot_dtype(p, slot)));
  }
  const double vectors = static_cast<double>(p.sinks) + static_cast<double>(p.dsinks);
  total += vectors * static_cast<double>(p.nheads_q) * sizeof(float);
  if (p.dalibi) total += elements(slot_shape(p, Slot::kAlibi)) * sizeof(float);
  const int per_sequence = p.packed_q() + p.packed_k() + p.used_q + p.used_k + p.leftpad + (p.cache_batch > 0 ? 1 : 0);
  return total + static_cast<double>(per_sequence) * static_cast<double>(p.batch) * sizeof(int32_t);
}

}  // namespace heed
