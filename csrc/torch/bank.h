// A bank that stays: checked once, then used in many calls.
#pragma once

#include <array>

#include "torch/binding.h"

namespace axiscap {

// A bank that holds its tensors, with values that were checked once.
struct KeptBank {
  std::array<py::object, 4> objects;  // axes, floors, lifts and limits; the last two may be None
  std::array<py::object, 4> exports;  // references of torch's, without which each look would make and drop the only one
  std::array<const char*, 4> data{};
  std::array<int64_t, 4> numels{};

  KeptBank(const py::object& axes, const py::object& floors, const py::object& lifts, const py::object& limits);

  // Reads the tensors as they are now. Returns false if somebody freed, moved, resized or reshaped one since: the
  // caller of Bank owns them, and may share them with a module.
  bool read(std::array<Tensor, 4>& tensors, Bank& bank) const;

 private:
  Bank bank_of(const std::array<Tensor, 4>& tensors) const {
    return {&tensors[0], &tensors[1], data[2] ? &tensors[2] : nullptr, data[3] ? &tensors[3] : nullptr};
  }
};

// Adds the class Bank.
void define_bank(py::module_& m);

}  // namespace axiscap
