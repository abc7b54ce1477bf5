// A small attention problem for the emulated kernel: its inputs, the kernel's parameters, and every row of the result
// against plain arithmetic in double precision. The build puts the kernel's files beside stand-ins for ptx.cuh and
// mma_sm90.cuh.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "base/philox.h"
#include "cuda_emulated.h"

namespace heed::cuda {
inline unsigned char smem[256 << 10];  // what pointers mean; addresses mean emulated::shared
}

#include "attention_fwd_sm90.cu"

namespace heed::cuda {

// Tiles that several of these tests run, and what is added to them.
constexpr AttentionFwdSm90Variant
    kTile64 = {.is_bf16 = 1, .consumers = 4, .tile_k = 64, .stages = 4},
    kTile128Low = {.head_dim = 128, .head_dim_v = 128, .consumers = 1, .tile_k = 64, .q_in_registers = 1, .blocks = 2},
    kTile256 = {.is_bf16 = 1, .head_dim = 256, .head_dim_v = 256, .tile_k = 64, .rings = 2};
constexpr AttentionFwdSm90Variant with_ranges(AttentionFwdSm90Variant v) {
  v.mask = kMaskRange, v.has_lower_end = 1;
  return v;
}
constexpr AttentionFwdSm90Variant with_lengths(AttentionFwdSm90Variant v) {
  v = with_ranges(v), v.lengths = 1;
  return v;
}
constexpr AttentionFwdSm90Variant with_terms(AttentionFwdSm90Variant v) {
  v = with_lengths(v), v.terms = 1;
  return v;
}
constexpr AttentionFwdSm90Variant with_softcap(AttentionFwdSm90Variant v) {
  v = with_lengths(v), v.softcap = 1;
  return v;
}

constexpr AttentionFwdSm90Variant with_split(AttentionFwdSm90Variant v) {
  v = with_ranges(v), v.has_lower_end = 0, v.split = 1;
  return v;
}

constexpr int kUnbounded = -1;
constexpr int kBottomRight = std::numeric_limits<int>::max();  // the default: the last row sees the last key

struct Case {
  int batch = 1, nheads_q = 1, nheads_kv = 1, seqlen_q = 0, seqlen_k = 0, head_dim, head_dim_v;
  int left = kUnbounded, right = kUnbounded;
  int offset = kBottomRight;
  float scale = 0.125f, times = 1.0f;  // of q
  bool sinks = false, counts_tiles = false;
  bool hidden_nan = false;  // in what no row sees: values, and whatever lies outside the sequences
  // Lengths from the device. Packed: the rows of the sequences one after the other, `gap` rows behind them.
  bool packed_q = false, packed_k = false;
  std::vector<int> rows_q = {}, rows_k = {};  // packed: rows of each sequence
  std::vector<int> used_q = {}, used_k = {};  // seqused
  std::vector<int> leftpad = {}, cache_rows = {};
  std::vector<int> bad = {};  // sequences whose status is not 0
  int wrong_cu = 0;  // > 0: this entry of cu_seqlens_q lies outside; all rows have been cleared, here left alone
  int gap = 0, chunk = 0, min_rows = 0;
  int splits = 0;                   // more than 0: partials, merged
  bool shares = false;              // heads of a group share tiles
  int page_size = 0;                // k and v in pages of shuffled places
  std::vector<int> bad_pages = {};  // sequences one of whose pages lies outside; no status tells the kernel
  // Terms of the score. Bias and mask: [sequence, head, row, key], a broadcast dimension has stride 0.
  float softcap = 0, dropout = 0;
  int dropout_base = 0;  // index_base of keys
  bool alibi = false, bias = false, bias_is_f32 = false, mask = false;
  bool by_sequence = true, by_head = true, by_row = true;  // of bias and mask
  int key_stride = 1;                                      // of bias and mask
  float bias_times = 1.0f;
  bool out_is_f32 = false;
};

class Problem {
 public:
  Problem(const Case& c, bool is_bf16, unsigned seed) : c_(c), is_bf16_(is_bf16), random_(seed) {
    int total_q = 0, total_k = 0;
    const auto of = [](const std::vector<int>& x, int b, int otherwise) { return x.empty() ? otherwise : x[b]; };
    for (int b = 0; b < c.batch; ++b) {
      Sequence s;
      s.q_begin = c.packed_q ? total_q : 0, s.q_rows = c.packed_q ? c.rows_q[b] : c.seqlen_q;
      s.q_len = of(c.used_q, b, s.q_rows);
      s.k_row = c.packed_k ? 0 : of(c.cache_rows, b, b);
      s.k_begin = (c.packed_k ? total_k : 0) + of(c.leftpad, b, 0);
      s.k_len = of(c.used_k, b, c.packed_k ? c.rows_k[b] : c.seqlen_k) - of(c.leftpad, b, 0);
      cu_q.push_back(total_q), cu_k.push_back(total_k);
      total_q += s.q_rows, total_k += c.packed_k ? c.rows_k[b] : 0;
      s.is_bad = std::find(c.bad.begin(), c.bad.end(), b) != c.bad.end();
      if (s.is_bad) s.q_len = s.k_len = 0;
      s.offset = c.offset == kBottomRight ? s.k_len - s.q_len : c.offset;
      s.is_mine = s.q_len * (c.nheads_q / c.nheads_kv) >= c.min_rows;
      status.push_back(s.is_bad), sequences.push_back(s);
    }
    cu_q.push_back(total_q), cu_k.push_back(total_k), status.push_back(c.wrong_cu > 0);
    if (c.wrong_cu > 0) cu_q[c.wrong_cu] = 1 << 20;
    q_batch = c.packed_q ? 1 : c.batch, q_rows = c.packed_q ? total_q + c.gap : c.seqlen_q;
    k_rows = c.packed_k ? total_k + c.gap : c.seqlen_k;
    k_batch = c.packed_k             ? 1
              : c.cache_rows.empty() ? c.batch
                                     : 1 + *std::max_element(c.cache_rows.begin(), c.cache_rows.end());
    if (c.page_size > 0) make_pages();
    for (const int b : c.bad_pages) {
      Sequence& s = sequences[b];
      const int pages = (s.k_len + c.page_size - 1) / c.page_size;
      page_table[s.k_row * pages_each + random_() % pages] =
          random_() % 2 == 0 ? -1 - static_cast<int>(random_() % 100) : k_batch;
      s.q_len = s.k_len = 0;
    }
    q = tensor(q_batch, q_rows, c.nheads_q, c.head_dim, c.times);
    k = tensor(k_batch, k_rows, c.nheads_kv, c.head_dim, 1.0f);
    v = tensor(k_batch, k_rows, c.nheads_kv, c.head_dim_v, 1.0f);
    out.assign(size_t(q_batch) * q_rows * c.nheads_q * c.head_dim_v, kUntouched);
    if (c.out_is_f32) out_f32.assign(out.size(), std::nanf(""));
    lse.assign(size_t(q_batch) * q_rows * c.nheads_q, std::nanf(""));
    for (int h = 0; h < c.nheads_q; ++h) sinks.push_back(normal_(random_));
    make_terms();
    if (c.hidden_nan) poison();
  }

