// The module axiscap._C: what the other files define, ggml's callback, and what tools ask of the build.
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

// ggml's callback with the banks and statistics that it refers to.
struct KeptCallback {
  using Functions = std::array<uintptr_t, 6>;  // addresses, in the order of ggml::Library
  py::list layers;  // of each layer: a bank and its statistics (S, K, fields), or None where it is not capped
  ggml::Callback callback;

  KeptCallback(const Functions& functions, const py::list& layers_)
      : layers(layers_), callback(make(functions, layers)) {}
  KeptCallback(const KeptCallback&) = delete;  // the callback is known by its address

  static ggml::Callback make(const Functions& functions, const py::list& layers) {
    std::vector<int64_t> sizes;
    std::vector<ggml::Callback::Layer> made(layers.size());
    for (size_t i = 0; i < made.size(); ++i) {
      if (layers[i].is_none()) continue;
      const auto pair = layers[i].cast<py::tuple>();
      const KeptBank& kept = pair[0].cast<const KeptBank&>();
      Tensor tensors[KeptBank::kMaxTensors];
      Arguments bank;
      CHECK_VALUE(kept.add_to(bank, tensors), "a bank has moved");
      const Tensor& axes = *bank.axes;
      if (sizes.empty()) sizes.assign(axes.sizes.begin(), axes.sizes.end());
      const Sizes first{sizes.data(), int64_t(sizes.size())};
      CHECK_VALUE(axes.device.is_cpu() && axes.sizes == first, "banks must be of one size, on the CPU");
      CapParams p;
      use_bank(p, bank);
      made[i] = {axes.as<const float>(), p.lifts, p.floors, p.targets, p.norm_limits, check_stats(pair[1], bank)};
    }
    CHECK_VALUE(!sizes.empty(), "at least one layer must be capped");
    return {std::bit_cast<ggml::Library>(functions), std::move(made), sizes[0], sizes[1], sizes[2]};
  }
};

// Runs `pass` over a tensor's bytes, with the threads that the ops would use: the memory bound of a benchmark.
template <class Function>
void over_bytes(const py::object& object, Function pass) {
  Tensor tensor;
  check_is_tensor(object.ptr(), "tensor");
  CHECK_VALUE(tensor.read(object.ptr(), false) && tensor.device.is_cpu() && tensor.is_contiguous(),
              "tensor must be contiguous and on the CPU");
  constexpr int64_t kGrain = 64 * 1024;
  parallel_for(0, tensor.numel * tensor.item_bytes, kGrain,
               [&](int64_t begin, int64_t end) { pass(tensor.data + begin, end - begin); });
}

void define_ggml(py::module_& m) {
  py::class_<KeptCallback>(m, "GgmlCallback")
      .def(py::init<const KeptCallback::Functions&, const py::list&>(), "functions"_a, "layers"_a)
      .def_property_readonly_static(
          "function", [](const py::object&) { return reinterpret_cast<uintptr_t>(&ggml::Callback::call); })
      .def_property_readonly("data",
                             [](const KeptCallback& kept) { return reinterpret_cast<uintptr_t>(&kept.callback); })
      .def(
          "announce",
          [](KeptCallback& kept, std::vector<int32_t> rows, std::vector<uint8_t> outputs) {
            CHECK_VALUE(rows.size() == outputs.size(), "slots and outputs must have an entry for each row");
            CHECK_INDEX(std::all_of(rows.begin(), rows.end(), [&](int32_t s) { return kept.callback.has(s); }),
                        "a slot is neither -1 nor one of the bank's");
            kept.callback.announce(std::move(rows), std::move(outputs));
          },
          "slots"_a, "outputs"_a)
      .def("end", [](KeptCallback& kept) { return kept.callback.end(); })
      .def(
          "set_other",
          [](KeptCallback& kept, int32_t slot) {
            CHECK_INDEX(kept.callback.has(slot), "slot is neither -1 nor one of the bank's");
            kept.callback.set_other(slot);
          },
          "slot"_a);
}

void define_tools(py::module_& m) {
  m.def(
      "read_pass",
      [](const py::object& tensor) {
        over_bytes(tensor, [](const char* data, int64_t bytes) {
          // The result is the proof that the bytes were read; without a use the compiler may drop the pass.
          [[maybe_unused]] volatile uint64_t sink = cpu::read_pass(data, bytes);
        });
      },
      "tensor"_a);
  m.def(
      "read_modify_write_pass", [](const py::object& tensor) { over_bytes(tensor, cpu::read_modify_write_pass); },
      "tensor"_a);
  m.def("isa", &cpu::isa);
  m.def(
      "plan",
      [](const std::string& dtype, int64_t hidden_size, int64_t rows, int64_t resident) {
        static const std::map<std::string, DType> kTypes{
            {"float32", DType::kFloat32}, {"bfloat16", DType::kBFloat16}, {"float16", DType::kFloat16}};
        CHECK_VALUE(kTypes.count(dtype), "dtype must be float32, bfloat16 or float16, got ", dtype);
        CHECK_VALUE(hidden_size >= 1 && hidden_size <= cuda::kMaxHiddenSize, "hidden_size must be from 1 to ",
                    cuda::kMaxHiddenSize, ", got ", hidden_size);
        CHECK_VALUE(rows >= 0, "rows must not be negative, got ", rows);
        CHECK_VALUE(resident >= 1, "resident must be at least 1, got ", resident);
        const cuda::Plan plan = cuda::plan_for(kTypes.at(dtype), hidden_size, rows, resident);
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
