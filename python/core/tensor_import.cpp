#include "tensor_import.h"

#include <nanobind/stl/string.h>

#include <string>
#include <unordered_map>

#include "core.h"

namespace heed_python {
namespace {

// ---- DLPack 1.x, as its specification lays it out --------------------------------------------------------------------

struct DlDevice {
  int32_t type, index;
};
struct DlDtype {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DlTensor {
  void* data;
  DlDevice device;
  int32_t ndim;
  DlDtype dtype;
  int64_t* shape;
  int64_t* strides;  // elements; null: contiguous, before version 1.2
  uint64_t byte_offset;
};
struct DlManagedTensor {
  DlTensor tensor;
  void* context;
  void (*deleter)(DlManagedTensor*);
};
struct DlVersion {
  uint32_t major, minor;
};
struct DlManagedTensorVersioned {
  DlVersion version;
  void* context;
  void (*deleter)(DlManagedTensorVersioned*);
  uint64_t flags;
  DlTensor tensor;
};
struct DlExchange {
  DlVersion version;
  void* previous;
  int (*allocate)(DlTensor*, DlManagedTensorVersioned**, void*, void (*)(void*, const char*, const char*));
  int (*managed_from_object)(void* object, DlManagedTensorVersioned** out);
  int (*object_from_managed)(DlManagedTensorVersioned* tensor, void** object);
  int (*view_of_object)(void* object, DlTensor* out);  // may be null
  int (*current_stream)(int32_t device_type, int32_t device_index, void** stream);
};
enum { kDlCpu = 1, kDlCuda = 2, kDlCudaHost = 3, kDlCudaManaged = 13 };
enum { kDlInt = 0, kDlUint = 1, kDlFloat = 2, kDlBfloat = 4, kDlComplex = 5, kDlBool = 6 };
constexpr uint64_t kDlReadOnly = 1;

// The array interface's C side (NumPy's documentation, "The array interface protocol").
struct ArrayInterface {
  int two, ndim;
  char kind;
  int itemsize, flags;
  Py_intptr_t* shape;
  Py_intptr_t* strides;  // bytes
  void* data;
  PyObject* description;
};
constexpr int kNativeByteOrder = 0x200, kWriteable = 0x400;

// ---- how arrays of a type are read -----------------------------------------------------------------------------------

enum class Protocol { kExchange, kArrayInterface, kDlpack, kNone };
struct TypeFacts {
  Protocol protocol;
  const DlExchange* exchange;
  bool has_streams;  // __dlpack__ is to order nothing: the run goes to the framework's own stream
};

TypeFacts inspect(nb::handle array) {
  nb::handle type = array.type();
  if (nb::hasattr(type, "__dlpack_c_exchange_api__")) {
    nb::object capsule = type.attr("__dlpack_c_exchange_api__");
    void* pointer = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    if (pointer == nullptr) PyErr_Clear();
    const auto* exchange = static_cast<const DlExchange*>(pointer);
    if (exchange != nullptr && exchange->version.major == 1 && exchange->view_of_object != nullptr) {
      return {Protocol::kExchange, exchange, true};
    }
  }
  if (nb::hasattr(type, "__array_struct__")) return {Protocol::kArrayInterface, nullptr, false};
  const std::string module = nb::cast<std::string>(nb::object(nb::getattr(type, "__module__", nb::str(""))));
  if (nb::hasattr(type, "__dlpack__")) return {Protocol::kDlpack, nullptr, module.rfind("cupy", 0) == 0};
  return {Protocol::kNone, nullptr, false};
}

// Under the interpreter lock, like everything here.
TypeFacts facts_of(nb::handle array) {
  static auto* known = new std::unordered_map<PyObject*, TypeFacts>;  // outlives the interpreter's other statics
  nb::handle type = array.type();
  if (const auto found = known->find(type.ptr()); found != known->end()) return found->second;
  const TypeFacts facts = inspect(array);
  if (known->size() < 256) {
    type.inc_ref();  // so that its address stays its own
    known->emplace(type.ptr(), facts);
  }
  return facts;
}

std::string words_of(nb::handle object) { return nb::cast<std::string>(nb::str(object)); }

// ---- dtypes ----------------------------------------------------------------------------------------------------------

heed_dtype dtype_of(DlDtype dtype) {
  if (dtype.lanes != 1) return HEED_DTYPE_NONE;
  switch (dtype.code << 8 | dtype.bits) {
    case kDlFloat << 8 | 32: return HEED_DTYPE_F32;
    case kDlFloat << 8 | 16: return HEED_DTYPE_F16;
    case kDlFloat << 8 | 64: return HEED_DTYPE_F64;
    case kDlBfloat << 8 | 16: return HEED_DTYPE_BF16;
    case kDlInt << 8 | 32: return HEED_DTYPE_I32;
    case kDlBool << 8 | 8: return HEED_DTYPE_BOOL;
    default: return HEED_DTYPE_NONE;
  }
}

std::string dtype_words(DlDtype dtype) {
  const char* kind = dtype.code == kDlInt       ? "int"
                     : dtype.code == kDlUint    ? "uint"
                     : dtype.code == kDlFloat   ? "float"
                     : dtype.code == kDlBfloat  ? "bfloat"
                     : dtype.code == kDlComplex ? "complex"
                     : dtype.code == kDlBool    ? "bool"
                                                : "DLPack type ";
  std::string words = kind + std::to_string(dtype.code > kDlBool ? dtype.code : dtype.bits);
  return dtype.lanes == 1 ? words : words + "x" + std::to_string(dtype.lanes);
}

const char* expected_words(Expected expected) {
  switch (expected) {
    case Expected::kInt32: return "int32";
    case Expected::kInt64: return "int64";
    case Expected::kBool: return "bool";
    default: return "float32, float16 or bfloat16";
  }
}

[[noreturn]] void refuse(const std::string& sentence) { throw StatusError(HEED_INVALID_ARGUMENT, sentence); }

heed_dtype checked_dtype(DlDtype dtype, const char* name, Expected expected) {
  if (expected == Expected::kInt64) {  // read as it is, no tensor of the library
    if (dtype.code == kDlInt && dtype.bits == 64 && dtype.lanes == 1) return HEED_DTYPE_NONE;
  } else {
    const heed_dtype known = dtype_of(dtype);
    const bool fits = expected == Expected::kInt32  ? known == HEED_DTYPE_I32
                      : expected == Expected::kBool ? known == HEED_DTYPE_BOOL
                                                    : known >= HEED_DTYPE_F32 && known <= HEED_DTYPE_F64;
    if (fits) return known;
  }
  refuse(std::string(name) + ".dtype = " + dtype_words(dtype) + ": must be " + expected_words(expected));
}

void check_ndim(int64_t ndim, const char* name) {
  if (ndim > HEED_MAX_DIMS) {
    refuse(std::string(name) + ".ndim = " + std::to_string(ndim) + ": must be at most 4");
  }
}

// ---- the three ways in -----------------------------------------------------------------------------------------------

void read(const DlTensor& from, const char* name, Expected expected, ImportedTensor& to) {
  check_ndim(from.ndim, name);
  switch (from.device.type) {
    case kDlCpu:
    case kDlCudaHost: to.device = HEED_DEVICE_CPU; break;
    case kDlCuda:
    case kDlCudaManaged:
      to.device = HEED_DEVICE_CUDA;
      to.device_index = from.device.index;
      break;
    default:
      refuse(std::string(name) + " is on a device of DLPack type " + std::to_string(from.device.type) +
             ": must be on the CPU or on an NVIDIA GPU");
  }
  heed_tensor& tensor = to.tensor;
  tensor.dtype = checked_dtype(from.dtype, name, expected);
  tensor.ndim = from.ndim;
  tensor.data = static_cast<char*>(from.data) + from.byte_offset;
  int64_t contiguous = 1;
  for (int32_t i = from.ndim; i-- > 0;) {
    tensor.shape[i] = from.shape[i];
    tensor.stride[i] = from.strides != nullptr ? from.strides[i] : contiguous;
    contiguous *= from.shape[i] > 0 ? from.shape[i] : 1;
  }
}

std::string pending_error() {
  nb::python_error error;
  return words_of(error.value());
}

void read_exchange(const DlExchange& exchange, nb::handle array, const char* name, Expected expected,
                   ImportedTensor& to) {
  DlTensor view = {};
  if (exchange.view_of_object(array.ptr(), &view) != 0) {
    refuse(std::string(name) + ": " + (PyErr_Occurred() ? pending_error() : "cannot be read as a tensor"));
  }
  read(view, name, expected, to);
}

void read_array_interface(nb::handle array, const char* name, Expected expected, ImportedTensor& to) {
  nb::object capsule = nb::getattr(array, "__array_struct__");
  const auto* from = static_cast<const ArrayInterface*>(PyCapsule_GetPointer(capsule.ptr(), nullptr));
  if (from == nullptr) refuse(std::string(name) + ": " + pending_error());
  DlDtype dtype = {0, static_cast<uint8_t>(8 * from->itemsize), 1};
  switch (from->kind) {
    case 'f': dtype.code = kDlFloat; break;
    case 'i': dtype.code = kDlInt; break;
    case 'u': dtype.code = kDlUint; break;
    case 'b': dtype.code = kDlBool; break;
    case 'c': dtype.code = kDlComplex; break;
    default:
      const std::string words = words_of(nb::object(array.attr("dtype")));
      if (words != "bfloat16")
        refuse(std::string(name) + ".dtype = " + words + ": must be " + expected_words(expected));
      dtype.code = kDlBfloat;
  }
  if ((from->flags & kNativeByteOrder) == 0) refuse(std::string(name) + ": must be in this machine's byte order");
  check_ndim(from->ndim, name);
  int64_t shape[HEED_MAX_DIMS] = {}, strides[HEED_MAX_DIMS] = {};
  for (int i = 0; i < from->ndim; ++i) {
    shape[i] = from->shape[i];
    if (from->strides[i] % from->itemsize != 0 && shape[i] > 1) {
      refuse(std::string(name) + ".strides[" + std::to_string(i) + "] = " + std::to_string(from->strides[i]) +
             " bytes: must be a multiple of the element's " + std::to_string(from->itemsize));
    }
    strides[i] = from->strides[i] / from->itemsize;
  }
  read({from->data, {kDlCpu, 0}, from->ndim, dtype, shape, strides, 0}, name, expected, to);
  to.read_only = (from->flags & kWriteable) == 0;
}

// What __dlpack__ gave, held by the capsule until we are done: a capsule that nobody renamed frees its tensor itself.
void read_dlpack(nb::handle array, bool has_streams, const char* name, Expected expected, ImportedTensor& to) {
  nb::object capsule;
  try {
    nb::dict options;
    if (has_streams) options["stream"] = -1;
    try {
      options["max_version"] = nb::make_tuple(1, 0);
      capsule = array.attr("__dlpack__")(**options);
    } catch (nb::python_error& error) {
      if (!error.matches(PyExc_TypeError)) throw;
      nb::del(options["max_version"]);  // a producer from before DLPack 1
      capsule = array.attr("__dlpack__")(**options);
    }
  } catch (nb::python_error& error) {
    refuse(std::string(name) + ": " + words_of(error.value()));
  }
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    const auto* managed =
        static_cast<const DlManagedTensorVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    if (managed->version.major != 1) {
      refuse(std::string(name) + ": comes as DLPack " + std::to_string(managed->version.major) +
             "; heed reads DLPack 1");
    }
    to.read_only = (managed->flags & kDlReadOnly) != 0;
    read(managed->tensor, name, expected, to);
  } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
    read(static_cast<const DlManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"))->tensor, name, expected,
         to);
  } else {
    refuse(std::string(name) + ": its __dlpack__() gives no DLPack tensor");
  }
  to.owner = capsule;
}

}  // namespace

