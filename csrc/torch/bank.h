// A bank that stays: checked once, then used in many calls.
#pragma once

#include <vector>

#include "torch/binding.h"

namespace axiscap {

// Holds the tensors of a bank, whose values were checked once.
class KeptBank {
 public:
  KeptBank(const py::args& arguments, const py::kwargs& keywords);

  // Adds the tensors as they are now to a call's arguments. Returns false if somebody freed, moved or resized one
  // since: the caller of Bank owns them, and may share them with a module. `tensors` has a place for each.
  bool add_to(Arguments& arguments, Tensor* tensors) const;
  static constexpr int kMaxTensors = BoundArguments::kMaxParameters;

  static const Signature& signature();
  py::object operator[](size_t i) const { return held_[i].object; }  // of a parameter, or None

 private:
  struct Held {
    py::object object = py::none();
    py::object exported;  // a reference of torch's: without it each look would make the only one, and drop it
    const char* data = nullptr;
    std::vector<int64_t> sizes;
  };
  std::vector<Held> held_;  // by parameter
};

// The statistics (S, K, fields) that belong to a bank, float64 and contiguous on its device.
double* check_stats(const py::object& stats, const Arguments& bank);

// Adds the class Bank.
void define_bank(py::module_& m);

}  // namespace axiscap
