// The fields of `attention ...`.
#include "ops/line_reader.h"

namespace heed {
namespace {

constexpr int64_t kUnset = INT64_MIN;

struct AttentionDraft : SlotDraft<kNumSlots> {
  AttentionProblem problem;
  // What has a default that depends on other fields.
  int64_t hkv = kUnset, sq = kUnset, sk = kUnset, dv = kUnset, tq = kUnset, tk = kUnset, num_pages = kUnset;
  Dtype out = Dtype::kNone;
  bool causal = false, grads_given = false;
};

using Rule = FieldRule<AttentionDraft>;
constexpr FieldForm kFlag = FieldForm::kFlag, kValue = FieldForm::kValue, kEither = FieldForm::kEither;

template <auto kMember>
Reason problem_number(AttentionDraft& draft, std::string_view text) {
  return read_integer(text, draft.problem.*kMember);
}

template <auto kMember>
Reason problem_flag(AttentionDraft& draft, std::string_view) {
  draft.problem.*kMember = true;
  return {};
}

template <auto kMember>
Reason draft_number(AttentionDraft& draft, std::string_view text) {
  const Reason reason = read_integer(text, draft.*kMember);
  return reason.empty() && draft.*kMember < 0 ? Reason("must not be negative") : reason;
}

Reason read_threads(AttentionDraft& draft, std::string_view text) {
  int64_t threads = 0;
  const Reason reason = read_integer(text, threads);
  if (!reason.empty() || threads < 0 || threads > INT32_MAX) return "must be a whole number from 0 to 2147483647";
  draft.problem.threads = static_cast<int32_t>(threads);
  return {};
}

Reason read_pass(AttentionDraft& draft, std::string_view text) {
  if (text != "fwd" && text != "bwd") return "must be fwd or bwd";
  draft.problem.pass = text == "bwd" ? Pass::kBackward : Pass::kForward;
  return {};
}

struct Gradient {
  std::string_view name;
  bool AttentionProblem::*member;
};
constexpr Gradient kGradients[] = {
    {"dq", &AttentionProblem::dq},       {"dk", &AttentionProblem::dk},         {"dv", &AttentionProblem::dv},
    {"dbias", &AttentionProblem::dbias}, {"dsinks", &AttentionProblem::dsinks}, {"dalibi", &AttentionProblem::dalibi},
};

Reason read_grads(AttentionDraft& draft, std::string_view text) {
  draft.grads_given = true;
  for (bool more = true; more;) {
    const size_t comma = text.find(',');
    more = comma != std::string_view::npos;
    const std::string_view name = text.substr(0, comma);
    bool known = false;
    for (const Gradient& gradient : kGradients) {
      if (gradient.name != name || draft.problem.*gradient.member) continue;
      draft.problem.*gradient.member = known = true;
    }
    if (!known) return "must be some of dq,dk,dv,dbias,dsinks,dalibi, each once, separated by commas";
    if (more) text.remove_prefix(comma + 1);
  }
  return {};
}

Reason read_window(AttentionDraft& draft, std::string_view text) {
  std::array<int64_t, 2> ends = {};
  if (!read_integers(text, ends).empty()) return "must be two whole numbers, left,right; -1 is unbounded";
  draft.problem.window_left = ends[0];
  draft.problem.window_right = ends[1];
  return {};
}

Reason read_offset(AttentionDraft& draft, std::string_view text) {
  if (text == "top") {
    draft.problem.offset_kind = OffsetKind::kTopLeft;
    return {};
  }
  draft.problem.offset_kind = OffsetKind::kGiven;
  const Reason reason = read_integer(text, draft.problem.q_offset);
  return reason.empty() ? reason : "must be top or a whole number";
}

constexpr std::string_view kLetters = "bhij";  // in the order of DimBit

Reason read_letters(std::string_view text, uint8_t& dims) {
  dims = 0;
  for (const char c : text) {
    const size_t place = kLetters.find(c);
    if (place == std::string_view::npos || (dims >> place & 1) != 0) {
      return "must name the dimensions that are not broadcast, some of b, h, i, j, each once";
    }
    dims |= static_cast<uint8_t>(1u << place);
  }
  return {};
}

std::string letters(uint8_t dims) {
  std::string text;
  for (size_t place = 0; place < kLetters.size(); ++place) {
    if ((dims >> place & 1) != 0) text += kLetters[place];
  }
  return text;
}

Reason read_bias(AttentionDraft& draft, std::string_view text) {
  const size_t colon = text.find(':');
  if (colon == std::string_view::npos) return "must be DTYPE:LETTERS, such as f32:bhij";
  const Reason reason = read_dtype(text.substr(0, colon), draft.problem.bias_dtype);
  return reason.empty() ? read_letters(text.substr(colon + 1), draft.problem.bias_dims) : reason;
}

Reason read_mask(AttentionDraft& draft, std::string_view text) {
  draft.problem.mask = true;
  return read_letters(text, draft.problem.mask_dims);
}

// An empty `alibi=` is no way to write the flag.
Reason read_alibi(AttentionDraft& draft, std::string_view text) {
  draft.problem.alibi = true;
  draft.problem.alibi_per_batch = text == "bh";
  if (text.data() == nullptr || text == "bh") return {};
  return "must be bh (slopes for every sequence and head) or stand alone (for every head)";
}

constexpr Rule kRules[] = {
    {"b", kValue, problem_number<&AttentionProblem::batch>},
    {"hq", kValue, problem_number<&AttentionProblem::nheads_q>},
    {"hkv", kValue, draft_number<&AttentionDraft::hkv>},
    {"sq", kValue, draft_number<&AttentionDraft::sq>},
    {"sk", kValue, draft_number<&AttentionDraft::sk>},
    {"tq", kValue, draft_number<&AttentionDraft::tq>},
    {"tk", kValue, draft_number<&AttentionDraft::tk>},
    {"d", kValue, problem_number<&AttentionProblem::head_dim>},
    {"dv", kValue, draft_number<&AttentionDraft::dv>},
    {"out", kValue, [](AttentionDraft& d, std::string_view text) { return read_dtype(text, d.out); }},
    {"pass", kValue, read_pass},
    {"grads", kValue, read_grads},
    {"dlse", kFlag, problem_flag<&AttentionProblem::dlse>},
    {"layout_q", kValue,
     [](AttentionDraft& d, std::string_view text) { return read_layout(text, d.problem.layout_q); }},
    {"layout_kv", kValue,
     [](AttentionDraft& d, std::string_view text) { return read_layout(text, d.problem.layout_kv); }},
    {"causal", kFlag,
     [](AttentionDraft& d, std::string_view) {
       d.causal = true;
       return Reason();
     }},
    {"window", kValue, read_window},
    {"offset", kValue, read_offset},
    {"chunk", kValue, problem_number<&AttentionProblem::chunk>},
    {"softcap", kFlag, problem_flag<&AttentionProblem::softcap>},
    {"alibi", kEither, read_alibi},
    {"sinks", kFlag, problem_flag<&AttentionProblem::sinks>},
    {"bias", kValue, read_bias},
    {"mask", kValue, read_mask},
    {"dropout", kFlag, problem_flag<&AttentionProblem::dropout>},
    {"page", kValue, problem_number<&AttentionProblem::page_size>},
    {"num_pages", kValue, draft_number<&AttentionDraft::num_pages>},
    {"cache_batch", kValue, problem_number<&AttentionProblem::cache_batch>},
    {"leftpad", kFlag, problem_flag<&AttentionProblem::leftpad>},
    {"used_q", kFlag, problem_flag<&AttentionProblem::used_q>},
    {"used_k", kFlag, problem_flag<&AttentionProblem::used_k>},
    {"lse", kFlag, problem_flag<&AttentionProblem::lse>},
    {"deterministic", kFlag, problem_flag<&AttentionProblem::deterministic>},
    {"batch_invariant", kFlag, problem_flag<&AttentionProblem::batch_invariant>},
    {"splits", kValue, problem_number<&AttentionProblem::splits>},
    {"device", kValue,
     [](AttentionDraft& d, std::string_view text) {
       return read_device(text, d.problem.device, d.problem.device_index);
     }},
    {"threads", kValue, read_threads},
};

constexpr MemberField kMembers[] = {{"batch", "b"},
                                    {"nheads_q", "hq"},
                                    {"nheads_q", "hkv"},
                                    {"nheads_kv", "hkv"},
                                    {"nheads_kv", "hq"},
                                    {"seqlen_q", "sq"},
                                    {"seqlen_k", "sk"},
                                    {"seqlen_k", "sq"},
                                    {"head_dim", "d"},
                                    {"head_dim_v", "dv"},
                                    {"head_dim_v", "d"},
                                    {"total_q", "tq"},
                                    {"total_k", "tk"},
                                    {"page_size", "page"},
                                    {"num_pages", "num_pages"},
                                    {"cache_batch", "cache_batch"},
                                    {"splits", "splits"},
                                    {"window_left", "window"},
                                    {"window_right", "window"},
                                    {"chunk", "chunk"},
                                    {"q_offset", "offset"},
                                    {"out_dtype", "out"},
                                    {"bias_dtype", "bias"},
                                    {"layout_kv", "layout_kv"},
                                    {"dlse", "dlse"},
                                    {"dlse", "grads"},
                                    {"dbias", "grads"},
                                    {"dsinks", "grads"},
                                    {"dalibi_slopes", "grads"},
                                    {"threads", "threads"},
                                    {"device_index", "device"}};

int64_t page_count(const AttentionProblem& p) {
  const int64_t rows = p.cache_batch > 0 ? p.cache_batch : p.batch;
  const int64_t count = p.page_size > 0 ? default_total({}, rows, p.seqlen_k / p.page_size) : 0;
  return count;
}

void default_gradients(AttentionProblem& p) {
  p.dq = p.dk = p.dv = true;
  p.dbias = p.bias();
  p.dsinks = p.sinks;
  p.dalibi = p.alibi;
}

// Fills in what depends on other fields.
Status settle(std::span<const Field> fields, AttentionDraft& draft) {
  AttentionProblem& p = draft.problem;
  if (find_field(fields, "d") == nullptr) return invalid_argument("problem line: `d=` (head_dim) must be given");
  if (draft.sq == kUnset && !p.packed_q()) {
    return invalid_argument("problem line: `sq=` (seqlen_q) must be given unless layout_q=thd");
  }
  p.dtype = draft.dtype.value_or(Dtype::kF32);
  p.out_dtype = draft.out == Dtype::kNone ? p.dtype : draft.out;
  p.nheads_kv = draft.hkv == kUnset ? p.nheads_q : draft.hkv;
  p.head_dim_v = draft.dv == kUnset ? p.head_dim : draft.dv;
  p.seqlen_q = draft.sq == kUnset ? 0 : draft.sq;
  p.seqlen_k = draft.sk == kUnset ? p.seqlen_q : draft.sk;
  p.total_q = draft.tq != kUnset ? draft.tq : p.packed_q() ? default_total(draft.data.lq, p.batch, p.seqlen_q) : 0;
  p.total_k = draft.tk != kUnset ? draft.tk : p.packed_k() ? default_total(draft.data.lk, p.batch, p.seqlen_k) : 0;
  p.num_pages = draft.num_pages != kUnset ? draft.num_pages : page_count(p);
  if (draft.causal && (p.window_right == -1 || p.window_right > 0)) p.window_right = 0;
  if (p.pass == Pass::kBackward) {
    p.lse = true;
    if (!draft.grads_given) default_gradients(p);
  }
  return {};
}

Status check_data(std::span<const Field> fields, const AttentionProblem& p, const DataFields& data) {
  if (!p.softcap) HEED_RETURN_IF_ERROR(forbid_field(fields, "softcap_value", "must be left out without `softcap`"));
  if (!p.dropout) HEED_RETURN_IF_ERROR(forbid_field(fields, "p", "must be left out without `dropout`"));
  if (!p.leftpad) HEED_RETURN_IF_ERROR(forbid_field(fields, "lpad", "must be left out without `leftpad`"));
  if (!p.paged()) HEED_RETURN_IF_ERROR(forbid_field(fields, "pages", "must be left out without `page=`"));
  if (!p.packed_q() && !p.used_q) {
    HEED_RETURN_IF_ERROR(forbid_field(fields, "lq", "must be left out without `layout_q=thd` or `used_q`"));
  }
  if (!p.packed_k() && !p.used_k) {
    HEED_RETURN_IF_ERROR(forbid_field(fields, "lk", "must be left out without `layout_kv=thd` or `used_k`"));
  }
  HEED_RETURN_IF_ERROR(
      check_lengths(fields, "lq", data.lq, p.batch, p.packed_q() ? p.total_q : p.seqlen_q, p.packed_q()));
  HEED_RETURN_IF_ERROR(
      check_lengths(fields, "lk", data.lk, p.batch, p.packed_k() ? p.total_k : p.seqlen_k, p.packed_k()));
  return check_lengths(fields, "lpad", data.leftpad, p.batch, p.packed_k() ? p.total_k : p.seqlen_k, false);
}

void print_gradients(LineWriter& out, const AttentionProblem& p) {
  AttentionProblem standard = p;
  default_gradients(standard);
  std::string asked;
  bool differs = false;
  for (const Gradient& gradient : kGradients) {
    differs |= p.*gradient.member != standard.*gradient.member;
    if (p.*gradient.member) asked += heed::format("{}{}", asked.empty() ? "" : ",", gradient.name);
  }
  if (differs) out.word("grads", asked, "");
}

void print_masks(LineWriter& out, const AttentionProblem& p) {
  if (p.window_left == -1 && p.window_right == 0) {
    out.flag("causal", true);
  } else if (p.window_left != -1 || p.window_right != -1) {
    out.word("window", heed::format("{},{}", p.window_left, p.window_right), "");
  }
  if (p.offset_kind == OffsetKind::kTopLeft) out.word("offset", "top", "");
  if (p.offset_kind == OffsetKind::kGiven) out.word("offset", heed::format("{}", p.q_offset), "");
  out.number("chunk", p.chunk, 0);
  out.flag("softcap", p.softcap);
  if (p.alibi) out.flag(p.alibi_per_batch ? "alibi=bh" : "alibi", true);
  out.flag("sinks", p.sinks);
  if (p.bias()) out.word("bias", heed::format("{}:{}", dtype_name(p.bias_dtype), letters(p.bias_dims)), "");
  if (p.mask) out.flag("mask=" + letters(p.mask_dims), true);
  out.flag("dropout", p.dropout);
}

}  // namespace

template <>
int written_strides(Slot slot) {
  switch (slot) {
    case Slot::kBias:
    case Slot::kMask:
    case Slot::kDbias: return 4;
    case Slot::kPageTable:
    case Slot::kAlibi: return 2;
    default: return 3;
  }
}

Result<ProblemLine> parse_attention_line(std::span<const Field> fields) {
  AttentionDraft draft;
  HEED_RETURN_IF_ERROR((read_fields<Slot, AttentionDraft, kNumSlots>(fields, kRules, draft, draft)));
  HEED_RETURN_IF_ERROR(settle(fields, draft));
  HEED_RETURN_IF_ERROR((place_slots<Slot>(fields, draft, draft.problem)));
  if (const Status status = validate(draft.problem); !status.ok()) return point_at_field(status, fields, kMembers);
  HEED_RETURN_IF_ERROR(check_data(fields, draft.problem, draft.data));
  return ProblemLine{draft.problem, draft.data};
}

std::string print_plan_fields(const AttentionProblem& p, const DataFields& data) {
  LineWriter out("attention");
  out.number("b", p.batch, 1);
  out.number("hq", p.nheads_q, 1);
  out.number("hkv", p.nheads_kv, p.nheads_q);
  out.number("sq", p.seqlen_q, p.packed_q() ? 0 : -1);
  out.number("sk", p.seqlen_k, p.seqlen_q);
  if (p.packed_q()) out.number("tq", p.total_q, default_total(data.lq, p.batch, p.seqlen_q));
  if (p.packed_k()) out.number("tk", p.total_k, default_total(data.lk, p.batch, p.seqlen_k));
  out.number("d", p.head_dim, -1);
  out.number("dv", p.head_dim_v, p.head_dim);
  out.flag(dtype_name(p.dtype), p.dtype != Dtype::kF32);
  out.word("out", dtype_name(p.out_dtype), dtype_name(p.dtype));
  if (p.pass == Pass::kBackward) {
    out.word("pass", "bwd", "fwd");
    print_gradients(out, p);
    out.flag("dlse", p.dlse);
  }
  out.word("layout_q", layout_name(p.layout_q), "bshd");
  out.word("layout_kv", layout_name(p.layout_kv), "bshd");
  print_masks(out, p);
  out.number("page", p.page_size, 0);
  if (p.paged()) out.number("num_pages", p.num_pages, page_count(p));
  out.number("cache_batch", p.cache_batch, 0);
  out.flag("leftpad", p.leftpad);
  out.flag("used_q", p.used_q);
  out.flag("used_k", p.used_k);
  out.flag("lse", p.lse && p.pass == Pass::kForward);
  out.flag("deterministic", p.deterministic);
  out.flag("batch_invariant", p.batch_invariant);
  out.number("splits", p.splits, 0);
  print_slots<Slot>(out.text(), p);
  out.word("device", device_text(p.device, p.device_index), "cpu");
  out.number("threads", p.threads, 0);
  return out.text();
}

std::string to_string(const AttentionProblem& problem) { return print_plan_fields(problem, DataFields()); }

}  // namespace heed