ImportedTensor import_tensor(nb::handle array, const char* name, Expected expected, bool is_output) {
  ImportedTensor imported;
  const TypeFacts facts = facts_of(array);
  switch (facts.protocol) {
    case Protocol::kExchange: read_exchange(*facts.exchange, array, name, expected, imported); break;
    case Protocol::kArrayInterface: read_array_interface(array, name, expected, imported); break;
    case Protocol::kDlpack: read_dlpack(array, facts.has_streams, name, expected, imported); break;
    case Protocol::kNone:
      refuse(std::string(name) + " is of type " + words_of(nb::object(nb::getattr(array.type(), "__name__"))) +
             ": must be an array of NumPy, PyTorch, CuPy, JAX or another library with DLPack");
  }
  if (is_output && imported.read_only) refuse(std::string(name) + " is read-only: must be writable, results go there");
  return imported;
}

void* current_stream(nb::handle array, heed_device device, int32_t device_index) {
  if (device != HEED_DEVICE_CUDA) return nullptr;
  const TypeFacts facts = facts_of(array);
  if (facts.protocol != Protocol::kExchange || facts.exchange->current_stream == nullptr) return nullptr;
  void* stream = nullptr;
  if (facts.exchange->current_stream(kDlCuda, device_index, &stream) != 0) throw nb::python_error();
  return stream;
}

}  // namespace heed_python