  // All that the kernel reads but tensor maps and what depends on the tile.
  AttentionFwdSm90Params params() {
    constexpr int kFar = 1 << 30;
    AttentionFwdSm90Params a = {};
    AttentionFwdParams& p = a.common;
    p.q = q.data(), p.k = k.data(), p.v = v.data(), p.out = out.data(), p.lse = lse.data();
    if (c_.out_is_f32) p.out = out_f32.data(), p.out_is_f32 = 1;
    p.sinks = c_.sinks ? sinks.data() : nullptr;
    p.q_stride = strides(q_rows, c_.nheads_q, c_.head_dim, c_.packed_q);
    p.k_stride = strides(k_rows, c_.nheads_kv, c_.head_dim, c_.packed_k);
    p.v_stride = strides(k_rows, c_.nheads_kv, c_.head_dim_v, c_.packed_k);
    p.out_stride = strides(q_rows, c_.nheads_q, c_.head_dim_v, c_.packed_q);
    p.lse_stride = {c_.packed_q ? 0 : i64{c_.nheads_q} * q_rows, q_rows, 1};
    p.batch = c_.batch, p.seqlen_q = c_.seqlen_q, p.seqlen_k = c_.seqlen_k, p.total_q = q_rows, p.total_k = k_rows;
    p.nheads_q = c_.nheads_q, p.nheads_kv = c_.nheads_kv, p.gqa_ratio = c_.nheads_q / c_.nheads_kv;
    p.rows_per_query = c_.shares ? p.gqa_ratio : 1, p.head_dim = c_.head_dim, p.head_dim_v = c_.head_dim_v;
    p.window_left = c_.left, p.window_right = c_.right;
    p.offset_kind = c_.offset == kBottomRight ? 0 : 2, p.q_offset = c_.offset == kBottomRight ? 0 : c_.offset;
    p.softmax_scale_log2 = c_.scale * 1.44269504f, p.dropout_scale = 1.0f;
    p.longest_first = c_.right >= 0 && c_.left < 0;
    p.heads_per_section = std::max(1, c_.nheads_q * c_.batch * 2 / 3);
    p.cu_seqlens_q = c_.packed_q ? cu_q.data() : nullptr;
    p.cu_seqlens_k = c_.packed_k ? cu_k.data() : nullptr;
    p.seqused_q = c_.used_q.empty() ? nullptr : c_.used_q.data();
    p.seqused_k = c_.used_k.empty() ? nullptr : c_.used_k.data();
    p.leftpad_k = c_.leftpad.empty() ? nullptr : c_.leftpad.data();
    p.cache_batch_idx = c_.cache_rows.empty() ? nullptr : c_.cache_rows.data();
    p.cache_rows = k_batch, p.chunk = c_.chunk, p.min_rows = c_.min_rows;
    p.sequence_status =
        c_.packed_q || (c_.page_size > 0 && c_.bad_pages.empty()) || !c_.bad.empty() ? status.data() : nullptr;
    p.page_table = c_.page_size > 0 ? page_table.data() : nullptr;
    p.page_size = c_.page_size, p.num_pages = k_batch, p.page_table_step = 1, p.page_table_stride = pages_each;
    p.softcap = c_.softcap;
    p.alibi_slopes = c_.alibi ? slopes.data() : nullptr;
    p.bias = !c_.bias ? nullptr : c_.bias_is_f32 ? static_cast<const void*>(bias.data()) : bias16.data();
    p.bias_is_f32 = c_.bias_is_f32, p.bias_stride = p.mask_stride = term_stride;
    p.mask = c_.mask ? mask.data() : nullptr;
    a.bias_in_pairs = c_.key_stride == 1 && term_stride.i % 2 == 0;
    if (c_.softcap > 0) set_softcap(a);
    p.dropout_on = c_.dropout > 0, p.dropout_threshold = dropout_threshold(c_.dropout);
    p.dropout_seed = kSeed, p.dropout_offset = kOffset, p.index_base[3] = c_.dropout_base;
    if (c_.dropout > 0) p.dropout_scale = 1.0f / (1.0f - c_.dropout);
    const int offset = c_.offset == kBottomRight ? c_.seqlen_k - c_.seqlen_q : c_.offset;  // where there are no lengths
    a.offset = offset, a.chunk = c_.chunk;
    a.lengths_known = !c_.packed_q && !c_.packed_k && c_.used_q.empty() && c_.used_k.empty() && c_.leftpad.empty() &&
                      c_.cache_rows.empty() && c_.page_size == 0 && c_.min_rows == 0;
    set_sharing(a);
    a.lo_shift = c_.left >= 0 ? offset - c_.left : -kFar;
    a.hi_shift = c_.right >= 0 ? offset + c_.right + 1 : kFar;
    return a;
  }

