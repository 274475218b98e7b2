// A bank whose tensors are checked once and used in many calls.
#pragma once

#include <vector>

#include "torch/binding.h"

namespace axiscap {

// References to the tensors of a bank, and the addresses and shapes that they were checked with.
class Bank {
 public:
  Bank(const py::args& arguments, const py::kwargs& keywords);

  // Reads the tensors into `tensors`, which has kMaxTensors entries, and adds them to a call's arguments. Returns false
  // if one has another address or shape than before: the tensors may belong to a module, which can move or free them.
  bool add_to(Arguments& arguments, Tensor* tensors) const;
  static constexpr int kMaxTensors = BoundArguments::kMaxParameters;

  static const Signature& signature();
  py::object operator[](size_t i) const { return entries_[i].object; }  // the tensor of parameter i, or None

 private:
  struct Entry {
    py::object object = py::none();
    py::object capsule;  // keeps one export of the tensor alive, or each `read` would build and free the export's state
    const char* data = nullptr;
    std::vector<int64_t> sizes;
  };
  std::vector<Entry> entries_;  // by parameter
};

// Checks the statistics of a bank, (S, K, fields) float64, contiguous and on its device, and returns their elements.
double* check_stats(const py::object& stats, const Arguments& bank);

// Adds the class Bank.
void define_bank(py::module_& m);

}  // namespace axiscap
