// Scaled dot-product attention of oneDNN's graph interface behind four C functions, so that peers_cpu.py can time it in
// its own process. Compiled on demand against the wheels onednn, onednn-devel and tbb-devel.
//   S = Q K^T [matmul] -> * scale -> (+ mask) -> softmax -> P V [matmul], one partition.
// With fewer heads of keys than of queries the tensors have five dimensions, as oneDNN's documentation has it.
#include <oneapi/tbb/global_control.h>
#include <oneapi/dnnl/dnnl_graph.hpp>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace {

using dnnl::graph::compiled_partition;
using dnnl::graph::graph;
using dnnl::graph::logical_tensor;
using dnnl::graph::op;
using dnnl::graph::tensor;
using dtype = logical_tensor::data_type;
using dims = logical_tensor::dims;
using oneapi::tbb::global_control;

struct Sdpa {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  size_t threads = 1;
  float scale = 1;
  compiled_partition compiled;
  std::vector<logical_tensor> inputs, outputs;  // in the partition's order
  enum Id : size_t { kQ, kK, kScore, kScale, kScaled, kMask, kMasked, kP, kV, kOut };
};

dtype data_type(int code) { return code == 0 ? dtype::f32 : code == 1 ? dtype::bf16 : dtype::f16; }

std::unique_ptr<Sdpa> create(int64_t b, int64_t hq, int64_t hkv, int64_t sq, int64_t sk, int64_t d, int code,
                             bool masked, size_t threads) {
  auto sdpa = std::make_unique<Sdpa>();
  sdpa->threads = threads;
  sdpa->scale = 1.0f / std::sqrt(static_cast<float>(d));
  const bool grouped = hq != hkv;
  auto shape = [&](int64_t heads_of_group, int64_t rows, int64_t columns) {
    return grouped ? dims{b, hkv, heads_of_group, rows, columns} : dims{b, hkv, rows, columns};
  };
  const int64_t group = hq / hkv;
  const dtype io = data_type(code);
  auto tensor_of = [](size_t id, dtype type, const dims& shape) {
    return logical_tensor(id, type, shape, logical_tensor::layout_type::strided);
  };
  auto inner = [](size_t id) { return logical_tensor(id, dtype::f32); };

  const logical_tensor q = tensor_of(Sdpa::kQ, io, shape(group, sq, d));
  const logical_tensor k = tensor_of(Sdpa::kK, io, shape(1, sk, d));
  const logical_tensor v = tensor_of(Sdpa::kV, io, shape(1, sk, d));
  const logical_tensor out = tensor_of(Sdpa::kOut, io, shape(group, sq, d));
  const logical_tensor scale = tensor_of(Sdpa::kScale, dtype::f32, dims{1});
  const logical_tensor mask = tensor_of(Sdpa::kMask, dtype::f32, grouped ? dims{1, 1, 1, sq, sk} : dims{1, 1, sq, sk});
  const logical_tensor score = inner(Sdpa::kScore), scaled = inner(Sdpa::kScaled), with_mask = inner(Sdpa::kMasked);
  const logical_tensor p = logical_tensor(Sdpa::kP, io);

  op qk(0, op::kind::MatMul, {q, k}, {score}, "qk");
  qk.set_attr<bool>(op::attr::transpose_b, true);
  op multiply(1, op::kind::Multiply, {score, scale}, {scaled}, "scale");
  op add(2, op::kind::Add, {scaled, mask}, {with_mask}, "mask");
  op softmax(3, op::kind::SoftMax, {masked ? with_mask : scaled}, {p}, "softmax");
  softmax.set_attr<int64_t>(op::attr::axis, -1);
  op pv(4, op::kind::MatMul, {p, v}, {out}, "pv");

  graph g(dnnl::engine::kind::cpu);
  g.add_op(qk);
  g.add_op(multiply);
  if (masked) g.add_op(add);
  g.add_op(softmax);
  g.add_op(pv);
  g.finalize();
  auto partitions = g.get_partitions();
  if (partitions.size() != 1 || !partitions[0].is_supported()) {
    throw std::runtime_error("the graph is not one supported partition but " + std::to_string(partitions.size()));
  }
  sdpa->inputs = partitions[0].get_input_ports();
  sdpa->outputs = {out};
  sdpa->compiled = partitions[0].compile(sdpa->inputs, sdpa->outputs, sdpa->engine);
  return sdpa;
}

// Kept between calls: TBB wakes and retires its workers when the limit moves, which costs a call its second thread.
void limit_threads(size_t threads) {
  static std::unique_ptr<global_control> limit;
  static size_t current = 0;
  if (current == threads) return;
  limit.reset();
  limit = std::make_unique<global_control>(global_control::max_allowed_parallelism, threads);
  current = threads;
}

void run(Sdpa& sdpa, void* q, void* k, void* v, void* mask, void* out) {
  std::vector<tensor> inputs;
  for (const logical_tensor& input : sdpa.inputs) {
    void* data = nullptr;
    switch (input.get_id()) {
      case Sdpa::kQ: data = q; break;
      case Sdpa::kK: data = k; break;
      case Sdpa::kV: data = v; break;
      case Sdpa::kMask: data = mask; break;
      case Sdpa::kScale: data = &sdpa.scale; break;
    }
    inputs.emplace_back(input, sdpa.engine, data);
  }
  std::vector<tensor> outputs{tensor(sdpa.outputs[0], sdpa.engine, out)};
  sdpa.compiled.execute(sdpa.stream, inputs, outputs);
  sdpa.stream.wait();
}

template <class Body>
int guarded(char* error, size_t bytes, Body&& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& thrown) {
    std::snprintf(error, bytes, "%s", thrown.what());
    return 1;
  }
}

}  // namespace

extern "C" {

const char* onednn_version() {
  static char text[32];
  const dnnl_version_t* version = dnnl_version();
  std::snprintf(text, sizeof(text), "%d.%d.%d", version->major, version->minor, version->patch);
  return text;
}

int onednn_create(int64_t b, int64_t hq, int64_t hkv, int64_t sq, int64_t sk, int64_t d, int dtype_code, int masked,
                  size_t threads, void** handle, char* error, size_t error_bytes) {
  return guarded(error, error_bytes, [&] {
    limit_threads(threads);
    *handle = create(b, hq, hkv, sq, sk, d, dtype_code, masked != 0, threads).release();
  });
}

int onednn_run(void* handle, void* q, void* k, void* v, void* mask, void* out, char* error, size_t error_bytes) {
  return guarded(error, error_bytes, [&] {
    Sdpa& sdpa = *static_cast<Sdpa*>(handle);
    limit_threads(sdpa.threads);
    run(sdpa, q, k, v, mask, out);
  });
}

void onednn_destroy(void* handle) { delete static_cast<Sdpa*>(handle); }

}  // extern "C"
