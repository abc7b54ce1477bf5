// What the GPU rows would do, as pure functions of problem and device: no GPU is needed.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <vector>

#include "cuda/attention_fwd.h"
#include "cuda/tiles.h"
#include "ops/problem_line.h"

namespace heed::cuda {
namespace {

AttentionProblem problem_of(const std::string& line) {
  Result<ProblemLine> parsed = parse_problem_line(line);
  EXPECT_TRUE(parsed.ok()) << line << ": " << parsed.status().message();
  return parsed.ok() ? std::get<AttentionProblem>(parsed.value().problem) : AttentionProblem();
}

DeviceFacts device_of(const char* arch) {
  const Result<DeviceFacts> facts = typical_device(arch);
  EXPECT_TRUE(facts.ok());
  return facts.value();
}

DeviceFacts h200() { return device_of("sm_90a"); }

std::vector<std::string> forward_lines() {
  std::vector<std::string> lines;
  for (const auto& file : std::filesystem::directory_iterator(std::string(HEED_SOURCE_DIR) + "/tests/problems")) {
    std::ifstream stream(file.path());
    for (std::string line; std::getline(stream, line);) {
      if (!line.starts_with("attention") || line.find("pass=bwd") != std::string::npos ||
          line.find(" f64") != std::string::npos || line.find("=f64") != std::string::npos)
        continue;
      if (const size_t threads = line.find(" threads="); threads != std::string::npos)
        line.erase(threads, line.find(' ', threads + 1) - threads);
      lines.push_back(line + " device=cuda");
    }
  }
  return lines;
}

// Keys, rows and splits that a configuration covers are those that the problem can have.
void expect_covers(const AttentionProblem& p, const Configuration& c, const std::string& line) {
  const int64_t tiles = (most_keys(p) + c.tile_k - 1) / c.tile_k;
  if (!c.shares) EXPECT_GE(int64_t{c.max_splits} * (c.max_splits > 1 ? c.split_tiles : tiles), tiles) << line;
  EXPECT_TRUE(c.split || c.max_splits == 1) << line;
  const int64_t heads = c.rows_per_query > 1 ? p.nheads_kv : p.nheads_q;
  if (p.packed_q()) {
    EXPECT_GE(c.num_tiles_q, p.total_q * c.rows_per_query / c.tile_q) << line;
    EXPECT_EQ(c.blocks, p.total_q > 0 ? c.num_tiles_q * heads * c.max_splits : 0) << line;
  } else {
    EXPECT_GE(c.num_tiles_q * c.tile_q, p.seqlen_q * c.rows_per_query) << line;
    EXPECT_EQ(c.blocks, c.num_tiles_q * heads * p.batch * c.max_splits) << line;
  }
}

TEST(CudaPlan, EveryForwardProblemHasARowAndItsKernelsAreReachable) {
  const std::vector<std::string> lines = forward_lines();
  ASSERT_GT(lines.size(), 200u);
  for (const Architecture& arch : kArchitectures) {
    const DeviceFacts facts = device_of(arch.name);
    std::set<std::string> reachable;
    for (const KernelVariant& variant : reachable_variants(arch)) reachable.insert(variant.key.expression);
    for (const std::string& line : lines) {
      const AttentionProblem p = problem_of(line);
      using Row = std::pair<Verdict (*)(const AttentionProblem&, const DeviceFacts&),
                            Configurations (*)(const AttentionProblem&, const DeviceFacts&)>;
      int accepting = 0;
      for (const Row& row : {Row{check_attention_decode_sm90, configure_attention_decode_sm90},
                             Row{check_attention_decode_sm80, configure_attention_decode_sm80},
                             Row{check_attention_fwd_sm90, configure_attention_fwd_sm90},
                             Row{check_attention_fwd_sm80, configure_attention_fwd_sm80},
                             Row{check_attention_fwd_portable, configure_attention_fwd_portable}}) {
        if (!row.first(p, facts).accepted) continue;
        ++accepting;
        const Configurations configurations = row.second(p, facts);
        ASSERT_FALSE(configurations.empty()) << line;
        if (!p.batch_invariant) expect_covers(p, configurations.front(), line);
        for (const Configuration& c : configurations) EXPECT_LE(c.variant.shared_bytes, facts.shared_per_block) << line;
        for (const KernelVariant& variant : variants_of(p, configurations))
          EXPECT_TRUE(reachable.contains(variant.key.expression)) << line << ": " << variant.key.expression;
      }
      EXPECT_GT(accepting, 0) << line;
      EXPECT_FALSE(variants_of(p, facts).empty()) << line;
    }
  }
}

std::string chosen(const std::string& line) {
  const AttentionProblem p = problem_of(line + " device=cuda");
  const DeviceFacts facts = h200();
  Configuration best;  // the first of the cheapest, as the planner takes it
  const auto ask = [&](const Verdict& verdict,
                       Configurations (*configure)(const AttentionProblem&, const DeviceFacts&)) {
    if (!verdict.accepted) return;
    Configuration mine = configure(p, facts)[0];
    if (best.kernel.empty() || mine.cost_us < best.cost_us) best = std::move(mine);
  };
  ask(check_attention_decode_sm90(p, facts), configure_attention_decode_sm90);
  ask(check_attention_decode_sm80(p, facts), configure_attention_decode_sm80);
  ask(check_attention_fwd_sm90(p, facts), configure_attention_fwd_sm90);
  ask(check_attention_fwd_sm80(p, facts), configure_attention_fwd_sm80);
  ask(check_attention_fwd_portable(p, facts), configure_attention_fwd_portable);
  return best.kernel;
}

TEST(CudaPlan, Choices) {
  EXPECT_EQ(chosen("attention b=1 hq=32 hkv=8 sq=1 sk=131072 d=128 bf16"),
            "attention_decode_sm90 rows 8 k128 d128/128 split");
  EXPECT_EQ(chosen("attention b=128 hq=32 hkv=32 sq=1 sk=1024 d=128 bf16"),
            "attention_decode_sm90 rows 8 k128 d128/128");
  EXPECT_EQ(chosen("attention b=16 hq=32 hkv=8 sq=1 sk=8192 d=128 bf16"), "attention_decode_sm90 rows 8 k128 d128/128");
  EXPECT_EQ(chosen("attention b=8 hq=16 sq=2048 d=64 bf16"), "attention_fwd_sm90 q256 k64 d64/64");
  EXPECT_EQ(chosen("attention hq=16 sq=128 d=64 bf16 lse"), "attention_fwd_sm90 q64 k128 d64/64");
  EXPECT_EQ(chosen("attention b=256 hq=8 sq=64 d=64 bf16 lse"), "attention_fwd_sm90 q64 k64 d64/64");
  EXPECT_EQ(chosen("attention hq=16 sq=1024 d=64 bf16 lse"), "attention_fwd_sm90 q64 k128 d64/64");
  EXPECT_EQ(chosen("attention hq=16 sq=1024 d=64 bf16 causal lse"), "attention_fwd_sm90 q64 k128 d64/64");
  EXPECT_EQ(chosen("attention hq=16 sq=512 d=64 bf16 lse"), "attention_fwd_sm90 q64 k128 d64/64");
  EXPECT_EQ(chosen("attention b=16 hq=16 sq=1024 d=64 bf16 lse"), "attention_fwd_sm90 q256 k64 d64/64");
  EXPECT_EQ(chosen("attention b=32 hq=32 sq=512 d=64 bf16 causal"), "attention_fwd_sm90 q256 k64 d64/64");
  EXPECT_EQ(chosen("attention b=32 hq=21 sq=512 d=96 bf16"), "attention_fwd_sm90 q128 k128 d96/96");
  EXPECT_EQ(chosen("attention b=8 hq=21 sq=2048 d=96 bf16"), "attention_fwd_sm90 q192 k96 d96/96");
  EXPECT_EQ(chosen("attention b=32 hq=16 sq=512 d=128 bf16 causal"), "attention_fwd_sm90 q192 k64 d128/128");
  EXPECT_EQ(chosen("attention b=32 hq=16 sq=512 d=128 bf16"), "attention_fwd_sm90 q128 k128 d128/128");
  EXPECT_EQ(chosen("attention b=1 hq=8 sq=8192 d=64 bf16"), "attention_fwd_sm90 q256 k64 d64/64");
  // Policies of robots, batch 1.
  EXPECT_EQ(chosen("attention hq=8 hkv=1 sq=51 sk=867 d=256 bf16 lse").substr(0, 18), "attention_fwd_sm90");
  EXPECT_EQ(chosen("attention hq=32 sq=49 sk=1024 d=48 bf16 lse").substr(0, 18), "attention_fwd_sm90");
  EXPECT_EQ(chosen("attention hq=15 hkv=5 sq=50 sk=200 d=64 bf16 lse").substr(0, 18), "attention_fwd_sm90");
  EXPECT_TRUE(chosen("attention hq=32 sq=67 sk=4374 d=64 bf16 lse").ends_with("split"));
  EXPECT_EQ(chosen("attention hq=8 sq=512 sk=51200 d=64 bf16 lse"), "attention_fwd_sm90 q256 k64 d64/64 lengths split");
  EXPECT_EQ(chosen("attention b=16 hq=32 sq=67 sk=4374 d=64 bf16 lse").find("split"), std::string::npos);
  // Few queries of a group share tiles; where they are many each head has its own.
  EXPECT_TRUE(chosen("attention hq=32 hkv=8 sq=16 sk=8192 d=128 causal bf16").ends_with(" lengths shared split"));
  EXPECT_TRUE(
      chosen("attention b=8 hq=32 hkv=8 sq=8 sk=4096 d=128 causal bf16 used_k").ends_with(" lengths shared split"));
  EXPECT_EQ(chosen("attention b=2 hq=32 hkv=8 sq=2048 d=128 causal bf16"), "attention_fwd_sm90 q192 k64 d128/128");
  EXPECT_EQ(chosen("attention hq=16 sq=512 d=128 bf16 causal"), "attention_fwd_sm90 q64 k64 d128/128");
  EXPECT_EQ(chosen("attention hq=32 hkv=8 sq=1 sk=64 d=128 bf16"), "attention_decode_sm90 rows 8 k128 d128/128");
  EXPECT_TRUE(chosen("attention hq=2 sq=64 sk=65536 d=64 bf16").ends_with(" split"));
  EXPECT_TRUE(chosen("attention b=8 hq=16 sq=2048 d=64 f32").starts_with("attention_fwd_portable f32"));
  EXPECT_TRUE(chosen("attention b=8 hq=16 sq=2048 d=60 bf16").starts_with("attention_fwd_portable bf16"));
  EXPECT_TRUE(chosen("attention b=8 hq=16 sq=128 d=300 f16").starts_with("attention_fwd_portable f16"));
}

// Few blocks and many keys: the device is filled, or as good as.
TEST(CudaPlan, SplitsFillTheDevice) {
  const DeviceFacts facts = h200();
  for (const char* line : {"attention b=1 hq=32 hkv=8 sq=1 sk=131072 d=128 bf16 device=cuda",
                           "attention b=16 hq=32 hkv=8 sq=1 sk=8192 d=128 bf16 device=cuda",
                           "attention b=8 hq=64 hkv=8 sq=1 sk=32768 d=128 bf16 device=cuda",
                           "attention b=1 hq=8 sq=1 sk=65536 d=64 f16 device=cuda"}) {
    const Configuration ring = configure_attention_decode_sm90(problem_of(line), facts)[0];
    const double turns = static_cast<double>(ring.blocks) / static_cast<double>(ring.grid);
    EXPECT_GE(static_cast<double>(ring.grid), 0.9 * facts.multiprocessors) << line;
    EXPECT_TRUE(ring.shares || turns / std::ceil(turns) >= 0.8) << line << ": " << ring.blocks;
    const Configuration c = configure_attention_decode_sm80(problem_of(line), facts)[0];
    const double waves = static_cast<double>(c.blocks) * c.variant.threads / (256.0 * facts.multiprocessors);
    EXPECT_GE(waves / std::ceil(waves), 0.8) << line << ": " << c.blocks;
    EXPECT_LE(c.blocks, 8 * facts.multiprocessors) << line;
  }
  const Configuration c =
      configure_attention_fwd_sm80(problem_of("attention b=1 hq=2 sq=64 sk=65536 d=64 bf16 device=cuda"), facts)[0];
  EXPECT_GT(c.max_splits, 16);
}

// Lengths that the device has: equal shares of all keys for all blocks; what the caller says stays.
TEST(CudaPlan, SharesByLengths) {
  const DeviceFacts facts = h200();
  const auto decode = [&](const std::string& line) {
    return configure_attention_decode_sm90(problem_of("attention " + line + " d=128 bf16 device=cuda"), facts)[0];
  };
  for (const char* line : {"b=16 hq=32 hkv=8 sq=1 sk=8192 used_k", "b=1 hq=8 hkv=2 sq=1 sk=2048 used_k",
                           "b=1024 hq=64 hkv=8 sq=1 sk=131072 page=16 used_k",
                           "b=3 hq=32 hkv=8 sq=1 layout_kv=thd lk=7000,100,900", "b=1 hq=32 hkv=8 sq=1 sk=16384"}) {
    const Configuration c = decode(line);
    EXPECT_TRUE(c.shares && c.split) << line;
    EXPECT_EQ(c.split_tiles, 0) << line;
    EXPECT_LE(c.grid, facts.multiprocessors) << line;
  }
  EXPECT_EQ(decode("b=1 hq=8 hkv=2 sq=1 sk=2048 used_k").grid, 2 * 8);   // 256 keys each
  EXPECT_FALSE(decode("b=200 hq=32 hkv=8 sq=1 sk=100 used_k").split);    // a tile of keys each
  EXPECT_FALSE(decode("b=2049 hq=32 hkv=8 sq=1 sk=8192 used_k").split);  // too many to look at first
  const auto planned = [&](const std::string& line) {
    const Configuration c = decode(line);
    return c.split && !c.shares && c.split_tiles > 0;
  };
  EXPECT_TRUE(planned("b=1 hq=32 hkv=8 sq=1 sk=131072"));
  EXPECT_TRUE(planned("b=16 hq=32 hkv=8 sq=1 sk=8192 used_k splits=5"));
  EXPECT_FALSE(decode("b=16 hq=32 hkv=8 sq=1 sk=8192 page=16").split);
}

// Packed keys may be one sequence's: partials for all sequences would need room for as many splits.
TEST(CudaPlan, NoRoomForSplitsThatCannotBe) {
  for (const int batch : {1, 5, 1000, 2049, 20000}) {
    std::string lengths;
    for (int b = 0; b < batch; ++b) lengths += (b > 0 ? "," : "") + std::to_string(900 + b % 200);
    const Configuration c = configure_attention_decode_sm90(
        problem_of("attention b=" + std::to_string(batch) + " hq=32 hkv=8 sq=1 layout_kv=thd lk=" + lengths +
                   " d=128 bf16 device=cuda"),
        h200())[0];
    const int64_t rows = c.shares ? 2 * c.grid * c.tile_q : c.split ? int64_t{batch} * 32 * c.max_splits : 0;
    EXPECT_LE(rows * 129 * 4, 4 << 20) << batch;
    EXPECT_EQ(c.shares, batch <= 2048) << batch;
  }
}

// Where each head of a sequence meets all of its pages.
TEST(CudaPlan, WhoLooksAtPages) {
  const auto finds = [](const std::string& line) {
    const AttentionProblem p = problem_of("attention b=4 hq=16 hkv=8 d=128 bf16 page=16 used_k device=cuda " + line);
    EXPECT_TRUE(check_attention_decode_sm90(p, h200()).accepted) << line;
    return configure_attention_decode_sm90(p, h200())[0].finds_bad_pages;
  };
  EXPECT_TRUE(finds("sq=1 sk=8192"));
  EXPECT_TRUE(finds("sq=4 sk=8192"));
  EXPECT_TRUE(finds("sq=4 sk=8192 causal"));
  EXPECT_TRUE(finds("sq=4 sk=8192 causal used_q"));
  EXPECT_TRUE(finds("sq=1 sk=64"));
  EXPECT_FALSE(finds("sq=4 sk=8192 causal offset=top"));
  EXPECT_FALSE(finds("sq=4 sk=8192 causal offset=7"));
  EXPECT_FALSE(finds("sq=4 sk=8192 window=100,-1"));
  EXPECT_FALSE(finds("sq=4 sk=8192 window=100,0"));
  EXPECT_FALSE(finds("sq=4 sk=8192 chunk=1024"));
  EXPECT_FALSE(finds("layout_q=thd lq=1,2,1,1 sk=8192"));
  EXPECT_FALSE(finds("sq=1 sk=8192 splits=3"));  // combine is not told
}

// As many kv heads side by side as leave few multiprocessors without a block.
TEST(CudaPlan, HeadsTogether) {
  const DeviceFacts facts = h200();
  const auto together = [&](int heads) {
    const Configuration c = configure_attention_decode_sm90(
        problem_of("attention b=4 hq=" + std::to_string(heads) + " sk=8192 used_k sq=1 d=128 bf16 device=cuda"),
        facts)[0];
    EXPECT_TRUE(c.shares) << heads;
    EXPECT_EQ(c.grid % c.heads_together, 0) << heads;
    EXPECT_EQ(heads % c.heads_together, 0) << heads;
    EXPECT_GE(static_cast<double>(c.grid), 0.9 * facts.multiprocessors) << heads;
    return c.heads_together;
  };
  EXPECT_EQ(together(1), 1);
  EXPECT_EQ(together(8), 8);
  EXPECT_EQ(together(32), 32);
  EXPECT_EQ(together(48), 24);
  EXPECT_EQ(together(71), 1);
  EXPECT_EQ(together(128), 128);
  EXPECT_EQ(together(256), 128);
}

// With batch_invariant nothing that cuts a sequence depends on its neighbours.
TEST(CudaPlan, BatchInvariantCuts) {
  const DeviceFacts facts = h200();
  const auto decode = [&](int batch, int keys) {
    return configure_attention_decode_sm80(
        problem_of("attention b=" + std::to_string(batch) + " hq=32 hkv=8 sq=1 sk=" + std::to_string(keys) +
                   " d=128 bf16 used_k batch_invariant device=cuda"),
        facts)[0];
  };
  const Configuration one = decode(1, 100), many = decode(77, 100000);
  EXPECT_EQ(one.variant.key.expression, many.variant.key.expression);
  EXPECT_EQ(one.split_tiles, many.split_tiles);
  EXPECT_TRUE(one.split && many.split);
  const auto forward = [&](int batch, int length) {
    return configure_attention_fwd_sm80(
        problem_of("attention b=" + std::to_string(batch) + " hq=32 hkv=8 sq=" + std::to_string(length) +
                   " d=128 bf16 causal used_q used_k batch_invariant device=cuda"),
        facts);
  };
  // Sequences of few queries are decode's, of whatever capacity the batch is: the same kernels and the same limit.
  const Configurations shared = forward(1, 20), big = forward(64, 9000);
  ASSERT_EQ(shared.size(), 2u);
  ASSERT_EQ(big.size(), 2u);
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(shared[i].variant.key.expression, big[i].variant.key.expression);
    EXPECT_EQ(shared[i].rows_per_query, big[i].rows_per_query);
    EXPECT_EQ(shared[i].min_rows, big[i].min_rows);
    EXPECT_EQ(shared[i].max_rows, big[i].max_rows);
  }
  EXPECT_EQ(shared[1].variant.key.expression, one.variant.key.expression);
  EXPECT_EQ(shared[0].min_rows, shared[1].max_rows + 1);
  EXPECT_LE(big[1].partial_queries, 2);  // partials do not grow with the capacity
  const AttentionProblem packed = problem_of(
      "attention b=9 hq=32 hkv=8 layout_q=thd layout_kv=thd tq=9 tk=900 d=128 bf16 batch_invariant device=cuda");
  EXPECT_FALSE(check_attention_decode_sm80(packed, facts).accepted);
  EXPECT_EQ(configure_attention_fwd_sm80(packed, facts)[1].variant.key.expression, one.variant.key.expression);
}

TEST(CudaPlan, WhatIsDeclinedIsDeclinedWithASentence) {
  const DeviceFacts facts = h200();
  const auto reason = [&](const std::string& line) { return check_attention_fwd_sm80(problem_of(line), facts).reason; };
  EXPECT_NE(reason("attention sq=8 d=64 bf16").find("device=cuda"), std::string::npos);
  EXPECT_NE(reason("attention sq=8 d=64 device=cuda").find("not f32"), std::string::npos);
  EXPECT_NE(reason("attention sq=8 d=512 bf16 device=cuda").find("up to 256, not 512 and 512"), std::string::npos);
  EXPECT_NE(reason("attention sq=8 d=60 bf16 device=cuda").find("multiples of 8"), std::string::npos);
  EXPECT_NE(reason("attention sq=8 d=64 bf16 pass=bwd device=cuda").find("forward pass only"), std::string::npos);
  EXPECT_NE(reason("attention sq=8 sk=3000000000 d=64 bf16 device=cuda").find("not 3000000000"), std::string::npos);
  DeviceFacts old = facts;
  old.major = 7;
  EXPECT_NE(check_attention_fwd_portable(problem_of("attention sq=8 d=64 device=cuda"), old).reason.find("8.0"),
            std::string::npos);
}

TEST(CudaPlan, HopperForward) {
  const DeviceFacts facts = h200();
  const auto verdict = [&](const std::string& line) {
    return check_attention_fwd_sm90(problem_of("attention " + line + " device=cuda"), facts);
  };
  for (const char* line :
       {"sq=700 d=64 bf16", "sq=700 d=128 f16 causal lse", "sq=70 sk=900 d=72 bf16 window=33,2 sinks",
        "b=3 hq=8 hkv=2 sq=700 d=192 dv=128 bf16 causal offset=top", "sq=1 d=256 f16 offset=-5 causal",
        "sq=700 d=64 bf16 used_k used_q", "b=3 sq=700 d=64 bf16 chunk=100", "b=3 d=128 bf16 layout_q=thd tq=70 sk=90",
        "b=3 d=128 bf16 layout_q=thd layout_kv=thd tq=70 tk=90 causal",
        "b=3 sq=5 d=64 f16 used_k leftpad cache_batch=7", "sq=700 d=64 bf16 softcap alibi",
        "sq=700 d=128 f16 bias=f32:ij mask=bhij dropout causal", "b=3 sq=70 sk=704 d=128 bf16 page=16 used_k causal",
        "b=3 sq=70 sk=720 d=64 bf16 page=24 cache_batch=5 softcap", "sq=700 d=64 bf16 out=f32", "sq=0 d=64 bf16",
        "b=2 d=64 bf16 layout_q=thd layout_kv=thd tq=0 tk=9", "b=2 d=64 bf16 layout_q=thd layout_kv=thd tq=9 tk=0",
        "sq=700 d=64 bf16 batch_invariant"})
    EXPECT_TRUE(verdict(line).accepted) << line << ": " << verdict(line).reason;
  const std::pair<const char*, const char*> declined[] = {
      {"sq=700 d=64", "not f32"},
      {"sq=700 d=60 bf16", "multiples of 8"},
      {"sq=700 d=264 bf16", "up to 256"},
      {"sq=704 d=64 bf16 page=4 used_k", "pages"},
      {"sq=704 d=64 bf16 page=16 used_k leftpad", "left padding in pages"},
      {"sq=700 d=64 bf16 align.q=8", "16 bytes"},
      {"sq=9 sk=2000000000 d=64 bf16", "1073740800"},
      {"b=2 sq=9 d=64 bf16 strides.k=300000000000,64,64", "strides"}};
  for (const auto& [line, part] : declined) {
    EXPECT_FALSE(verdict(line).accepted) << line;
    EXPECT_NE(verdict(line).reason.find(part), std::string::npos) << line << ": " << verdict(line).reason;
  }
  for (const char* other : {"sm_80", "sm_89", "sm_100", "sm_120"})
    EXPECT_FALSE(
        check_attention_fwd_sm90(problem_of("attention sq=700 d=64 bf16 device=cuda"), device_of(other)).accepted);
  // Few rows: small tiles, two a multiprocessor; many: as many blocks as fit, those under causal masks from a counter.
  const auto planned = [&](const std::string& line) {
    return configure_attention_fwd_sm90(problem_of("attention " + line + " device=cuda"), facts)[0];
  };
  const Configuration few = planned("hq=16 sq=1024 d=64 bf16"), many = planned("b=16 hq=32 sq=1024 d=64 bf16 causal");
  EXPECT_EQ(few.tile_q, 64);
  EXPECT_EQ(few.grid, few.blocks);
  EXPECT_FALSE(few.counts_tiles);
  EXPECT_EQ(many.tile_q, 256);
  EXPECT_EQ(many.grid, facts.multiprocessors);
  EXPECT_TRUE(many.counts_tiles);
  EXPECT_GE(many.section_heads * many.num_tiles_q, 2 * many.grid);
  // Sections of heads: as many as fit the L2 cache; of long sequences eight at least, all of one size.
  EXPECT_EQ(planned("b=32 hq=8 sq=512 d=256 bf16 causal").section_heads, facts.l2_bytes * 3 / 4 / (512 * 512 * 2));
  EXPECT_EQ(planned("hq=16 sq=16384 d=256 bf16 causal").section_heads, 8);
  EXPECT_EQ(planned("b=3 hq=5 sq=16384 d=256 bf16 causal").section_heads, 15);
  EXPECT_EQ(planned("hq=3 sq=65536 d=256 bf16 causal").section_heads, 3);
  EXPECT_FALSE(planned("b=16 hq=16 sq=1024 d=128 bf16").counts_tiles);
  // Packed: a tile of each sequence more than its rows fill, from a counter whatever the mask.
  const Configuration packed = planned("b=16 hq=16 d=128 bf16 layout_q=thd layout_kv=thd tq=16384 tk=16384");
  EXPECT_EQ(packed.num_tiles_q, 16384 / packed.tile_q + 16);
  EXPECT_EQ(packed.blocks, packed.num_tiles_q * 16);
  EXPECT_TRUE(packed.counts_tiles);
  EXPECT_TRUE(packed.kernel.ends_with(" lengths"));
  EXPECT_TRUE(planned("b=16 hq=16 sq=1024 d=128 bf16 softcap").kernel.ends_with(" softcap"));
  EXPECT_TRUE(planned("b=16 hq=16 sq=1024 d=128 bf16 softcap mask=ij").kernel.ends_with(" terms"));
  EXPECT_TRUE(planned("b=16 hq=16 sq=1024 d=64 bf16 softcap").kernel.ends_with(" terms"));
  // A mask tensor becomes bits: whole tiles of them a row, one row where it is broadcast over queries.
  MaskBits bits;
  const AttentionProblem masked = problem_of("attention b=4 hq=16 sq=1000 sk=690 d=128 bf16 mask=bj device=cuda");
  ASSERT_TRUE(mask_bits(masked, 64, bits));
  EXPECT_EQ(std::vector<int64_t>({bits.sequences, bits.heads, bits.rows, bits.keys, bits.words, bits.words_of_tile}),
            std::vector<int64_t>({4, 1, 1, 690, 22, 2}));
  EXPECT_TRUE(configure_attention_fwd_sm90(masked, facts)[0].packs_mask);
  // batch_invariant: the same kernel whatever the batch, and decode for the sequences that have few queries.
  const auto invariant = [&](const std::string& line) {
    return configure_attention_fwd_sm90(problem_of("attention " + line + " bf16 batch_invariant device=cuda"), facts);
  };
  for (const char* line : {"hq=16 sq=64 sk=4096 d=128", "b=64 hq=16 sq=2048 d=128",
                           "b=9 hq=16 d=128 layout_q=thd layout_kv=thd tq=9000 tk=9000"}) {
    const Configurations both = invariant(line);
    ASSERT_EQ(both.size(), 2u) << line;
    EXPECT_EQ(both[0].variant.key.expression, invariant("hq=16 sq=512 d=128")[0].variant.key.expression) << line;
    EXPECT_EQ(both[0].min_rows, both[1].max_rows + 1) << line;
    EXPECT_EQ(both[0].max_splits, 1) << line;
  }
}

TEST(CudaPlan, TypicalDevices) {
  for (const Architecture& arch : kArchitectures) {
    const Result<DeviceFacts> facts = typical_device(arch.name);
    ASSERT_TRUE(facts.ok());
    EXPECT_EQ(architecture(facts.value().major, facts.value().minor), arch.name);
    EXPECT_EQ(facts.value().shared_per_block, arch.shared_limit);
  }
  EXPECT_FALSE(typical_device("sm_75").ok());
}

}  // namespace
}  // namespace heed::cuda
