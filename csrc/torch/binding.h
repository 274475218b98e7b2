// How Python calls an op: arguments are bound to the names of its schema, without a copy of them.
#pragma once

#include <string>
#include <vector>

#include "torch/ops.h"

namespace axiscap {

// Runs a function that Python calls, and turns its exception into Python's.
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

// Positional arguments first, then those that `names` (a tuple, or null) names, as Python's vectorcall passes them.
struct PythonCall {
  PyObject* const* arguments;
  Py_ssize_t count;
  PyObject* names;
};

struct Parameter {
  std::string name;
  PyObject* interned;
  Optional Arguments::* tensor = nullptr;  // or else
  double Arguments::* number = nullptr;    // or else the parameter is `hiddens`
  // Only a stream is asked whether it is a negated view. All else is contiguous, and the imaginary part of a conjugated
  // tensor, which alone is negated, is not.
  bool is_stream = false;
  bool is_changed = false, is_required = false, is_keyword_only = false;
};

// A schema, read once.
struct Signature {
  std::string name;  // cap_
  bool is_overload;  // .buffers
  std::vector<Parameter> parameters;

  explicit Signature(const char* schema);
};

// The arguments of one call, and the tensors that they refer to.
struct BoundArguments : Arguments {
  static constexpr int kMaxParameters = 16;
  PyObject* values[kMaxParameters] = {};  // by parameter; null: none
  Tensor tensors[kMaxParameters];

  BoundArguments() = default;
  BoundArguments(const BoundArguments&) = delete;  // the arguments refer to the tensors

  // Returns false if a tensor is not plain: of a subclass, a mode, a transform; sparse, negated, without data. Its own
  // code runs in torch's dispatcher. With `is_dispatched` that has happened, and such a tensor is refused.
  bool bind(const Signature& signature, const PythonCall& call, bool is_dispatched);
};

// Adds each op as a function (`cap_`), which hands tensors that are not plain to the dispatcher, and OPS: (schema,
// names of the arguments, kernel) of each op, for torch.library.
void bind_ops(py::module_& m);

}  // namespace axiscap
