#include "torch/binding.h"

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>

namespace axiscap {
namespace {

template <class Table>
auto find(const Table& table, std::string_view name) {
  const auto entry = std::find_if(std::begin(table), std::end(table), [&](const auto& e) { return e.first == name; });
  return entry == std::end(table) ? nullptr : entry->second;
}

void check_is_changeable(const Parameter& p, const Tensor& tensor) {
  CHECK_VALUE(!is_grad_enabled() || !tensor.requires_grad(), p.name,
              " requires grad and is changed in place; use axiscap.ops.cap, which is differentiable");
}

// Returns false if the tensor is not plain. In a call from the dispatcher it raises instead.
bool read_tensor(const Parameter& p, PyObject* object, bool is_dispatched, Tensor& tensor) {
  check_is_tensor(object, p.name.c_str());
  const bool is_plain = tensor.read(object, is_dispatched) && !(p.is_stream && tensor.is_negated());
  if (p.is_changed) check_is_changeable(p, tensor);
  CHECK_VALUE(is_plain || !is_dispatched || tensor.data || !tensor.sizes.data, p.name,
              " has less memory than its shape ", tensor.sizes, " needs");
  CHECK_VALUE(is_plain || !is_dispatched, p.name, " must be a dense tensor with its elements in memory");
  return is_plain;
}

// Sets values[i] to the argument of parameter i.
void match_arguments(const Signature& signature, const PythonCall& call, PyObject** values) {
  const auto& parameters = signature.parameters;
  CHECK_TYPE(call.count <= Py_ssize_t(parameters.size()) &&
                 (call.count == 0 || !parameters[size_t(call.count) - 1].is_keyword_only),
             signature.name, " takes fewer positional arguments than ", call.count);
  std::copy_n(call.arguments, call.count, values);
  const Py_ssize_t keywords = call.names ? PyTuple_GET_SIZE(call.names) : 0;
  for (Py_ssize_t k = 0; k < keywords; ++k) {
    PyObject* name = PyTuple_GET_ITEM(call.names, k);
    size_t i = 0;
    while (i < parameters.size() && parameters[i].interned != name) ++i;
    if (i == parameters.size())  // the name may be equal but not interned
      for (i = 0; i < parameters.size() && PyUnicode_Compare(parameters[i].interned, name) != 0;) ++i;
    CHECK_TYPE(i < parameters.size(), signature.name, " has no argument ", PyUnicode_AsUTF8(name));
    CHECK_TYPE(!values[i], signature.name, " got ", parameters[i].name, " twice");
    values[i] = call.arguments[call.count + k];
  }
  for (size_t i = 0; i < parameters.size(); ++i)
    CHECK_TYPE(!parameters[i].is_required || (values[i] && values[i] != Py_None), signature.name, " needs ",
               parameters[i].name);
}

struct BoundOp {
  const Op& op;
  Signature signature;
  PyMethodDef function{}, kernel{};

  explicit BoundOp(const Op& op) : op(op), signature(op.schema) {}
};

PyObject* call_op(PyObject* self, const PythonCall& call, bool is_dispatched) {
  return call_guarded([&] {
    const auto& bound = *static_cast<const BoundOp*>(PyCapsule_GetPointer(self, nullptr));
    BoundArguments arguments;
    if (arguments.bind(bound.signature, call, is_dispatched)) return bound.op.run(arguments).release().ptr();
    const py::object op = py::module_::import("torch").attr("ops").attr("axiscap").attr(bound.signature.name.c_str());
    return PyObject_Vectorcall(op.ptr(), call.arguments, size_t(call.count), call.names);
  });
}

PyObject* call_function(PyObject* self, PyObject* const* arguments, Py_ssize_t count, PyObject* names) {
  return call_op(self, {arguments, count, names}, false);
}

PyObject* call_kernel(PyObject* self, PyObject* const* arguments, Py_ssize_t count, PyObject* names) {
  return call_op(self, {arguments, count, names}, true);
}

}  // namespace

Signature::Signature(const char* text) {
  const std::string_view schema = text;
  const size_t begin = schema.find('('), end = schema.rfind(") ->");
  const std::string_view full_name = schema.substr(0, begin);
  name = full_name.substr(0, full_name.find('.'));
  is_overload = name.size() < full_name.size();
  bool is_keyword_only = false;
  for (size_t part_begin = begin + 1; part_begin < end;) {
    const size_t part_end = std::min(schema.find(", ", part_begin), end);
    const std::string_view part = schema.substr(part_begin, part_end - part_begin);
    part_begin = part_end + 2;
    if (part == "*") {
      is_keyword_only = true;
      continue;
    }
    const size_t space = part.rfind(' '), equals = part.find('=');
    Parameter p;
    p.name = part.substr(space + 1, equals == part.npos ? part.npos : equals - space - 1);
    p.interned = PyUnicode_InternFromString(p.name.c_str());
    p.tensor = find(kTensorArguments, p.name);
    p.number = find(kNumberArguments, p.name);
    p.is_stream = p.name == "hidden" || p.name == "hiddens" || p.name == "residual";
    p.is_changed = part.find('!') != part.npos;
    p.is_required = equals == part.npos;
    p.is_keyword_only = is_keyword_only;
    parameters.push_back(std::move(p));
  }
}

bool BoundArguments::bind(const Signature& signature, const PythonCall& call, bool is_dispatched) {
  match_arguments(signature, call, values);
  if (in_dual_level()) {
    PyErr_Format(PyExc_NotImplementedError, "axiscap::%s has no forward-mode derivative", signature.name.c_str());
    throw py::error_already_set();
  }
  if (signature.is_overload) extent = Extent::kAtLeast;
  bool is_plain = true;
  for (size_t i = 0; i < signature.parameters.size(); ++i) {
    const Parameter& p = signature.parameters[i];
    if (!values[i] || values[i] == Py_None) continue;
    if (p.number) {
      this->*p.number = py::handle(values[i]).cast<double>();
    } else if (p.tensor) {
      is_plain &= read_tensor(p, values[i], is_dispatched, tensors[i]);
      this->*p.tensor = &tensors[i];
      add({&tensors[i], p.name.c_str(), p.is_changed});
    } else {
      for (const py::handle item : py::reinterpret_borrow<py::sequence>(values[i]))
        is_plain &= read_tensor(p, item.ptr(), is_dispatched, hiddens.emplace_back());
    }
  }
  return is_plain;
}

void bind_ops(py::module_& m) {
  static std::vector<BoundOp> bound_ops(ops().begin(), ops().end());
  py::list registrations;
  for (BoundOp& op : bound_ops) {
    const auto make_function = [&](PyMethodDef& definition, auto* function) {
      definition = {op.signature.name.c_str(), reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
                    METH_FASTCALL | METH_KEYWORDS, op.op.schema};
      return py::reinterpret_steal<py::object>(PyCFunction_New(&definition, py::capsule(&op).ptr()));
    };
    py::list names;
    for (const Parameter& p : op.signature.parameters) names.append(p.name);
    registrations.append(py::make_tuple(op.op.schema, names, make_function(op.kernel, call_kernel)));
    if (!op.signature.is_overload) m.attr(op.signature.name.c_str()) = make_function(op.function, call_function);
  }
  m.attr("OPS") = registrations;
}

}  // namespace axiscap
