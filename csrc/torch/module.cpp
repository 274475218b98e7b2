// The module axiscap._C: the ops, banks that are checked once, what stands on a layer of a running model, and what
// tools ask of the build.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "ggml/callback.h"
#include "kernels/cuda/plan.h"
#include "launchers/accelerator.h"
#include "launchers/cpu.h"
#include "torch/binding.h"

using namespace pybind11::literals;

namespace axiscap {
namespace {

// A bank that holds its tensors, with values that were checked once.
struct KeptBank {
  std::array<py::object, 4> objects;  // axes, floors, lifts and limits; the last two may be None
  std::array<const char*, 4> data{};
  std::array<int64_t, 4> numels{};

  KeptBank(const py::object& axes, const py::object& floors, const py::object& lifts, const py::object& limits);

  // Reads the tensors as they are now. Returns false if somebody freed, moved or resized one since: the caller of
  // Bank owns them, and may share them with a module.
  bool read(std::array<Tensor, 4>& tensors, Bank& bank) const;

 private:
  Bank bank_of(const std::array<Tensor, 4>& tensors) const {
    return {&tensors[0], &tensors[1], data[2] ? &tensors[2] : nullptr, data[3] ? &tensors[3] : nullptr};
  }
};

constexpr const char* kBankNames[] = {"axes", "floors", "lifts", "limits"};

KeptBank::KeptBank(const py::object& axes, const py::object& floors, const py::object& lifts, const py::object& limits)
    : objects{axes, floors, lifts, limits} {
  std::array<Tensor, 4> tensors;
  const auto is_given = [&](int i) { return i < 2 || !objects[i].is_none(); };
  for (int i = 0; i < 4; ++i)
    if (is_given(i)) check_is_tensor(objects[i].ptr(), kBankNames[i]);
  for (int i = 1; i < 4; ++i) {
    if (!is_given(i)) continue;
    const py::object device = objects[i].attr("device"), wanted = axes.attr("device");
    CHECK_VALUE(device.equal(wanted), kBankNames[i], " must be on the device of axes, ", std::string(py::str(wanted)),
                ", got ", std::string(py::str(device)));
  }
  for (int i = 0; i < 4; ++i) {
    if (!is_given(i)) continue;
    CHECK_VALUE(tensors[i].read(objects[i].ptr(), false) && !tensors[i].is_negated(),
                "a bank is made of dense tensors with data");
    data[i] = tensors[i].data;
    numels[i] = tensors[i].numel;
  }
  const Bank bank = bank_of(tensors);
  bank.check();
  bank.check_values();
}

bool KeptBank::read(std::array<Tensor, 4>& tensors, Bank& bank) const {
  for (int i = 0; i < 4; ++i)
    if (data[i] &&
        (!tensors[i].read(objects[i].ptr(), false) || tensors[i].data != data[i] || tensors[i].numel != numels[i]))
      return false;
  bank = bank_of(tensors);
  return tensors[1].numel * tensors[0].sizes.back() == tensors[0].numel;
}

// Bank.cap_: the op with a bank that needs no more checks.
PyObject* cap_with_bank(PyObject* self, PyObject* const* arguments, Py_ssize_t count, PyObject* names) {
  static const Signature signature("cap_(Tensor(a!) hidden, Tensor? slots=None, Tensor(z!)? projections=None) -> ()");
  return call_guarded([&] {
    // The method descriptor has checked the type of self; pybind11's cast would look it up once more.
    const auto& kept = *reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder().value_ptr<KeptBank>();
    BoundArguments bound;
    std::array<Tensor, 4> tensors;
    Bank bank;
    if (bound.bind(signature, {arguments, count, names}, false) && kept.read(tensors, bank)) {
      bound.axes = bank.axes, bound.floors = bank.floors, bound.lifts = bank.lifts, bound.limits = bank.limits;
      cap_with_checked_bank_(bound);
      return py::none().release().ptr();
    }
    const auto given = [&](int i) {
      return py::reinterpret_borrow<py::object>(bound.given[i] ? bound.given[i] : Py_None);
    };
    const py::object op = py::module_::import("axiscap._C").attr("cap_");
    return op(given(0), kept.objects[0], kept.objects[1], given(1), "lifts"_a = kept.objects[2],
              "limits"_a = kept.objects[3], "projections"_a = given(2))
        .release()
        .ptr();
  });
}

// What the layers of one forward pass share, set before the first of them runs.
struct Pass {
  unsigned long thread = 0;    // that runs it; 0: no pass, and every layer is the slow one
  std::vector<int64_t> shape;  // (batch, tokens) of the hidden states
  Device device;
  py::object slots_object, projections_object;
  const int32_t* slots = nullptr;
  float* projections = nullptr;  // (layers, rows, K), or null
  int64_t rows = 0;

