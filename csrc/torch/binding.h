// The Python binding of the ops: it assigns the arguments of a call to the parameters of the op's schema.
#pragma once

#include <string>
#include <vector>

#include "torch/ops.h"

namespace axiscap {

// Runs a function for Python. A C++ exception becomes a Python exception and the result null.
template <class Function>
PyObject* call_guarded(Function function) noexcept {
  try {
    return function();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// A call in Python's vectorcall convention: `count` positional arguments, then one for each name of `names`, a tuple or
// null.
struct PythonCall {
  PyObject* const* arguments;
  Py_ssize_t count;
  PyObject* names;
};

struct Parameter {
  std::string name;
  PyObject* interned;
  // The member of Arguments for the parameter. If both are null, it is `hiddens`.
  Optional Arguments::* tensor = nullptr;
  double Arguments::* number = nullptr;
  // Whether the tensor may be a negated view, which is then refused. Only a stream may: a negated view is the imaginary
  // part of a conjugated tensor, which is not contiguous, and all other tensors must be contiguous.
  bool is_stream = false;
  bool is_changed = false, is_required = false, is_keyword_only = false;
};

// A parsed schema.
struct Signature {
  std::string name;  // cap_
  bool is_overload;  // .buffers
  std::vector<Parameter> parameters;

  explicit Signature(const char* schema);
};

// The arguments of a call with the storage of the tensors that they point to.
struct BoundArguments : Arguments {
  static constexpr int kMaxParameters = 16;
  PyObject* values[kMaxParameters] = {};  // by parameter; null: the caller has left it out
  Tensor tensors[kMaxParameters];

  BoundArguments() = default;
  BoundArguments(const BoundArguments&) = delete;  // the arguments point into `tensors`

  // Returns false if a tensor is not plain: a subclass of Tensor, a tensor of a mode or transform, sparse, negated or
  // without data. Such a call goes to torch's dispatcher. A call from the dispatcher (is_dispatched) raises instead.
  bool bind(const Signature& signature, const PythonCall& call, bool is_dispatched);
};

// Adds each op as a function such as `cap_`, which passes a call with tensors that are not plain to the dispatcher.
// Adds OPS with (schema, names of the arguments, kernel) for each op, for torch.library.
void bind_ops(py::module_& m);

}  // namespace axiscap
