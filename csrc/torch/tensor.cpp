#include "torch/tensor.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <string_view>
#include <utility>

namespace axiscap {
namespace {

// Objects of torch. The references are never released.
struct Torch {
  const DLPackExchangeAPI* exchange;
  PyTypeObject *tensor, *parameter;
  PyObject *is_negated, *increment_version, *is_inference;
  PyObject *forward_ad, *current_level, *requires_grad;
} torch_;

bool is_true(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result).is(py::bool_(true));
}

}  // namespace

void import_torch() {
  const auto keep = [](const py::object& object) { return py::object(object).release().ptr(); };
  const py::module_ torch = py::module_::import("torch"), forward_ad = py::module_::import("torch.autograd.forward_ad");
  const py::object tensor = torch.attr("Tensor");
  torch_.tensor = reinterpret_cast<PyTypeObject*>(keep(tensor));
  torch_.parameter = reinterpret_cast<PyTypeObject*>(keep(torch.attr("nn").attr("Parameter")));
  torch_.is_negated = keep(tensor.attr("is_neg"));
  torch_.is_inference = keep(tensor.attr("is_inference"));
  torch_.increment_version = keep(torch.attr("_C").attr("_increment_version"));
  torch_.forward_ad = keep(forward_ad.attr("__dict__"));
  torch_.current_level = PyUnicode_InternFromString("_current_level");
  torch_.requires_grad = PyUnicode_InternFromString("requires_grad");
  const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
  if (!capsule.is_none())
    torch_.exchange = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!torch_.exchange || torch_.exchange->header.version.major != DLPACK_MAJOR_VERSION ||
      !torch_.exchange->dltensor_from_py_object_no_sync)
    throw py::import_error("axiscap needs torch 2.10 or later, whose tensors have DLPack's exchange interface");
}

bool Sizes::operator==(const Sizes& other) const {
  return count == other.count && std::equal(begin(), end(), other.begin());
}

std::ostream& operator<<(std::ostream& out, const Sizes& sizes) {
  out << '[';
  for (int64_t i = 0; i < sizes.count; ++i) out << (i ? ", " : "") << sizes[i];
  return out << ']';
}

std::ostream& operator<<(std::ostream& out, const Device& device) {
  if (device.is_cpu()) return out << "cpu";
  if (device.is_cuda()) return out << "cuda:" << device.index;
  return out << "device " << device.index << " of DLPack's type " << device.type;
}

std::ostream& operator<<(std::ostream& out, ScalarType type) {
  for (const auto& [named_type, name] : {std::pair(kFloat, "Float"),
                                         {kBFloat16, "BFloat16"},
                                         {kHalf, "Half"},
                                         {kDouble, "Double"},
                                         {kFloat8, "Float8_e4m3fn"},
                                         {kInt, "Int"}})
    if (named_type == type) out << name;
  return out;
}

std::string Tensor::dtype_name() const {
  std::string name = py::str(py::handle(object).attr("type")());  // torch.cuda.FloatTensor
  name.erase(name.size() - std::string_view("Tensor").size());
  return name.substr(name.rfind('.') + 1);
}

bool Tensor::read(PyObject* tensor, bool allow_subclass) {
  object = tensor;
  sizes = {};
  data = nullptr;
  DLTensor exported;
  if (torch_.exchange->dltensor_from_py_object_no_sync(tensor, &exported)) {
    PyErr_Clear();  // the tensor has no memory to export: sparse, meta, quantised, or inside of torch.func
    return false;
  }
  sizes = {exported.shape, exported.ndim};
  strides = {exported.strides, exported.ndim};
  dtype = {exported.dtype.code, exported.dtype.bits};
  device = {exported.device.device_type, exported.device.device_id};
  item_bytes = exported.dtype.bits / 8;
  data = static_cast<char*>(exported.data) + exported.byte_offset;
  numel = 1;
  for (const int64_t size : sizes) numel *= size;
  const bool has_readable_class =
      allow_subclass || Py_TYPE(tensor) == torch_.tensor || Py_TYPE(tensor) == torch_.parameter;
  return has_readable_class && (data || numel == 0);
}

bool Tensor::is_contiguous(int64_t first_dim) const {
  if (numel == 0) return true;
  int64_t expected = 1;
  for (int64_t d = dim() - 1; d >= first_dim; --d) {
    if (sizes[d] == 1) continue;
    if (strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

Span Tensor::span() const {
  if (numel == 0) return {};
  int64_t last = 0;
  for (int64_t d = 0; d < dim(); ++d) last += (sizes[d] - 1) * strides[d];
  return {data, data + (last + 1) * item_bytes};
}

bool Tensor::is_negated() const {
  // Only the imaginary part of a conjugated complex tensor can be negated, and it has one of these dtypes.
  if (dtype != kFloat && dtype != kHalf && dtype != kDouble) return false;
  return is_true(PyObject_Vectorcall(torch_.is_negated, &object, 1, nullptr));
}

bool Tensor::requires_grad() const { return is_true(PyObject_GetAttr(object, torch_.requires_grad)); }

void check_is_tensor(PyObject* object, const char* name) {
  CHECK_TYPE(PyObject_TypeCheck(object, torch_.tensor), name, " must be a torch.Tensor, got ",
             Py_TYPE(object)->tp_name);
}

void* current_stream(Device device) {
  void* stream = nullptr;
  if (torch_.exchange->current_work_stream(device.type, device.index, &stream)) throw py::error_already_set();
  return stream;
}

void increment_versions(const py::tuple& tensors) {
  PyObject* argument = tensors.ptr();
  PyObject* result = PyObject_Vectorcall(torch_.increment_version, &argument, 1, nullptr);
  if (result) return Py_DECREF(result);
  // The call fails if a tensor was created in inference mode, because it has no version. The changes are then counted
  // one by one, without such tensors.
  py::error_already_set error;
  for (const py::handle tensor : tensors)
    if (tensors.size() > 1)
      increment_versions(py::make_tuple(tensor));
    else if (!py::handle(torch_.is_inference)(tensor).cast<bool>())
      throw error;
}

bool in_dual_level() {
  PyObject* level = PyDict_GetItemWithError(torch_.forward_ad, torch_.current_level);
  return level && PyLong_AsLong(level) >= 0;
}

void parallel_for(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  using Body = std::function<void(int64_t, int64_t)>;
  const auto call = [](int64_t part_begin, int64_t part_end, void* context) {
    (*static_cast<const Body*>(context))(part_begin, part_end);
  };
  CHECK_RUN(torch_parallel_for(begin, end, grain, call, const_cast<Body*>(&body)) == 0,
            "axiscap: torch's threads failed");
}

bool is_grad_enabled() { return aoti_torch_grad_mode_is_enabled(); }

}  // namespace axiscap
