// The specialisations of the GPU kernels: one of them as a key for the compiler, and the list of all that can be
// reached.
#pragma once

#include <string>
#include <vector>

#include "base/dtype.h"
#include "cuda/jit.h"
#include "cuda/tiles.h"

namespace heed::cuda {

struct KernelVariant {
  KernelKey key;
  int threads = 0;
  int shared_bytes = 0;  // dynamic
  int spill_bytes = 0;   // what its row of the tile table allows
  const char* why = "";  // the row's reason
};

// What of a problem decides the specialisation of attention_fwd_sm80.
struct AttentionFwdFeatures {
  bool is_bf16 = false;
  MaskKind mask = kMaskNone;
  bool modified = false;  // softcap, bias, ALiBi, mask tensor, dropout
  bool gather = false;    // pages or unaligned rows
  bool split = false;

  bool operator==(const AttentionFwdFeatures&) const = default;
};

// Fewer variants than feature sets: a gathered kernel takes any rows and any range of keys, so splits and modified
// scores have no other. The difference is small beside what those features cost.
AttentionFwdFeatures reachable(AttentionFwdFeatures features);

// The tile for features as reachable() gives them, which become the tile's: a low tile takes every key as a range.
const AttentionFwdTile* attention_fwd_tile(AttentionFwdFeatures& features, HeadDims dims, TileHeight height, int major,
                                           int shared_limit);
KernelVariant attention_fwd_variant(const AttentionFwdFeatures& features, const AttentionFwdTile& tile);
// What of a problem, beside its tile, decides the specialisation of attention_fwd_sm90.
struct AttentionFwdSm90Features {
  bool is_bf16 = false;
  bool has_lower_end = false;  // a window hides the first keys from rows as well
  bool lengths = false;  // lengths and places from the device, chunks, splits, shared tiles: any range of keys then
  bool terms = false;    // bias, ALiBi, mask tensor, dropout: with lengths, on tiles of their own
  bool softcap = false;  // and none of those: with lengths
  bool split = false;    // without lengths, where splits_alone
};
KernelVariant attention_fwd_sm90_variant(const AttentionFwdSm90Features& features, const AttentionFwdSm90Tile& tile);
KernelVariant attention_decode_variant(bool is_bf16, bool gather, const DecodeTile& tile);
KernelVariant attention_decode_sm90_variant(bool is_bf16, const DecodeSm90Tile& tile);
KernelVariant attention_fwd_portable_variant(Dtype element, const PortableTile& tile);
// combine, `rows` of a block: 1, or kCombineWarps where there are no more splits than that.
inline constexpr int kCombineWarps = 8;
KernelVariant combine_variant(Dtype element, int rows);
KernelVariant check_sequences_variant();
KernelVariant pack_mask_variant();
KernelVariant kv_append_variant(Dtype element);

// Every variant that some problem reaches on devices of this architecture; each once.
std::vector<KernelVariant> reachable_variants(const Architecture& arch);

}  // namespace heed::cuda
