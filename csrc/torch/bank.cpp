#include "torch/bank.h"

#include <string>

namespace axiscap {

const Signature& KeptBank::signature() {
  static const Signature parsed(kBankSchema);
  return parsed;
}

KeptBank::KeptBank(const py::args& arguments, const py::kwargs& keywords) : held_(signature().parameters.size()) {
  std::vector<PyObject*> call;
  for (const py::handle value : arguments) call.push_back(value.ptr());
  py::tuple names(keywords.size());
  size_t i = 0;
  for (const auto& [name, value] : keywords) {
    names[i++] = name;
    call.push_back(value.ptr());
  }
  BoundArguments bound;
  const bool is_plain = bound.bind(signature(), {call.data(), Py_ssize_t(arguments.size()), names.ptr()}, false);
  const py::object device = py::handle(bound.values[0]).attr("device");  // of the axes
  const char* not_dense = "a bank is made of dense tensors with data";
  bool is_dense = true;
  for (i = 0; i < held_.size(); ++i) {
    if (!bound.values[i] || bound.values[i] == Py_None) continue;
    held_[i].object = py::reinterpret_borrow<py::object>(bound.values[i]);
    const py::object other = held_[i].object.attr("device");
    CHECK_VALUE(other.equal(device), signature().parameters[i].name, " must be on the device of axes, ",
                std::string(py::str(device)), ", got ", std::string(py::str(other)));
    const Tensor& tensor = bound.tensors[i];
    is_dense &= tensor.sizes.data && !tensor.is_negated();
    held_[i].data = tensor.data;
    held_[i].sizes.assign(tensor.sizes.begin(), tensor.sizes.end());
  }
  CHECK_VALUE(is_dense, not_dense);
  check_bank(bound);  // of fake tensors too: whether a GPU takes their rows
  CHECK_VALUE(is_plain, not_dense);
  for (Held& held : held_)
    if (!held.object.is_none())
      held.exported = py::module_::import("torch.utils.dlpack").attr("to_dlpack")(held.object);
  check_bank_values(bound);
}

bool KeptBank::add_to(Arguments& arguments, Tensor* tensors) const {
  const auto& parameters = signature().parameters;
  for (size_t i = 0; i < held_.size(); ++i) {
    const Held& held = held_[i];
    if (!held.data) continue;
    const Sizes sizes{held.sizes.data(), int64_t(held.sizes.size())};
    if (!tensors[i].read(held.object.ptr(), false) || tensors[i].data != held.data || tensors[i].sizes != sizes ||
        !tensors[i].is_contiguous())
      return false;
    arguments.*parameters[i].tensor = &tensors[i];
    arguments.parts[arguments.parts_count++] = {&tensors[i], parameters[i].name.c_str(), false};
  }
  return true;
}

double* check_stats(const py::object& stats, const Arguments& bank) {
  const int64_t shape[] = {bank.floors->size(0), bank.floors->size(1), kStatFields};
  const Sizes expected{shape, 3};
  Tensor tensor;
  check_is_tensor(stats.ptr(), "stats");
  CHECK_VALUE(tensor.read(stats.ptr(), false) && tensor.dtype == kDouble && tensor.is_contiguous() &&
                  tensor.sizes == expected && tensor.device == bank.axes->device,
              "stats must be ", expected, " float64, contiguous, on the device of the bank, got ", tensor.sizes);
  return tensor.as<double>();
}

namespace {

// Bank.cap_: the op with a bank that needs no more checks.
PyObject* cap_with_bank(PyObject* self, PyObject* const* arguments, Py_ssize_t count, PyObject* names) {
  static const Signature signature("cap_(Tensor(a!) hidden, Tensor? slots=None, Tensor(z!)? projections=None) -> ()");
  return call_guarded([&] {
    // The method descriptor has checked the type of self; pybind11's cast would look it up once more.
    const auto& kept = *reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder().value_ptr<KeptBank>();
    BoundArguments bound;
    Tensor tensors[KeptBank::kMaxTensors];
    if (bound.bind(signature, {arguments, count, names}, false) && kept.add_to(bound, tensors))
      return cap_with_checked_bank_(bound).release().ptr();
    py::dict keywords;
    for (size_t i = 0; i < signature.parameters.size(); ++i)
      if (bound.values[i]) keywords[signature.parameters[i].name.c_str()] = py::handle(bound.values[i]);
    for (size_t i = 0; i < kept.signature().parameters.size(); ++i)
      keywords[kept.signature().parameters[i].name.c_str()] = kept[i];
    return py::module_::import("axiscap._C").attr("cap_")(**keywords).release().ptr();
  });
}

}  // namespace

void define_bank(py::module_& m) {
  py::class_<KeptBank> bank(m, "Bank", kBankSchema);
  bank.def(py::init<const py::args&, const py::kwargs&>());
  for (size_t i = 0; i < KeptBank::signature().parameters.size(); ++i)
    bank.def_property_readonly(KeptBank::signature().parameters[i].name.c_str(),
                               [i](const KeptBank& kept) { return kept[i]; });
  static PyMethodDef cap{"cap_", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(cap_with_bank)),
                         METH_FASTCALL | METH_KEYWORDS, "cap_(hidden, slots=None, projections=None)"};
  bank.attr("cap_") =
      py::reinterpret_steal<py::object>(PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(bank.ptr()), &cap));
}

}  // namespace axiscap