  // The mask as pack_mask leaves it.
  void pack_mask(AttentionFwdSm90Params& a, int tile_k) {
    if (!c_.mask) return;
    const int words = (mask_keys + tile_k - 1) / tile_k * (tile_k / 32);
    const int sequences = c_.by_sequence ? c_.batch : 1, heads = c_.by_head ? c_.nheads_q : 1,
              rows = c_.by_row ? mask_rows : 1;
    mask_bits.assign(size_t(sequences) * heads * rows * words, 0);
    for (int b = 0; b < sequences; ++b)
      for (int h = 0; h < heads; ++h)
        for (int i = 0; i < rows; ++i)
          for (int j = 0; j < mask_keys; ++j)
            mask_bits[((size_t(b) * heads + h) * rows + i) * words + j / 32] |= u32{mask[term_at(b, h, i, j)] != 0}
                                                                                << j % 32;
    a.mask_bits = mask_bits.data(), a.mask_bits_tile = tile_k / 32;
    a.mask_bits_i = c_.by_row ? words : 0;
    a.mask_bits_h = c_.by_head ? i64{rows} * words : 0;
    a.mask_bits_b = c_.by_sequence ? i64{heads} * rows * words : 0;
  }

  // O and lse from partials [row, head, split], in order.
  void merge(const std::vector<float>& partial_out, const std::vector<float>& partial_lse, int splits) {
    const double kInf = std::numeric_limits<double>::infinity();
    for (int b = 0; b < c_.batch; ++b)
      for (int i = 0; i < sequences[b].q_rows; ++i)
        for (int h = 0; h < c_.nheads_q; ++h) {
          const size_t at = (c_.packed_q ? 0 : size_t(b) * q_rows) + sequences[b].q_begin + i;
          const size_t row = at * c_.nheads_q + h, first = row * splits;
          u32 bits;
          std::memcpy(&bits, &partial_lse[first], 4);
          if ((bits == kPaddingLse) != (i >= sequences[b].q_len)) continue;  // neither is right
          const bool is_padding = i >= sequences[b].q_len;
          double top = c_.sinks && !is_padding ? sinks[h] : -kInf, sum = 0;
          for (int s = 0; s < splits && !is_padding; ++s) top = std::max(top, double{partial_lse[first + s]});
          std::vector<double> o(c_.head_dim_v, 0.0);
          for (int s = 0; s < splits && !std::isinf(top); ++s) {
            if (std::isinf(partial_lse[first + s])) continue;  // nor is its out read
            const double weight = std::exp(partial_lse[first + s] - top);
            sum += weight;
            for (int d = 0; d < c_.head_dim_v; ++d) o[d] += weight * partial_out[(first + s) * c_.head_dim_v + d];
          }
          if (c_.sinks && !is_padding) sum += std::exp(sinks[h] - top);
          lse[c_.packed_q ? size_t(h) * q_rows + at : (size_t(b) * c_.nheads_q + h) * q_rows + i] =
              static_cast<float>(sum == 0 ? -kInf : top + std::log(sum));
          for (int d = 0; d < c_.head_dim_v; ++d) {
            const float x = static_cast<float>(sum == 0 ? 0 : o[d] / sum);
            out[row * c_.head_dim_v + d] = is_bf16_ ? to_bf16(x).bits : to_f16(x).bits;
          }
        }
  }

