// The pybind11 door: the same ops, called without the dispatcher.
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "axiscap/accelerator.h"
#include "axiscap/cpu.h"
#include "axiscap/ggml.h"
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

bool is_plain(at::TensorList tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor& tensor) { return is_plain(tensor); });
}

bool is_plain(double) { return true; }

// An op's door: the op itself on plain tensors, and else the dispatcher, under the same name with the same arguments.
template <class... Arguments>
auto door(const char* name, void (*op)(Arguments...)) {
  const auto dispatched = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<void(Arguments...)>();
  return [op, dispatched](Arguments... arguments) {
    if ((is_plain(arguments) && ...)) return op(arguments...);
    dispatched.call(arguments...);
  };
}

// A bank that holds its tensors, checked once; once more where somebody freed, moved or resized one since.
struct KeptBank {
  Tensor axes;
  Tensor floors;
  OptionalTensor lifts;
  OptionalTensor limits;
  Bank bank;

  KeptBank(Tensor axes_, Tensor floors_, OptionalTensor lifts_, OptionalTensor limits_)
      : axes(std::move(axes_)),
        floors(std::move(floors_)),
        lifts(std::move(lifts_)),
        limits(std::move(limits_)),
        bank(axes, floors, lifts, limits) {
    TORCH_CHECK_VALUE(is_plain(axes) && is_plain(floors) && is_plain(lifts) && is_plain(limits),
                      "a bank is made of dense tensors with data");
    check_values(bank);
  }
  KeptBank(const KeptBank&) = delete;  // the bank refers to its neighbours
};

// ggml's callback with the banks and statistics that it refers to.
struct KeptCallback {
  py::list layers;  // of each layer: a bank and its statistics (S, K, fields), or None where it is not capped
  ggml::Callback callback;

  KeptCallback(const std::vector<uintptr_t>& functions, const py::list& layers_)
      : layers(layers_), callback(make(functions, layers)) {}
  KeptCallback(const KeptCallback&) = delete;  // the callback is known by its address

