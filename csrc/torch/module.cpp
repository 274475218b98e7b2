// The pybind11 door: the same ops, called without the dispatcher.
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/utils/pybind.h>

#include "axiscap/accelerator.h"
#include "axiscap/cpu.h"
#include "axiscap/plan.h"
#include "ops.h"

namespace py = pybind11;
using namespace py::literals;

namespace axiscap {
namespace {

using at::Tensor;
using Optional = const OptionalTensor&;

// The exception types that torch gives the same errors through its dispatcher.
void translate(std::exception_ptr pointer) {
  try {
    std::rethrow_exception(pointer);
  } catch (const c10::IndexError& error) {
    PyErr_SetString(PyExc_IndexError, error.what_without_backtrace());
  } catch (const c10::ValueError& error) {
    PyErr_SetString(PyExc_ValueError, error.what_without_backtrace());
  } catch (const c10::TypeError& error) {
    PyErr_SetString(PyExc_TypeError, error.what_without_backtrace());
  } catch (const c10::Error& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what_without_backtrace());
  }
}

// Whether a tensor's memory is what its sizes and strides say. Another one belongs to a mode, a transform, a layout or
// a subclass (a fake one, a DTensor, a vmapped one, a sparse one): it goes through the dispatcher, where its owner does
// his part, or there is no kernel for it.
bool is_plain(const Tensor& tensor) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet kDense(DispatchKey::Dense);
  constexpr c10::DispatchKeySet kOwned({DispatchKey::Python, DispatchKey::Functionalize, DispatchKey::FuncTorchBatched,
                                        DispatchKey::FuncTorchGradWrapper, DispatchKey::BatchedNestedTensor,
                                        DispatchKey::Negative, DispatchKey::Conjugate, DispatchKey::ZeroTensor});
  const c10::DispatchKeySet keys = tensor.key_set();
  return keys.has_all(kDense) && !keys.has_any(kOwned) && !keys.has_backend(c10::BackendComponent::MetaBit);
}

bool is_plain(Optional tensor) { return !tensor || is_plain(*tensor); }

template <class... Tensors>
bool are_plain(const Tensors&... tensors) {
  return (is_plain(tensors) && ...);
}

void door_cap_(const Tensor& hidden, const Tensor& axes, const Tensor& floors, Optional slots, Optional projections,
               Optional lifts, Optional limits) {
  if (are_plain(hidden, axes, floors, slots, projections, lifts, limits))
    return cap_(hidden, Bank(axes, floors, lifts, limits), slots, projections);
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("axiscap::cap_", "")
          .typed<void(const Tensor&, const Tensor&, const Tensor&, Optional, Optional, Optional, Optional)>();
  op.call(hidden, axes, floors, slots, lifts, limits, projections);
}

void door_cap_residual_(const Tensor& hidden, const Tensor& residual, const Tensor& axes, const Tensor& floors,
                        Optional slots, Optional projections, Optional lifts, Optional limits) {
  if (are_plain(hidden, residual, axes, floors, slots, projections, lifts, limits))
    return cap_residual_(hidden, residual, Bank(axes, floors, lifts, limits), slots, projections);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("axiscap::cap_residual_", "")
                             .typed<void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, Optional, Optional,
                                         Optional, Optional)>();
  op.call(hidden, residual, axes, floors, slots, lifts, limits, projections);
}

void door_add_rms_norm_cap_(const Tensor& hidden, const Tensor& residual, const Tensor& weight, double eps,
                            const Tensor& axes, const Tensor& floors, Optional slots, double weight_bias,
                            Optional projections, Optional lifts, Optional limits) {
  if (are_plain(hidden, residual, weight, axes, floors, slots, projections, lifts, limits))
    return add_rms_norm_cap_(hidden, residual, weight, eps, Bank(axes, floors, lifts, limits), slots, weight_bias,
                             projections);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("axiscap::add_rms_norm_cap_", "")
                             .typed<void(const Tensor&, const Tensor&, const Tensor&, double, const Tensor&,
                                         const Tensor&, Optional, double, Optional, Optional, Optional)>();
  op.call(hidden, residual, weight, eps, axes, floors, slots, weight_bias, lifts, limits, projections);
}

void door_cap_layers_(const std::vector<Tensor>& hiddens, const Tensor& axes, const Tensor& floors, Optional slots,
                      Optional projections, Optional lifts, Optional limits) {
  bool plain = are_plain(axes, floors, slots, projections, lifts, limits);
  for (const Tensor& hidden : hiddens) plain = plain && is_plain(hidden);
  if (plain) return cap_layers_(hiddens, Bank(axes, floors, lifts, limits, true), slots, projections);
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("axiscap::cap_layers_", "")
          .typed<void(at::TensorList, const Tensor&, const Tensor&, Optional, Optional, Optional, Optional)>();
  op.call(hiddens, axes, floors, slots, lifts, limits, projections);
}

void door_accumulate_(const Tensor& stats, const Tensor& projections, const Tensor& floors, Optional slots) {
  if (are_plain(stats, projections, floors, slots)) return accumulate_(stats, projections, floors, slots);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("axiscap::accumulate_", "")
                             .typed<void(const Tensor&, const Tensor&, const Tensor&, Optional)>();
  op.call(stats, projections, floors, slots);
}