  // slots: (batch * tokens,) int32 in the bank, or None; projections: (layers, rows, K) float32.
  void begin(int64_t batch, int64_t tokens, const py::object& slots, const py::object& projections);
  void end() { thread = 0; }
};

void Pass::begin(int64_t batch, int64_t tokens, const py::object& given_slots, const py::object& given_projections) {
  end();
  Tensor room;
  check_is_tensor(given_projections.ptr(), "projections");
  if (!room.read(given_projections.ptr(), false)) return;
  rows = batch * tokens;
  CHECK_VALUE(room.dim() == 3 && room.size(1) == rows && room.is_contiguous() && room.dtype == kFloat,
              "projections must be (layers, ", rows, ", K) float32, contiguous, got ", room.sizes);
  slots = nullptr;
  if (!given_slots.is_none()) {
    Tensor read;
    check_is_tensor(given_slots.ptr(), "slots");
    if (!read.read(given_slots.ptr(), false)) return;
    slots = check_slots(&read, room, rows, std::numeric_limits<int32_t>::max(), Extent::kExact);
  }
  slots_object = given_slots;
  projections_object = given_projections;
  projections = room.as<float>();
  device = room.device;
  shape = {batch, tokens};
  thread = PyThread_get_thread_ident();
}

// A capped layer of a running model: one call caps its hidden states, keeps their projections and counts them. Bank and
// statistics are the installation's own copies, which nobody else can free or move.
struct Layer {
  py::object bank_object, stats_object, pass_object;
  const Pass& pass;
  Device device;
  CapParams cap;
  StatsParams stats;
  int64_t index;  // of the layer's projections in those of the pass

  Layer(const py::object& bank, const py::object& stats, const py::object& pass, int64_t index);

  // Returns false, and changes nothing, for anything but the plain case: hidden states (batch, tokens, H) of the pass
  // that has begun, contiguous, on the bank's device, without a gradient.
  bool run(PyObject* output) const;
};

Layer::Layer(const py::object& bank, const py::object& given_stats, const py::object& given_pass, int64_t index)
    : bank_object(bank),
      stats_object(given_stats),
      pass_object(given_pass),
      pass(given_pass.cast<const Pass&>()),
      index(index) {
  std::array<Tensor, 4> tensors;
  Bank read;
  CHECK_VALUE(bank.cast<const KeptBank&>().read(tensors, read), "bank has moved");
  Tensor sums;
  check_is_tensor(given_stats.ptr(), "stats");
  CHECK_VALUE(sums.read(given_stats.ptr(), false) && sums.dtype == kDouble && sums.is_contiguous() &&
                  sums.numel == read.floors->numel * kStatFields && sums.device == read.axes->device,
              "stats must be (S, K, fields) float64, contiguous, on the device of the bank, got ", sums.sizes);
  device = read.axes->device;
  cap.hidden_size = read.axes->size(2);
  cap.axes = read.axes->as<const float>();
  cap.num_slots = read.axes->size(0);
  cap.directions = read.axes->size(1);
  use_bank(cap, read);
  stats.floors = cap.floors;
  stats.stats = sums.as<double>();
  stats.num_slots = cap.num_slots;
  stats.directions = cap.directions;
}

bool Layer::run(PyObject* output) const {
  if (pass.thread != PyThread_get_thread_ident() || is_grad_enabled()) return false;
  PyObject* object = PyTuple_Check(output) && PyTuple_GET_SIZE(output) > 0 ? PyTuple_GET_ITEM(output, 0) : output;
  Tensor hidden;
  if (!hidden.read(object, false) || !hidden.is_contiguous() || !(hidden.device == device) ||
      !(pass.device == device) || hidden.is_negated())
    return false;
  const int64_t dim = hidden.dim();
  const bool is_of_pass = (dim == 3 && hidden.sizes.first(2) == Sizes{pass.shape.data(), 2}) ||
                          (dim == 2 && pass.shape[0] == 1 && hidden.size(0) == pass.shape[1]);
  const bool is_row = hidden.dtype == kFloat || hidden.dtype == kBFloat16 || hidden.dtype == kHalf;
  if (!is_of_pass || !is_row || hidden.sizes.back() != cap.hidden_size || in_dual_level()) return false;

  CapParams p = cap;
  p.dtype = hidden.dtype == kFloat ? DType::kFloat32 : hidden.dtype == kHalf ? DType::kFloat16 : DType::kBFloat16;
  p.hidden = p.out = hidden.data;
  p.hidden_stride = p.out_stride = p.hidden_size;
  p.rows = pass.rows;
  p.slots = pass.slots;
  p.projections = pass.projections + index * p.rows * p.directions;
  increment_versions(&object, 1);
  launch(&p, 1, device);

  StatsParams s = stats;
  s.rows = p.rows;
  s.slots = p.slots;
  s.projections = p.projections;
  launch(s, device);
  return true;
}

PyObject* run_layer(PyObject* self, PyObject* output) {
  return call_guarded([&] {
    const auto& layer = *static_cast<const Layer*>(PyCapsule_GetPointer(self, nullptr));
    return py::bool_(layer.run(output)).release().ptr();
  });
}

// A function of a layer's output, True if it capped. Python calls a builtin function faster than a method.
py::object layer_function(const py::object& bank, const py::object& stats, const py::object& pass, int64_t index) {
  static PyMethodDef definition{"cap_layer", run_layer, METH_O, "Caps a layer's output in place, if it is plain."};
  const py::capsule self(new Layer(bank, stats, pass, index), [](void* layer) { delete static_cast<Layer*>(layer); });
  return py::reinterpret_steal<py::object>(PyCFunction_New(&definition, self.ptr()));
}

// ggml's callback with the banks and statistics that it refers to.
struct KeptCallback {
  py::list layers;  // of each layer: a bank and its statistics (S, K, fields), or None where it is not capped
  ggml::Callback callback;