  // Every row against double precision, and that no other was touched; "" or the first that is wrong.
  std::string judge() const {
    std::vector<char> owned(size_t(q_batch) * q_rows, 0);
    for (int b = 0; b < c_.batch; ++b)
      for (int i = 0; i < sequences[b].q_rows; ++i) {
        const bool is_written =
            c_.wrong_cu > 0 ? !sequences[b].is_bad : sequences[b].is_mine || i >= sequences[b].q_len;
        owned[(c_.packed_q ? 0 : size_t(b) * q_rows) + sequences[b].q_begin + i] = is_written;
        for (int h = 0; h < c_.nheads_q && is_written; ++h)
          if (const std::string wrong = judge_row(b, h, i); !wrong.empty()) return wrong;
      }
    const size_t row_size = size_t(c_.nheads_q) * c_.head_dim_v;
    for (size_t row = 0; row < owned.size(); ++row)
      for (size_t x = 0; x < row_size && !owned[row]; ++x)
        if (out[row * row_size + x] != kUntouched) return "row " + std::to_string(row) + " is no sequence's";
    return {};
  }

  struct Sequence {
    int q_begin, q_rows, q_len, k_row, k_begin, k_len, offset;
    bool is_bad, is_mine;
  };
  std::vector<Sequence> sequences;
  int q_batch, q_rows, k_batch, k_rows;
  std::vector<uint16_t> q, k, v, out;
  std::vector<float> out_f32;
  std::vector<float> lse, sinks;
  std::vector<int> cu_q, cu_k, status, page_table;
  int pages_each = 0;
  std::vector<float> slopes, bias;
  std::vector<uint16_t> bias16;
  std::vector<unsigned char> mask;
  std::vector<u32> mask_bits;
  int mask_rows = 1, mask_keys = 1;
  Strides4 term_stride = {};

 private:
  static constexpr uint64_t kSeed = 0x123456789abcdef0ull, kOffset = 0x0fedcba987654321ull;
  static constexpr uint16_t kUntouched = 0x7fff;  // NaN in either type