// The memory bound over a tensor's bytes, with the threads that the ops would use.
template <class Pass>
void over_bytes(const Tensor& tensor, Pass pass) {
  TORCH_CHECK_VALUE(tensor.is_cpu() && tensor.is_contiguous(), "tensor must be contiguous and on the CPU");
  constexpr int64_t kGrain = 64 * 1024;
  char* data = static_cast<char*>(tensor.mutable_data_ptr());
  at::parallel_for(0, tensor.nbytes(), kGrain, [&](int64_t begin, int64_t end) { pass(data + begin, end - begin); });
}

PYBIND11_MODULE(_C, m) {
  py::register_local_exception_translator(translate);

  py::class_<Bank>(m, "Bank")
      .def(py::init([](const Tensor& axes, const Tensor& floors, Optional lifts, Optional limits) {
             Bank bank(axes, floors, lifts, limits);
             TORCH_CHECK_VALUE(are_plain(axes, floors, lifts, limits), "a bank is made of dense tensors with data");
             check_values(bank);
             return bank;
           }),
           "axes"_a, "floors"_a, "lifts"_a = py::none(), "limits"_a = py::none())
      .def_readonly("axes", &Bank::axes)
      .def_readonly("floors", &Bank::floors)
      .def_readonly("lifts", &Bank::lifts)
      .def_readonly("limits", &Bank::limits)
      .def(
          "cap_",
          [](const Bank& bank, const Tensor& hidden, Optional slots, Optional projections) {
            if (are_plain(hidden, slots, projections)) return cap_(hidden, bank, slots, projections);
            door_cap_(hidden, bank.axes, bank.floors, slots, projections, bank.lifts, bank.limits);
          },
          "hidden"_a, "slots"_a = py::none(), "projections"_a = py::none());

  m.def("cap_", &door_cap_, "hidden"_a, "axes"_a, "floors"_a, "slots"_a = py::none(), "projections"_a = py::none(),
        "lifts"_a = py::none(), "limits"_a = py::none());
  m.def("cap_residual_", &door_cap_residual_, "hidden"_a, "residual"_a, "axes"_a, "floors"_a, "slots"_a = py::none(),
        "projections"_a = py::none(), "lifts"_a = py::none(), "limits"_a = py::none());
  m.def("add_rms_norm_cap_", &door_add_rms_norm_cap_, "hidden"_a, "residual"_a, "weight"_a, "eps"_a, "axes"_a,
        "floors"_a, "slots"_a = py::none(), "weight_bias"_a = 0.0, "projections"_a = py::none(), "lifts"_a = py::none(),
        "limits"_a = py::none());
  m.def("cap_layers_", &door_cap_layers_, "hiddens"_a, "axes"_a, "floors"_a, "slots"_a = py::none(),
        "projections"_a = py::none(), "lifts"_a = py::none(), "limits"_a = py::none());
  m.def("accumulate_", &door_accumulate_, "stats"_a, "projections"_a, "floors"_a, "slots"_a = py::none());

  m.def(
      "read_pass",
      [](const Tensor& tensor) {
        over_bytes(tensor, [](const char* data, int64_t bytes) {
          // The result is the proof that the bytes were read; without a use the compiler may drop the pass.
          volatile uint64_t sink = cpu::read_pass(data, bytes);
          (void)sink;
        });
      },
      "tensor"_a);
  m.def(
      "read_modify_write_pass", [](const Tensor& tensor) { over_bytes(tensor, cpu::read_modify_write_pass); },
      "tensor"_a);
  m.def("isa", &cpu::isa);
  m.def(
      "plan",
      [](const std::string& dtype, int64_t hidden_size, int64_t rows, int64_t resident) {
        TORCH_CHECK_VALUE(dtype == "float32" || dtype == "bfloat16" || dtype == "float16",
                          "dtype must be float32, bfloat16 or float16, got ", dtype);
        const DType type = dtype == "float32"    ? DType::kFloat32
                           : dtype == "bfloat16" ? DType::kBFloat16
                                                 : DType::kFloat16;
        TORCH_CHECK_VALUE(hidden_size >= 1 && hidden_size <= cuda::max_hidden_size(type),
                          "hidden_size must be from 1 to ", cuda::max_hidden_size(type), ", got ", hidden_size);
        TORCH_CHECK_VALUE(rows >= 0, "rows must not be negative, got ", rows);
        TORCH_CHECK_VALUE(resident >= 1, "resident must be at least 1, got ", resident);
        const cuda::Plan plan = cuda::plan_for(type, hidden_size, rows, resident);
        return py::make_tuple(plan.threads_per_row, plan.block, plan.shared_bytes, plan.grid);
      },
      "dtype"_a, "hidden_size"_a, "rows"_a, "resident"_a);
  m.def("accelerator", []() { return accelerator ? accelerator->name : nullptr; });
  m.attr("STAT_FIELDS") = py::make_tuple("seen", "fired", "below", "nonfinite", "sum", "min", "max", "shortfall");
  m.attr("MAX_DIRECTIONS") = kMaxDirections;
}

}  // namespace
}  // namespace axiscap
