// The fields of `kv_append ...`.
#include "ops/line_reader.h"

namespace heed {
namespace {

constexpr int64_t kUnset = INT64_MIN;

struct KvAppendDraft : SlotDraft<kNumKvSlots> {
  KvAppendProblem problem;
  // What has a default that depends on other fields.
  int64_t hkv = kUnset, sn = kUnset, sq = kUnset, dv = kUnset, tq = kUnset, tn = kUnset;
  int64_t num_pages = kUnset, rotary_rows = kUnset;
  Dtype cos = Dtype::kNone;
};

using Rule = FieldRule<KvAppendDraft>;
constexpr FieldForm kFlag = FieldForm::kFlag, kValue = FieldForm::kValue;

template <auto kMember>
Reason problem_number(KvAppendDraft& draft, std::string_view text) {
  return read_integer(text, draft.problem.*kMember);
}

template <auto kMember>
Reason problem_flag(KvAppendDraft& draft, std::string_view) {
  draft.problem.*kMember = true;
  return {};
}

template <auto kMember>
Reason draft_number(KvAppendDraft& draft, std::string_view text) {
  const Reason reason = read_integer(text, draft.*kMember);
  return reason.empty() && draft.*kMember < 0 ? Reason("must not be negative") : reason;
}

Reason read_threads(KvAppendDraft& draft, std::string_view text) {
  int64_t threads = 0;
  const Reason reason = read_integer(text, threads);
  if (!reason.empty() || threads < 0 || threads > INT32_MAX) return "must be a whole number from 0 to 2147483647";
  draft.problem.threads = static_cast<int32_t>(threads);
  return {};
}

constexpr Rule kRules[] = {
    {"b", kValue, problem_number<&KvAppendProblem::batch>},
    {"hq", kValue, problem_number<&KvAppendProblem::nheads_q>},
    {"hkv", kValue, draft_number<&KvAppendDraft::hkv>},
    {"sn", kValue, draft_number<&KvAppendDraft::sn>},
    {"sq", kValue, draft_number<&KvAppendDraft::sq>},
    {"sk", kValue, problem_number<&KvAppendProblem::seqlen_k>},
    {"tn", kValue, draft_number<&KvAppendDraft::tn>},
    {"tq", kValue, draft_number<&KvAppendDraft::tq>},
    {"d", kValue, problem_number<&KvAppendProblem::head_dim>},
    {"dv", kValue, draft_number<&KvAppendDraft::dv>},
    {"layout_new", kValue,
     [](KvAppendDraft& d, std::string_view text) { return read_layout(text, d.problem.layout_new); }},
    {"layout_cache", kValue,
     [](KvAppendDraft& d, std::string_view text) { return read_layout(text, d.problem.layout_cache); }},
    {"noappend", kFlag,
     [](KvAppendDraft& d, std::string_view) {
       d.problem.append = false;
       return Reason();
     }},
    {"rotary", kValue, problem_number<&KvAppendProblem::rotary_dim>},
    {"rotary_n", kValue, draft_number<&KvAppendDraft::rotary_rows>},
    {"interleaved", kFlag,
     [](KvAppendDraft& d, std::string_view) {
       d.problem.rotary_style = RotaryStyle::kInterleaved;
       return Reason();
     }},
    {"cos", kValue, [](KvAppendDraft& d, std::string_view text) { return read_dtype(text, d.cos); }},
    {"q_per_position", kFlag, problem_flag<&KvAppendProblem::q_per_position>},
    {"rotary_seqlens", kFlag, problem_flag<&KvAppendProblem::rotary_seqlens>},
    {"leftpad", kFlag, problem_flag<&KvAppendProblem::leftpad>},
    {"page", kValue, problem_number<&KvAppendProblem::page_size>},
    {"num_pages", kValue, draft_number<&KvAppendDraft::num_pages>},
    {"cache_batch", kValue, problem_number<&KvAppendProblem::cache_batch>},
    {"device", kValue,
     [](KvAppendDraft& d, std::string_view text) {
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
                                    {"seqlen_new", "sn"},
                                    {"seqlen_k", "sk"},
                                    {"head_dim", "d"},
                                    {"head_dim_v", "dv"},
                                    {"head_dim_v", "d"},
                                    {"total_q", "tq"},
                                    {"total_new", "tn"},
                                    {"page_size", "page"},
                                    {"num_pages", "num_pages"},
                                    {"cache_batch", "cache_batch"},
                                    {"rotary_dim", "rotary"},
                                    {"rotary_rows", "rotary_n"},
                                    {"rotary_dtype", "cos"},
                                    {"rotary_style", "interleaved"},
                                    {"layout_cache", "layout_cache"},
                                    {"rotary_seqlens", "rotary_seqlens"},
                                    {"q", "hq"},
                                    {"q_per_position", "q_per_position"},
                                    {"threads", "threads"},
                                    {"device_index", "device"}};

int64_t page_count(const KvAppendProblem& p) {
  const int64_t rows = p.cache_batch > 0 ? p.cache_batch : p.batch;
  return p.page_size > 0 ? default_total({}, rows, p.seqlen_k / p.page_size) : 0;
}

int64_t standard_hkv(const KvAppendProblem& p) { return p.nheads_q != 0 ? p.nheads_q : 1; }
int64_t standard_sq(const KvAppendProblem& p) { return p.has_q() ? p.seqlen_new : 0; }

int64_t standard_total_new(const KvAppendProblem& p, const DataFields& data) {
  return p.packed() && p.append ? default_total(data.lq, p.batch, p.seqlen_new) : 0;
}

// As many queries as new keys, unless sq says otherwise.
int64_t standard_total_q(const KvAppendProblem& p) {
  if (!p.packed() || !p.has_q()) return 0;
  return p.append && p.seqlen_q == p.seqlen_new ? p.total_new : default_total({}, p.batch, p.seqlen_q);
}

Status settle(std::span<const Field> fields, KvAppendDraft& draft) {
  KvAppendProblem& p = draft.problem;
  for (const std::string_view name : {"sk", "d"}) {
    if (find_field(fields, name) == nullptr) {
      return invalid_argument(heed::format("problem line: `{}=` ({}) must be given", name,
                                           name == "d" ? "head_dim" : "seqlen_k, the cache's capacity"));
    }
  }
  if (draft.sn == kUnset && p.append && !p.packed()) {
    return invalid_argument("problem line: `sn=` (seqlen_new) must be given unless noappend or layout_new=thd");
  }
  p.dtype = draft.dtype.value_or(Dtype::kF32);
  p.nheads_kv = draft.hkv == kUnset ? standard_hkv(p) : draft.hkv;
  p.head_dim_v = draft.dv == kUnset ? p.head_dim : draft.dv;
  p.seqlen_new = draft.sn == kUnset ? 0 : draft.sn;
  p.seqlen_q = draft.sq == kUnset ? standard_sq(p) : draft.sq;
  p.total_new = draft.tn == kUnset ? standard_total_new(p, draft.data) : draft.tn;
  p.total_q = draft.tq == kUnset ? standard_total_q(p) : draft.tq;
  p.num_pages = draft.num_pages == kUnset ? page_count(p) : draft.num_pages;
  p.rotary_rows = draft.rotary_rows != kUnset ? draft.rotary_rows : p.rotary() ? p.seqlen_k : 0;
  p.rotary_dtype = draft.cos != Dtype::kNone ? draft.cos : p.rotary() ? Dtype::kF32 : Dtype::kNone;
  return {};
}

Status check_data(std::span<const Field> fields, const KvAppendProblem& p, const DataFields& data) {
  for (const std::string_view name : {"scale", "softcap_value", "p"}) {
    HEED_RETURN_IF_ERROR(forbid_field(fields, name, "must be left out: it is for attention"));
  }
  if (!p.leftpad) HEED_RETURN_IF_ERROR(forbid_field(fields, "lpad", "must be left out without `leftpad`"));
  if (!p.paged()) HEED_RETURN_IF_ERROR(forbid_field(fields, "pages", "must be left out without `page=`"));
  if (!p.packed() || !p.append) {
    HEED_RETURN_IF_ERROR(forbid_field(fields, "lq", "must be left out without `layout_new=thd` and new keys"));
  }
  HEED_RETURN_IF_ERROR(check_lengths(fields, "lq", data.lq, p.batch, p.total_new, true));
  HEED_RETURN_IF_ERROR(check_lengths(fields, "lk", data.lk, p.batch, p.seqlen_k, false));
  return check_lengths(fields, "lpad", data.leftpad, p.batch, p.seqlen_k, false);
}

}  // namespace

template <>
int written_strides(KvSlot slot) {
  return slot == KvSlot::kPageTable ? 2 : 3;
}

Result<ProblemLine> parse_kv_append_line(std::span<const Field> fields) {
  KvAppendDraft draft;
  HEED_RETURN_IF_ERROR((read_fields<KvSlot, KvAppendDraft, kNumKvSlots>(fields, kRules, draft, draft)));
  HEED_RETURN_IF_ERROR(settle(fields, draft));
  HEED_RETURN_IF_ERROR((place_slots<KvSlot>(fields, draft, draft.problem)));
  if (const Status status = validate(draft.problem); !status.ok()) return point_at_field(status, fields, kMembers);
  HEED_RETURN_IF_ERROR(check_data(fields, draft.problem, draft.data));
  return ProblemLine{draft.problem, draft.data};
}

std::string print_plan_fields(const KvAppendProblem& p, const DataFields& data) {
  LineWriter out("kv_append");
  out.number("b", p.batch, 1);
  out.number("hq", p.nheads_q, 0);
  out.number("hkv", p.nheads_kv, standard_hkv(p));
  out.number("sn", p.seqlen_new, p.append && !p.packed() ? -1 : 0);
  out.number("sq", p.seqlen_q, standard_sq(p));
  out.number("sk", p.seqlen_k, -1);
  out.number("tn", p.total_new, standard_total_new(p, data));
  out.number("tq", p.total_q, standard_total_q(p));
  out.number("d", p.head_dim, -1);
  out.number("dv", p.head_dim_v, p.head_dim);
  out.flag(dtype_name(p.dtype), p.dtype != Dtype::kF32);
  out.word("layout_new", layout_name(p.layout_new), "bshd");
  out.word("layout_cache", layout_name(p.layout_cache), "bshd");
  out.flag("noappend", !p.append);
  if (p.rotary()) {
    out.number("rotary", p.rotary_dim, 0);
    out.number("rotary_n", p.rotary_rows, p.seqlen_k);
    out.flag("interleaved", p.rotary_style == RotaryStyle::kInterleaved);
    out.word("cos", dtype_name(p.rotary_dtype), "f32");
  }
  out.flag("q_per_position", p.q_per_position);
  out.flag("rotary_seqlens", p.rotary_seqlens);
  out.flag("leftpad", p.leftpad);
  out.number("page", p.page_size, 0);
  if (p.paged()) out.number("num_pages", p.num_pages, page_count(p));
  out.number("cache_batch", p.cache_batch, 0);
  print_slots<KvSlot>(out.text(), p);
  out.word("device", device_text(p.device, p.device_index), "cpu");
  out.number("threads", p.threads, 0);
  return out.text();
}

std::string to_string(const KvAppendProblem& problem) { return print_plan_fields(problem, DataFields()); }

}  // namespace heed
