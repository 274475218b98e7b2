// The module axiscap._C: the definitions of the other files, ggml's callback, and facts about the build.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <bit>
#include <map>
#include <optional>
#include <vector>

#include "ggml/callback.h"
#include "hooks/layer.h"
#include "kernels/cuda/plan.h"
#include "launchers/accelerator.h"
#include "launchers/cpu.h"
#include "torch/bank.h"

using namespace pybind11::literals;

namespace axiscap {
namespace {

// ggml's callback, and references to the banks and statistics that it uses.
struct GgmlCallback {
  using Functions = std::array<uintptr_t, 6>;  // addresses, in the order of ggml::Library
  py::list layers;  // for each layer (bank, statistics (S, K, fields)), or None if it is not capped
  ggml::Callback callback;

  GgmlCallback(const Functions& functions, const py::list& layers_)
      : layers(layers_), callback(make_callback(functions, layers)) {}
  GgmlCallback(const GgmlCallback&) = delete;  // ggml has the address of the callback

  static ggml::Callback make_callback(const Functions& functions, const py::list& layers) {
    std::vector<int64_t> sizes;
    std::vector<ggml::Callback::Layer> callback_layers(layers.size());
    for (size_t i = 0; i < callback_layers.size(); ++i) {
      if (layers[i].is_none()) continue;
      const auto pair = layers[i].cast<py::tuple>();
      Tensor tensors[Bank::kMaxTensors];
      Arguments arguments;
      CHECK_VALUE(pair[0].cast<const Bank&>().add_to(arguments, tensors), "a bank has moved");
      const Tensor& axes = *arguments.axes;
      if (sizes.empty()) sizes.assign(axes.sizes.begin(), axes.sizes.end());
      const Sizes first{sizes.data(), int64_t(sizes.size())};
      CHECK_VALUE(axes.device.is_cpu() && axes.sizes == first, "banks must be of one size, on the CPU");
      CapParams p;
      use_bank(p, arguments);
      callback_layers[i] = {axes.as<const float>(),         p.lifts, p.floors, p.targets, p.norm_limits,
                            check_stats(pair[1], arguments)};
    }
    CHECK_VALUE(!sizes.empty(), "at least one layer must be capped");
    return {std::bit_cast<ggml::Library>(functions), std::move(callback_layers), sizes[0], sizes[1], sizes[2]};
  }
};

// Runs `pass` over the bytes of a tensor, in the threads of the ops: the memory bound of a benchmark.
template <class Function>
void run_pass(const py::object& object, Function pass) {
  Tensor tensor;
  check_is_tensor(object.ptr(), "tensor");
  CHECK_VALUE(tensor.read(object.ptr(), false) && tensor.device.is_cpu() && tensor.is_contiguous(),
              "tensor must be contiguous and on the CPU");
  constexpr int64_t kGrain = 64 * 1024;
  parallel_for(0, tensor.numel * tensor.item_bytes, kGrain,
               [&](int64_t begin, int64_t end) { pass(tensor.data + begin, end - begin); });
}

void define_ggml(py::module_& m) {
  py::class_<GgmlCallback>(m, "GgmlCallback")
      .def(py::init<const GgmlCallback::Functions&, const py::list&>(), "functions"_a, "layers"_a)
      .def_property_readonly_static(
          "function", [](const py::object&) { return reinterpret_cast<uintptr_t>(&ggml::Callback::call); })
      .def_property_readonly("data",
                             [](const GgmlCallback& self) { return reinterpret_cast<uintptr_t>(&self.callback); })
      .def(
          "announce",
          [](GgmlCallback& self, std::vector<int32_t> slots, std::vector<uint8_t> outputs) {
            ggml::Callback& callback = self.callback;
            CHECK_VALUE(slots.size() == outputs.size(), "slots and outputs must have an entry for each row");
            CHECK_INDEX(
                std::all_of(slots.begin(), slots.end(), [&](int32_t slot) { return callback.is_valid_slot(slot); }),
                "a slot is neither -1 nor one of the bank's");
            callback.announce(std::move(slots), std::move(outputs));
          },
          "slots"_a, "outputs"_a)
      .def("end", [](GgmlCallback& self) { return self.callback.end(); })
      .def(
          "set_default_slot",
          [](GgmlCallback& self, int32_t slot) {
            CHECK_INDEX(self.callback.is_valid_slot(slot), "slot is neither -1 nor one of the bank's");
            self.callback.set_default_slot(slot);
          },
          "slot"_a);
}

void define_tools(py::module_& m) {
  m.def(
      "read_pass",
      [](const py::object& tensor) {
        run_pass(tensor, [](const char* data, int64_t bytes) {
          // The compiler could drop the pass if nothing used its result.
          [[maybe_unused]] volatile uint64_t sink = cpu::read_pass(data, bytes);
        });
      },
      "tensor"_a);
  m.def(
      "read_modify_write_pass", [](const py::object& tensor) { run_pass(tensor, cpu::read_modify_write_pass); },
      "tensor"_a);
  m.def("isa", &cpu::isa);
  m.def(
      "plan",
      [](const std::string& dtype, int64_t hidden_size, int64_t rows, int64_t max_blocks) {
        static const std::map<std::string, DType> kDTypes{
            {"float32", DType::kFloat32}, {"bfloat16", DType::kBFloat16}, {"float16", DType::kFloat16}};
        CHECK_VALUE(kDTypes.count(dtype), "dtype must be float32, bfloat16 or float16, got ", dtype);
        CHECK_VALUE(hidden_size >= 1 && hidden_size <= cuda::kMaxHiddenSize, "hidden_size must be from 1 to ",
                    cuda::kMaxHiddenSize, ", got ", hidden_size);
        CHECK_VALUE(rows >= 0, "rows must not be negative, got ", rows);
        CHECK_VALUE(max_blocks >= 1, "max_blocks must be at least 1, got ", max_blocks);
        const cuda::Plan plan = cuda::plan_for(kDTypes.at(dtype), hidden_size, rows, max_blocks);
        return py::make_tuple(plan.threads_per_row, plan.block, plan.shared_bytes, plan.grid);
      },
      "dtype"_a, "hidden_size"_a, "rows"_a, "max_blocks"_a);
  m.def(
      "stats_plan",
      [](int64_t rows, int64_t slots, int64_t layers) {
        StatsParams p;
        p.rows = rows, p.num_slots = slots, p.layers = layers;
        const cuda::StatsPlan plan = cuda::stats_plan_for(p);
        return py::make_tuple(plan.block_per_slot, plan.block, plan.grid);
      },
      "rows"_a, "slots"_a, "layers"_a);
  m.def("accelerator", []() { return accelerator ? accelerator->name : nullptr; });
  m.def("accelerator_versions", []() -> std::optional<std::pair<int, int>> {
    if (!accelerator) return std::nullopt;
    return std::pair(accelerator->runtime_version, accelerator->driver_version());
  });
  py::tuple fields(int64_t{kStatFields});  // by their positions in StatField, so that Python has no order of its own
  fields[kSeen] = "seen";
  fields[kFired] = "fired";
  fields[kBelow] = "below";
  fields[kNonFinite] = "nonfinite";
  fields[kSum] = "sum";
  fields[kMin] = "min";
  fields[kMax] = "max";
  fields[kShortfall] = "shortfall";
  m.attr("STAT_FIELDS") = fields;
  m.attr("MAX_DIRECTIONS") = kMaxDirections;
}

PYBIND11_MODULE(_C, m) {
  import_torch();
  bind_ops(m);
  define_bank(m);
  define_layers(m);
  define_ggml(m);
  define_tools(m);
}

}  // namespace
}  // namespace axiscap