  static ggml::Callback make(const std::vector<uintptr_t>& functions, const py::list& layers) {
    TORCH_CHECK_VALUE(functions.size() == 6, "functions must be six addresses");
    ggml::Library library;
    library.get_name = reinterpret_cast<decltype(library.get_name)>(functions[0]);
    library.nelements = reinterpret_cast<decltype(library.nelements)>(functions[1]);
    library.nrows = reinterpret_cast<decltype(library.nrows)>(functions[2]);
    library.nbytes = reinterpret_cast<decltype(library.nbytes)>(functions[3]);
    library.tensor_get = reinterpret_cast<decltype(library.tensor_get)>(functions[4]);
    library.tensor_set = reinterpret_cast<decltype(library.tensor_set)>(functions[5]);
    std::vector<int64_t> sizes;
    std::vector<ggml::Callback::Layer> made(layers.size());
    for (size_t i = 0; i < made.size(); ++i) {
      if (layers[i].is_none()) continue;
      const auto pair = layers[i].cast<py::tuple>();
      const KeptBank& kept = pair[0].cast<const KeptBank&>();
      const Tensor stats = pair[1].cast<Tensor>();
      if (sizes.empty()) sizes = kept.axes.sizes().vec();
      TORCH_CHECK_VALUE(kept.axes.is_cpu() && kept.axes.sizes() == sizes, "banks must be of one size, on the CPU");
      TORCH_CHECK_VALUE(stats.is_cpu() && stats.is_contiguous() && stats.scalar_type() == at::kDouble &&
                            stats.sizes() == at::IntArrayRef({sizes[0], sizes[1], kStatFields}),
                        "stats must be (S, K, fields) float64, contiguous, on the CPU");
      made[i].axes = kept.axes.const_data_ptr<float>();
      made[i].floors = kept.floors.const_data_ptr<float>();
      made[i].lifts = kept.lifts ? kept.lifts->const_data_ptr<float>() : nullptr;
      made[i].limits = kept.limits ? kept.limits->const_data_ptr<float>() : nullptr;
      made[i].stats = stats.mutable_data_ptr<double>();
    }
    TORCH_CHECK_VALUE(!sizes.empty(), "at least one layer must be capped");
    return {library, std::move(made), sizes[0], sizes[1], sizes[2]};
  }
};

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

  const auto cap_door = door("axiscap::cap_", cap_);
  py::class_<KeptBank>(m, "Bank")
      .def(py::init<Tensor, Tensor, OptionalTensor, OptionalTensor>(), "axes"_a, "floors"_a, "lifts"_a = py::none(),
           "limits"_a = py::none())
      .def_readonly("axes", &KeptBank::axes)
      .def_readonly("floors", &KeptBank::floors)
      .def_readonly("lifts", &KeptBank::lifts)
      .def_readonly("limits", &KeptBank::limits)
      .def(
          "cap_",
          [cap_door](const KeptBank& kept, const Tensor& hidden, Optional slots, Optional projections) {
            if (is_plain(hidden) && is_plain(slots) && is_plain(projections) && kept.bank.is_as_it_was())
              return cap_bank_(hidden, kept.bank, slots, projections);
            cap_door(hidden, kept.axes, kept.floors, slots, kept.lifts, kept.limits, projections);
          },
          "hidden"_a, "slots"_a = py::none(), "projections"_a = py::none());

  const auto slots = "slots"_a = py::none(), lifts = "lifts"_a = py::none(), limits = "limits"_a = py::none(),
             projections = "projections"_a = py::none();
  m.def("cap_", cap_door, "hidden"_a, "axes"_a, "floors"_a, slots, lifts, limits, projections);
  m.def("cap_residual_", door("axiscap::cap_residual_", cap_residual_), "hidden"_a, "residual"_a, "axes"_a, "floors"_a,
        slots, lifts, limits, projections);
  m.def("add_rms_norm_cap_", door("axiscap::add_rms_norm_cap_", add_rms_norm_cap_), "hidden"_a, "residual"_a,
        "weight"_a, "eps"_a, "axes"_a, "floors"_a, slots, "weight_bias"_a = 0.0, lifts, limits, projections);
  m.def(
      "cap_layers_",
      [cap_layers = door("axiscap::cap_layers_", cap_layers_)](const std::vector<Tensor>& hiddens, const Tensor& axes,
                                                               const Tensor& floors, Optional slots, Optional lifts,
                                                               Optional limits, Optional projections) {
        cap_layers(hiddens, axes, floors, slots, lifts, limits, projections);
      },
      "hiddens"_a, "axes"_a, "floors"_a, slots, lifts, limits, projections);
  m.def("accumulate_", door("axiscap::accumulate_", accumulate_), "stats"_a, "projections"_a, "floors"_a, slots);

  py::class_<KeptCallback>(m, "GgmlCallback")
      .def(py::init<const std::vector<uintptr_t>&, const py::list&>(), "functions"_a, "layers"_a)
      .def_property_readonly_static(
          "function", [](const py::object&) { return reinterpret_cast<uintptr_t>(&ggml::Callback::call); })
      .def_property_readonly("data",
                             [](const KeptCallback& kept) { return reinterpret_cast<uintptr_t>(&kept.callback); })
      .def(
          "announce",
          [](KeptCallback& kept, std::vector<int32_t> rows, std::vector<uint8_t> outputs) {
            TORCH_CHECK_VALUE(rows.size() == outputs.size(), "slots and outputs must have an entry for each row");
            TORCH_CHECK_INDEX(std::all_of(rows.begin(), rows.end(), [&](int32_t s) { return kept.callback.has(s); }),
                              "a slot is neither -1 nor one of the bank's");
            kept.callback.announce(std::move(rows), std::move(outputs));
          },
          "slots"_a, "outputs"_a)
      .def("end", [](KeptCallback& kept) { return kept.callback.end(); })
      .def(
          "set_other",
          [](KeptCallback& kept, int32_t slot) {
            TORCH_CHECK_INDEX(kept.callback.has(slot), "slot is neither -1 nor one of the bank's");
            kept.callback.set_other(slot);
          },
          "slot"_a);

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
        TORCH_CHECK_VALUE(hidden_size >= 1 && hidden_size <= cuda::kMaxHiddenSize, "hidden_size must be from 1 to ",
                          cuda::kMaxHiddenSize, ", got ", hidden_size);
        TORCH_CHECK_VALUE(rows >= 0, "rows must not be negative, got ", rows);
        TORCH_CHECK_VALUE(resident >= 1, "resident must be at least 1, got ", resident);
        const cuda::Plan plan = cuda::plan_for(type, hidden_size, rows, resident);
        return py::make_tuple(plan.threads_per_row, plan.block, plan.shared_bytes, plan.grid);
      },
      "dtype"_a, "hidden_size"_a, "rows"_a, "resident"_a);
  m.def(
      "stats_plan",
      [](int64_t rows, int64_t slots, int64_t layers) {
        StatsParams p;
        p.rows = rows, p.num_slots = slots, p.layers = layers;
        const cuda::StatsPlan plan = cuda::stats_plan_for(p);
        return py::make_tuple(plan.whole, plan.block, plan.grid);
      },
      "rows"_a, "slots"_a, "layers"_a);
  m.def("accelerator", []() { return accelerator ? accelerator->name : nullptr; });
  m.def("accelerator_versions", []() -> std::optional<std::pair<int, int>> {
    if (!accelerator) return std::nullopt;
    return std::pair(accelerator->runtime, accelerator->driver());
  });
  m.attr("STAT_FIELDS") = py::make_tuple("seen", "fired", "below", "nonfinite", "sum", "min", "max", "shortfall");
  m.attr("MAX_DIRECTIONS") = kMaxDirections;
}

}  // namespace
}  // namespace axiscap
