#include "torch/bank.h"

#include <string>

namespace axiscap {

const Signature& Bank::signature() {
  static const Signature parsed(kBankSchema);
  return parsed;
}

Bank::Bank(const py::args& arguments, const py::kwargs& keywords) : entries_(signature().parameters.size()) {
  std::vector<PyObject*> values;
  for (const py::handle value : arguments) values.push_back(value.ptr());
  py::tuple names(keywords.size());
  size_t i = 0;
  for (const auto& [name, value] : keywords) {
    names[i++] = name;
    values.push_back(value.ptr());
  }
  BoundArguments bound;
  const bool is_plain = bound.bind(signature(), {values.data(), Py_ssize_t(arguments.size()), names.ptr()}, false);
  const py::object device = py::handle(bound.values[0]).attr("device");  // of the axes
  const char* not_dense_error = "a bank is made of dense tensors with data";
  bool is_dense = true;
  for (i = 0; i < entries_.size(); ++i) {
    if (!bound.values[i] || bound.values[i] == Py_None) continue;
    entries_[i].object = py::reinterpret_borrow<py::object>(bound.values[i]);
    const py::object tensor_device = entries_[i].object.attr("device");
    CHECK_VALUE(tensor_device.equal(device), signature().parameters[i].name, " must be on the device of axes, ",
                std::string(py::str(device)), ", got ", std::string(py::str(tensor_device)));
    const Tensor& tensor = bound.tensors[i];
    is_dense &= tensor.sizes.data && !tensor.is_negated();
    entries_[i].data = tensor.data;
    entries_[i].sizes.assign(tensor.sizes.begin(), tensor.sizes.end());
  }
  CHECK_VALUE(is_dense, not_dense_error);
  check_bank(bound);  // fake tensors get here, so that the limits of a GPU are checked without a GPU
  CHECK_VALUE(is_plain, not_dense_error);
  for (Entry& entry : entries_)
    if (!entry.object.is_none())
      entry.capsule = py::module_::import("torch.utils.dlpack").attr("to_dlpack")(entry.object);
  check_bank_values(bound);
}

bool Bank::add_to(Arguments& arguments, Tensor* tensors) const {
  const auto& parameters = signature().parameters;
  for (size_t i = 0; i < entries_.size(); ++i) {
    const Entry& entry = entries_[i];
    if (!entry.data) continue;
    const Sizes sizes{entry.sizes.data(), int64_t(entry.sizes.size())};
    if (!tensors[i].read(entry.object.ptr(), false) || tensors[i].data != entry.data || tensors[i].sizes != sizes ||
        !tensors[i].is_contiguous())
      return false;
    arguments.*parameters[i].tensor = &tensors[i];
    arguments.add({&tensors[i], parameters[i].name.c_str(), false});
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

// Bank.cap_: the op without the checks of a bank. If an argument is not plain or the bank has moved, the full op runs.
PyObject* cap_with_bank(PyObject* self, PyObject* const* arguments, Py_ssize_t count, PyObject* names) {
  static const Signature signature("cap_(Tensor(a!) hidden, Tensor? slots=None, Tensor(z!)? projections=None) -> ()");
  return call_guarded([&] {
    // The method descriptor has checked the type of self; pybind11's cast would look it up once more.
    const auto& bank = *reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder().value_ptr<Bank>();
    BoundArguments bound;
    Tensor tensors[Bank::kMaxTensors];
    if (bound.bind(signature, {arguments, count, names}, false) && bank.add_to(bound, tensors))
      return cap_with_checked_bank_(bound).release().ptr();
    py::dict keywords;
    for (size_t i = 0; i < signature.parameters.size(); ++i)
      if (bound.values[i]) keywords[signature.parameters[i].name.c_str()] = py::handle(bound.values[i]);
    for (size_t i = 0; i < bank.signature().parameters.size(); ++i)
      keywords[bank.signature().parameters[i].name.c_str()] = bank[i];
    return py::module_::import("axiscap._C").attr("cap_")(**keywords).release().ptr();
  });
}

}  // namespace

void define_bank(py::module_& m) {
  py::class_<Bank> bank_class(m, "Bank", kBankSchema);
  bank_class.def(py::init<const py::args&, const py::kwargs&>());
  for (size_t i = 0; i < Bank::signature().parameters.size(); ++i)
    bank_class.def_property_readonly(Bank::signature().parameters[i].name.c_str(),
                                     [i](const Bank& bank) { return bank[i]; });
  static PyMethodDef cap_method{"cap_", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(cap_with_bank)),
                                METH_FASTCALL | METH_KEYWORDS, "cap_(hidden, slots=None, projections=None)"};
  bank_class.attr("cap_") = py::reinterpret_steal<py::object>(
      PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(bank_class.ptr()), &cap_method));
}

}  // namespace axiscap