  KeptCallback(const std::vector<uintptr_t>& functions, const py::list& layers_)
      : layers(layers_), callback(make(functions, layers)) {}
  KeptCallback(const KeptCallback&) = delete;  // the callback is known by its address

  static ggml::Callback make(const std::vector<uintptr_t>& functions, const py::list& layers) {
    CHECK_VALUE(functions.size() == 6, "functions must be six addresses");
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
      std::array<Tensor, 4> tensors;
      Bank bank;
      CHECK_VALUE(kept.read(tensors, bank), "a bank has moved");
      const Tensor& axes = *bank.axes;
      Tensor stats;
      const bool is_plain = stats.read(pair[1].ptr(), false);
      if (sizes.empty()) sizes.assign(axes.sizes.begin(), axes.sizes.end());
      const Sizes first{sizes.data(), int64_t(sizes.size())};
      CHECK_VALUE(axes.device.is_cpu() && axes.sizes == first, "banks must be of one size, on the CPU");
      const std::array<int64_t, 3> fields{sizes[0], sizes[1], kStatFields};
      const Sizes wanted{fields.data(), 3};
      CHECK_VALUE(
          is_plain && stats.device.is_cpu() && stats.is_contiguous() && stats.dtype == kDouble && stats.sizes == wanted,
          "stats must be (S, K, fields) float64, contiguous, on the CPU");
      CapParams p;
      use_bank(p, bank);
      made[i] = {axes.as<const float>(), p.lifts, p.floors, p.limits, stats.as<double>()};
    }
    CHECK_VALUE(!sizes.empty(), "at least one layer must be capped");
    return {library, std::move(made), sizes[0], sizes[1], sizes[2]};
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

void define_bank(py::module_& m) {
  py::class_<KeptBank> bank(m, "Bank");
  bank.def(py::init<const py::object&, const py::object&, const py::object&, const py::object&>(), "axes"_a, "floors"_a,
           "lifts"_a = py::none(), "limits"_a = py::none());
  for (int i = 0; i < 4; ++i)
    bank.def_property_readonly(kBankNames[i], [i](const KeptBank& kept) { return kept.objects[i]; });
  static PyMethodDef cap{"cap_", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(cap_with_bank)),
                         METH_FASTCALL | METH_KEYWORDS, "cap_(hidden, slots=None, projections=None)"};
  bank.attr("cap_") =
      py::reinterpret_steal<py::object>(PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(bank.ptr()), &cap));
}

void define_layers(py::module_& m) {
  py::class_<Pass>(m, "Pass")
      .def(py::init())
      .def("begin", &Pass::begin, "batch"_a, "tokens"_a, "slots"_a, "projections"_a)
      .def("end", &Pass::end);
  m.def("layer", layer_function, "bank"_a, "stats"_a, "pass_"_a, "index"_a);
}

void define_ggml(py::module_& m) {
  py::class_<KeptCallback>(m, "GgmlCallback")
      .def(py::init<const std::vector<uintptr_t>&, const py::list&>(), "functions"_a, "layers"_a)
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
          volatile uint64_t sink = cpu::read_pass(data, bytes);
          (void)sink;
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
        CHECK_VALUE(dtype == "float32" || dtype == "bfloat16" || dtype == "float16",
                    "dtype must be float32, bfloat16 or float16, got ", dtype);
        const DType type = dtype == "float32"    ? DType::kFloat32
                           : dtype == "bfloat16" ? DType::kBFloat16
                                                 : DType::kFloat16;
        CHECK_VALUE(hidden_size >= 1 && hidden_size <= cuda::kMaxHiddenSize, "hidden_size must be from 1 to ",
                    cuda::kMaxHiddenSize, ", got ", hidden_size);
        CHECK_VALUE(rows >= 0, "rows must not be negative, got ", rows);
        CHECK_VALUE(resident >= 1, "resident must be at least 1, got ", resident);
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