  bool sees(const Sequence& s, int i, int j) const {
    const int at = i + s.offset;
    if ((c_.left >= 0 && j < at - c_.left) || (c_.right >= 0 && j > at + c_.right)) return false;
    const auto floor_of = [&](int x) { return x >= 0 ? x / c_.chunk : -((c_.chunk - 1 - x) / c_.chunk); };
    return c_.chunk == 0 || floor_of(at) == floor_of(j);
  }

  void make_terms() {
    int &rows = mask_rows, &keys = mask_keys;
    for (const Sequence& s : sequences) rows = std::max(rows, s.q_len), keys = std::max(keys, s.k_len);
    const i64 of_row = c_.by_row ? i64{keys} * c_.key_stride : 0;
    term_stride = {c_.by_sequence ? i64{c_.nheads_q} * rows * keys * c_.key_stride : 0,
                   c_.by_head ? i64{rows} * keys * c_.key_stride : 0, of_row, c_.key_stride};
    for (int h = 0; h < c_.nheads_q; ++h) slopes.push_back(0.3f / (1 + h));
    // Exactly as large as it must be: a read behind the last key is one behind the end.
    const size_t size =
        size_t((c_.batch - 1) * term_stride.b + (c_.nheads_q - 1) * term_stride.h + (rows - 1) * of_row) +
        size_t(keys - 1) * c_.key_stride + 1;
    for (size_t i = 0; i < size && (c_.bias || c_.mask); ++i) {
      const float x = normal_(random_) * c_.bias_times;
      bias16.push_back(is_bf16_ ? to_bf16(x).bits : to_f16(x).bits);
      bias.push_back(c_.bias_is_f32 ? x : number(bias16.back()));
      mask.push_back(random_() % 3 != 0);
    }
  }
  i64 term_at(int b, int h, int i, int j) const {
    return b * term_stride.b + h * term_stride.h + i * term_stride.i + j * term_stride.j;
  }
  bool keeps(int b, int h, int i, int j) const {
    const auto column = static_cast<uint64_t>(j + c_.dropout_base);
    const auto words = philox4x32_10(
        {static_cast<uint32_t>(column / 4), static_cast<uint32_t>(i), static_cast<uint32_t>(b * c_.nheads_q + h),
         static_cast<uint32_t>(kOffset)},
        {static_cast<uint32_t>(kSeed), static_cast<uint32_t>(kSeed >> 32) ^ static_cast<uint32_t>(kOffset >> 32)});
    return words[column % 4] < dropout_threshold(c_.dropout);
  }

  // What would be the rows of a cache becomes its table of pages; entries past a sequence's end point nowhere.
  void make_pages() {
    const int rows = k_batch;
    pages_each = (c_.seqlen_k + c_.page_size - 1) / c_.page_size;
    k_batch = rows * pages_each + 1, k_rows = c_.page_size;
    for (int page = 1; page < k_batch; ++page) page_table.push_back(page);
    std::shuffle(page_table.begin(), page_table.end(), random_);
    for (int row = 0; row < rows; ++row) {
      int keys = 0;
      for (const Sequence& s : sequences)
        if (s.k_row == row) keys = std::max(keys, s.k_len);
      for (int page = (keys + c_.page_size - 1) / c_.page_size; page < pages_each; ++page)
        page_table[row * pages_each + page] = 1 << 20;
    }
  }
  // Row of k and v that holds key j.
  size_t key_row(const Sequence& s, int j) const {
    if (c_.page_size == 0) return size_t(s.k_row) * k_rows + s.k_begin + j;
    return size_t(page_table[s.k_row * pages_each + j / c_.page_size]) * c_.page_size + j % c_.page_size;
  }

  // NaN in rows of V that nobody sees, in rows of K that lie in no sequence and in queries that do not count.
  void poison() {
    std::vector<char> seen(size_t(k_batch) * k_rows, 0), inside(seen), counts(size_t(q_batch) * q_rows, 0);
    for (int b = 0; b < c_.batch; ++b) {
      const Sequence& s = sequences[b];
      for (int i = 0; i < s.q_len; ++i) counts[(c_.packed_q ? 0 : size_t(b) * q_rows) + s.q_begin + i] = 1;
      for (int j = 0; j < s.k_len; ++j) {
        const size_t row = key_row(s, j);
        inside[row] = 1;
        for (int i = 0; i < s.q_len; ++i) seen[row] = seen[row] || sees(s, i, j);
      }
    }
    const auto fill = [](std::vector<uint16_t>& t, const std::vector<char>& spared) {
      const size_t row_size = t.size() / spared.size();
      for (size_t row = 0; row < spared.size(); ++row)
        if (!spared[row]) std::fill_n(t.begin() + row * row_size, row_size, kUntouched);
    };
    fill(v, seen), fill(k, inside), fill(q, counts);
  }

