#include "cuda/variants.h"

#include <set>
#include <utility>

#include "base/format.h"

namespace heed::cuda {

namespace {

const char* element_name(Dtype element) {
  return element == Dtype::kF32 ? "kElementF32" : element == Dtype::kF16 ? "kElementF16" : "kElementBf16";
}

template <class Tile>
KernelVariant variant_of(const char* source, std::string expression, int threads, const Tile& tile) {
  return {.key = {source, std::move(expression)},
          .threads = threads,
          .shared_bytes = shared_bytes(tile),
          .spill_bytes = tile.spill_bytes,
          .why = tile.why};
}

}  // namespace

AttentionFwdFeatures reachable(AttentionFwdFeatures features) {
  if (features.split || features.modified) features.gather = true;
  if (features.mask == kMaskNone && features.gather) features.mask = kMaskRange;
  return features;
}

const AttentionFwdTile* attention_fwd_tile(AttentionFwdFeatures& features, HeadDims dims, TileHeight height, int major,
                                           int shared_limit) {
  if (features.split || features.gather) height = TileHeight::kLow;
  const ScoreKind score = features.modified            ? ScoreKind::kModified
                          : features.mask == kMaskNone ? ScoreKind::kFull
                                                       : ScoreKind::kRange;
  const AttentionFwdTile* tile = attention_fwd_tile(dims, score, height, major, shared_limit);
  if (tile != nullptr && score == ScoreKind::kFull && height == TileHeight::kLow && tile->score != score)
    features.mask = kMaskRange;
  return tile;
}

KernelVariant attention_fwd_variant(const AttentionFwdFeatures& f, const AttentionFwdTile& t) {
  constexpr const char* kExpression =
      "heed::cuda::attention_fwd_sm80<heed::cuda::AttentionFwdVariant{{.is_bf16={},.head_dim={},.head_dim_v={},"
      ".tile_q={},.tile_k={},.warps={},.stages={},.mask={},.modified={},.gather={},.split={},.blocks={}}}>";
  return variant_of(
      "attention_fwd_sm80.cu",
      heed::format(kExpression, int{f.is_bf16}, t.head_dim, t.head_dim_v, t.tile_q, t.tile_k, t.warps, t.stages,
                   static_cast<int>(f.mask), int{f.modified}, int{f.gather}, int{f.gather}, t.blocks),
      t.warps * 32, t);
}

KernelVariant attention_fwd_sm90_variant(const AttentionFwdSm90Features& f, const AttentionFwdSm90Tile& t) {
  constexpr const char* kExpression =
      "heed::cuda::attention_fwd_sm90<heed::cuda::AttentionFwdSm90Variant{{.is_bf16={},.head_dim={},.head_dim_v={}"
      ",.consumers={},.tile_k={},.stages={},.rings={},.q_in_registers={},.ping_pong={},.blocks={},.mask={},.has_lower_"
      "end={},.lengths={},.terms={},.softcap={},.split={}}}>";
  KernelVariant variant = variant_of(
      "attention_fwd_sm90.cu",
      heed::format(kExpression, int{f.is_bf16}, t.head_dim, t.head_dim_v, t.consumers, t.tile_k, t.stages, t.rings,
                   t.q_in_registers, t.ping_pong, t.blocks, static_cast<int>(t.ranges ? kMaskRange : kMaskNone),
                   int{f.has_lower_end || f.lengths}, int{f.lengths}, int{f.terms}, int{f.softcap}, int{f.split}),
      128 * (t.consumers + 1), t);
  variant.shared_bytes = shared_bytes(t, f.lengths);
  if (f.lengths) variant.spill_bytes = 96;  // at D 64 beside P, else where loads are issued
  return variant;
}

KernelVariant attention_decode_variant(bool is_bf16, bool gather, const DecodeTile& t) {
  constexpr const char* kExpression =
      "heed::cuda::attention_decode_sm80<heed::cuda::AttentionFwdVariant{{.is_bf16={},.head_dim={},.head_dim_v={},"
      ".tile_q={},.tile_k={},.warps={},.mask={},.gather={},.split=1}}>";
  return variant_of("attention_decode_sm80.cu",
                    heed::format(kExpression, int{is_bf16}, t.head_dim, t.head_dim_v, t.tile_q, t.tile_k, t.warps,
                                 static_cast<int>(kMaskRange), int{gather}),
                    t.warps * 32, t);
}

KernelVariant attention_decode_sm90_variant(bool is_bf16, const DecodeSm90Tile& t) {
  constexpr const char* kExpression =
      "heed::cuda::attention_decode_sm90<heed::cuda::AttentionFwdVariant{{.is_bf16={},.head_dim={},.head_dim_v={},"
      ".tile_q={},.tile_k={},.warps={},.stages={},.mask={},.split=1}}>";
  return variant_of("attention_decode_sm90.cu",
                    heed::format(kExpression, int{is_bf16}, t.head_dim, t.head_dim_v, t.tile_q, tile_k(t), t.warps,
                                 t.stages, static_cast<int>(kMaskRange)),
                    t.warps * 32 + 32, t);
}

KernelVariant attention_fwd_portable_variant(Dtype element, const PortableTile& t) {
  constexpr const char* kExpression =
      "heed::cuda::attention_fwd_portable<heed::cuda::PortableVariant{{.element=heed::cuda::{},.dim={},.tile_q={},"
      ".tile_k={}}}>";
  return variant_of("attention_fwd_portable.cu",
                    heed::format(kExpression, element_name(element), t.dim, t.tile_q, t.tile_k), kPortableThreads, t);
}

KernelVariant combine_variant(Dtype element, int rows) {
  return {.key = {"combine.cu",
                  heed::format("heed::cuda::combine<heed::cuda::CombineVariant{{.element=heed::cuda::{},.warps={}"
                               ",.rows={}}}>",
                               element_name(element), kCombineWarps, rows)},
          .threads = kCombineWarps * 32,
          .why = rows > 1 ? "a warp a row: few splits" : "a block a row: its warps share the splits"};
}

KernelVariant check_sequences_variant() {
  constexpr int kThreads = 256;
  return {
      .key = {"check_sequences.cu",
              heed::format("heed::cuda::check_sequences<heed::cuda::CheckSequencesVariant{{.threads={}}}>", kThreads)},
      .threads = kThreads,
      .why = "a block a sequence, its threads over the pages"};
}

KernelVariant pack_mask_variant() {
  constexpr int kThreads = 256;
  return {.key = {"pack_mask.cu",
                  heed::format("heed::cuda::pack_mask<heed::cuda::PackMaskVariant{{.threads={}}}>", kThreads)},
          .threads = kThreads,
          .why = "a thread a word"};
}

KernelVariant kv_append_variant(Dtype element) {
  constexpr int kThreads = 128;
  return {
      .key = {"kv_append.cu", heed::format("heed::cuda::kv_append<heed::cuda::KvAppendVariant{{.element=heed::cuda::{},"
                                           ".threads={}}}>",
                                           element_name(element), kThreads)},
      .threads = kThreads,
      .why = "a warp a row of a head"};
}

std::vector<KernelVariant> reachable_variants(const Architecture& arch) {
  std::vector<KernelVariant> variants;
  std::set<std::string> seen;
  const auto add = [&](KernelVariant variant) {
    if (seen.insert(variant.key.expression).second) variants.push_back(std::move(variant));
  };
  for (const HeadDims& dims : kAttentionFwdHeadDims) {
    for (int bits = 0; bits < 16; ++bits) {
      for (const MaskKind mask : {kMaskNone, kMaskRange}) {
        AttentionFwdFeatures features = reachable(
            {.is_bf16 = (bits & 1) != 0, .mask = mask, .modified = (bits & 2) != 0, .gather = (bits & 4) != 0});
        const TileHeight height = (bits & 8) != 0 ? TileHeight::kLow : TileHeight::kTall;
        const AttentionFwdTile* tile = attention_fwd_tile(features, dims, height, arch.major, arch.shared_limit);
        add(attention_fwd_variant(features, *tile));
      }
    }
  }
  if (arch.major == 9)
    for (const AttentionFwdSm90Tile& tile : kAttentionFwdSm90Tiles)
      for (int bits = 0; bits < 8; ++bits) {
        const bool lengths = tile.terms || (bits & 4) != 0;
        if (tile.ranges || bits < 2)
          add(attention_fwd_sm90_variant({(bits & 1) != 0, (bits & 2) != 0, lengths, tile.terms}, tile));
        if (tile.ranges && !tile.terms && caps_scores(tile.head_dim) && bits < 2)
          add(attention_fwd_sm90_variant({.is_bf16 = (bits & 1) != 0, .lengths = true, .softcap = true}, tile));
        if (splits_alone(tile) && bits < 2)
          add(attention_fwd_sm90_variant({.is_bf16 = (bits & 1) != 0, .split = true}, tile));
      }
  for (const DecodeTile& tile : kDecodeTiles)
    for (int bits = 0; bits < 4; ++bits) add(attention_decode_variant((bits & 1) != 0, (bits & 2) != 0, tile));
  if (arch.major == 9)
    for (const DecodeSm90Tile& tile : kDecodeSm90Tiles)
      for (const bool is_bf16 : {false, true}) add(attention_decode_sm90_variant(is_bf16, tile));
  for (const PortableTile& tile : kPortableTiles)
    for (const Dtype element : {Dtype::kF32, Dtype::kF16, Dtype::kBf16})
      add(attention_fwd_portable_variant(element, tile));
  for (const Dtype element : {Dtype::kF32, Dtype::kF16, Dtype::kBf16}) {
    for (const int rows : {1, kCombineWarps}) add(combine_variant(element, rows));
    add(kv_append_variant(element));
  }
  add(check_sequences_variant());
  if (arch.major == 9) add(pack_mask_variant());
  return variants;
}

}  // namespace heed::cuda