  std::vector<uint16_t> tensor(int batch, int rows, int heads, int columns, float times) {
    std::vector<uint16_t> t(size_t(batch) * rows * heads * columns);
    for (uint16_t& x : t) {
      const float value = normal_(random_) * times;
      x = is_bf16_ ? to_bf16(value).bits : to_f16(value).bits;
    }
    return t;
  }
  static Strides3 strides(i64 rows, i64 heads, i64 columns, bool packed) {
    return {packed ? 0 : rows * heads * columns, columns, heads * columns};
  }
  float number(uint16_t bits) const { return is_bf16_ ? to_float(Bf16{bits}) : to_float(F16{bits}); }

  std::string judge_row(int b, int h, int i) const {
    const double of_p = c_.out_is_f32 ? 1e-4 : is_bf16_ ? 1.6e-2 : 2e-3;  // rounding of P and of O
    std::vector<double> want(c_.head_dim_v);
    const bool is_padding = i >= sequences[b].q_len;
    const double want_lse = is_padding ? -std::numeric_limits<double>::infinity() : row(b, h, i, want);
    const std::string where =
        " of sequence " + std::to_string(b) + ", row " + std::to_string(i) + ", head " + std::to_string(h);
    const size_t at = (c_.packed_q ? 0 : size_t(b) * q_rows) + sequences[b].q_begin + i;
    const float got = lse[c_.packed_q ? size_t(h) * q_rows + at : (size_t(b) * c_.nheads_q + h) * q_rows + i];
    const double bound = 1e-4 + 1e-5 * std::fabs(want_lse);
    if (std::isinf(want_lse) ? got != want_lse : !(std::fabs(got - want_lse) <= bound))
      return "lse " + std::to_string(got) + where + ", want " + std::to_string(want_lse);
    for (int d = 0; d < c_.head_dim_v; ++d) {
      const size_t place = (at * c_.nheads_q + h) * c_.head_dim_v + d;
      const float x = c_.out_is_f32 ? out_f32[place] : number(out[place]);
      if (!(std::fabs(x - want[d]) <= (is_padding ? 0 : of_p * (1 + std::fabs(want[d])))))
        return "out " + std::to_string(x) + where + ", want " + std::to_string(want[d]);
    }
    return {};
  }

  double row(int b, int h, int i, std::vector<double>& o) const {
    const Sequence& s = sequences[b];
    const int h_kv = h / (c_.nheads_q / c_.nheads_kv);
    const size_t q_at = (c_.packed_q ? 0 : size_t(b) * q_rows) + s.q_begin + i;
    std::vector<double> score(s.k_len, -std::numeric_limits<double>::infinity());
    double top = c_.sinks ? sinks[h] : -std::numeric_limits<double>::infinity(), sum = 0;
    for (int j = 0; j < s.k_len; ++j) {
      if (!sees(s, i, j) || (c_.mask && mask[term_at(b, h, i, j)] == 0)) continue;
      double dot = 0;
      for (int d = 0; d < c_.head_dim; ++d)
        dot += double{number(q[(q_at * c_.nheads_q + h) * c_.head_dim + d])} *
               number(k[(key_row(s, j) * c_.nheads_kv + h_kv) * c_.head_dim + d]);
      score[j] = dot * c_.scale;
      if (c_.softcap > 0) score[j] = c_.softcap * std::tanh(score[j] / c_.softcap);
      if (c_.bias) score[j] += bias[term_at(b, h, i, j)];
      if (c_.alibi) score[j] -= slopes[h] * std::abs(i + s.offset - j);
      top = std::max(top, score[j]);
    }
    if (std::isinf(top)) return top;
    for (int j = 0; j < s.k_len; ++j) {
      if (std::isinf(score[j])) continue;
      const double p = std::exp(score[j] - top);
      sum += p;
      if (c_.dropout > 0 && !keeps(b, h, i, j)) continue;
      for (int d = 0; d < c_.head_dim_v; ++d)
        o[d] += p / (1.0 - c_.dropout) * number(v[(key_row(s, j) * c_.nheads_kv + h_kv) * c_.head_dim_v + d]);
    }
    if (c_.sinks) sum += std::exp(sinks[h] - top);
    for (double& x : o) x /= sum;
    return top + std::log(sum);
  }

  const Case c_;
  const bool is_bf16_;
  std::mt19937 random_;
  std::normal_distribution<float> normal_;
};

// As mma_sm90.cuh of this folder reads it.
inline void map_tensor(TensorMap& map, void* data, i64 columns, i64 rows, i64 heads, i64 sequences,
                       const Strides3& stride, int box_rows, int box_heads = 1) {
  const bool shares = box_heads > 1;  // heads come before rows
  const i64 words[] = {reinterpret_cast<i64>(data),
                       columns,
                       shares ? heads : rows,
                       shares ? rows : heads,
                       sequences,
                       (shares ? stride.h : stride.s) * 2,
                       (shares ? stride.s : stride.h) * 2,
                       stride.b * 2,
                       i64{shares ? box_heads : box_rows},
                       i64{shares ? box_rows : 1}};
  std::copy(std::begin(words), std::end(words), map.opaque);
}

// Runs every block of the grid, one after the other: "" or what is wrong.
template <AttentionFwdSm90Variant kV>
std::string failure_of(const Case& c, unsigned seed) {
  Problem problem(c, kV.is_bf16 != 0, seed);
  AttentionFwdSm90Params a = problem.params();
  problem.pack_mask(a, kV.tile_k);
  AttentionFwdParams& p = a.common;
  const int rows = kV.consumers * a.queries_each;
  p.num_tiles_q = c.packed_q ? problem.q_rows / rows + c.batch : (c.seqlen_q + rows - 1) / rows;
  p.max_splits = std::max(1, c.splits);
  p.split_tiles = (std::max(c.seqlen_k, problem.k_rows) + kV.tile_k - 1) / kV.tile_k / p.max_splits + 1;
  a.num_work_tiles = static_cast<i32>(p.num_tiles_q * (c.nheads_q / p.rows_per_query) * problem.q_batch * p.max_splits);
  std::vector<float> partial_lse(c.splits > 0 ? problem.lse.size() * p.max_splits : 0, std::nanf(""));
  std::vector<float> partial_out(partial_lse.size() * c.head_dim_v, std::nanf(""));
  if (c.splits > 0) p.partial_out = partial_out.data(), p.partial_lse = partial_lse.data();
  u64 counter = 0x0123456789abcdefull;
  if (c.counts_tiles) a.next_tile = &counter, a.mark = 0x5a5a5a5a5aull << kTileBits;
  const int q_batch = problem.q_batch, q_rows = problem.q_rows, k_batch = problem.k_batch, k_rows = problem.k_rows;
  map_tensor(a.q_map, problem.q.data(), c.head_dim, q_rows, c.nheads_q, q_batch, p.q_stride, a.queries_each,
             p.rows_per_query);
  a.page_box = c.page_size > 0 ? std::gcd(c.page_size, kV.tile_k) : 0;
  const int box = c.page_size > 0 ? a.page_box : kV.tile_k;
  map_tensor(a.k_map, problem.k.data(), c.head_dim, k_rows, c.nheads_kv, k_batch, p.k_stride, box);
  map_tensor(a.v_map, problem.v.data(), c.head_dim_v, k_rows, c.nheads_kv, k_batch, p.v_stride, box);
  map_tensor(a.out_map, problem.out.data(), c.head_dim_v, q_rows, c.nheads_q, q_batch, p.out_stride, a.queries_each,
             p.rows_per_query);
  const unsigned grid = std::min(3u, static_cast<unsigned>(a.num_work_tiles));
  for (unsigned index = 0; index < grid; ++index) {
    const std::string failure =
        emulated::run_block(Layout<kV>::kThreads, index, grid, seed * 16 + index, [&a] { attention_fwd_sm90<kV>(a); });
    if (!failure.empty()) return failure;
  }
  if (c.counts_tiles && counter != 0) return "the counter is left at " + std::to_string(counter);
  if (c.splits > 0) problem.merge(partial_out, partial_lse, p.max_splits);
  return problem.judge();
}

}  // namespace heed::cuda
