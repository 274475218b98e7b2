// The pybind11 door: the same ops, called without the dispatcher.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <deque>
#include <optional>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "ggml/callback.h"
#include "kernels/cuda/plan.h"
#include "launchers/accelerator.h"
#include "launchers/cpu.h"
#include "ops.h"

namespace py = pybind11;
using namespace py::literals;

namespace axiscap {
namespace {

// A tensor that Python gives: borrowed.
struct Given {
  PyObject* object;

  py::object keep() const { return py::reinterpret_borrow<py::object>(object); }
};

// What the door knows of torch's Python: looked up on import.
struct Torch {
  PyTypeObject* tensor;
  PyObject* increment_version;
  PyObject* requires_grad;  // the attribute's name
  // torch's stable interface has no way from a Python object to a handle, nor to a tensor's dispatch keys. But a handle
  // is the address of a pointer to what `_cdata` tells the address of, which the object holds; and that holds the keys,
  // which `_dispatch_keys` tells. Where they lie is found out on import, from some tensors that have other values
  // there. Where it is not found, Python is asked each time.
  ptrdiff_t handle = 0, keys = 0;  // 0: not found
  PyObject* dispatch_keys;
  uint64_t dense, owned;  // keys: of what has its elements in memory; of what somebody else must look at first
};
Torch torch_{};

}  // namespace
}  // namespace axiscap

namespace pybind11::detail {

template <>
struct type_caster<axiscap::Given> {
  PYBIND11_TYPE_CASTER(axiscap::Given, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    value.object = source.ptr();
    return PyObject_TypeCheck(value.object, axiscap::torch_.tensor);
  }
};

}  // namespace pybind11::detail

namespace axiscap {
namespace {

// The place, among so many bytes behind each of these addresses, that holds what belongs to each. 0: there is none.
ptrdiff_t find(const std::vector<std::pair<uintptr_t, uint64_t>>& addresses, ptrdiff_t begin, ptrdiff_t end) {
  for (ptrdiff_t place = begin; place < end; place += sizeof(uint64_t))
    if (std::all_of(addresses.begin(), addresses.end(), [place](const auto& at) {
          return *reinterpret_cast<const uint64_t*>(at.first + place) == at.second;
        }))
      return place;
  return 0;
}

uint64_t told_keys(const py::handle& tensor) {
  return py::handle(torch_.dispatch_keys)(tensor).attr("raw_repr")().cast<uint64_t>();
}

// Whether there is an object at what may be an address.
bool is_mapped(uintptr_t address) {
  const auto page = uintptr_t(sysconf(_SC_PAGESIZE));
  unsigned char resident;
  return address % sizeof(uint64_t) == 0 && mincore(reinterpret_cast<void*>(address / page * page), 1, &resident) == 0;
}

// A tensor shares its counter of versions, and nothing else of its own, with what `detach` returns and not with its
// `data`. Many tensors are looked at, since words between a tensor's members hold anything, and are alike by chance.
VersionPlace find_version(const py::object& torch, ptrdiff_t end) {
  const auto impl = [](const py::object& tensor) { return tensor.attr("_cdata").cast<uintptr_t>(); };
  constexpr size_t kTensors = 16;
  std::array<std::array<py::object, 3>, kTensors> alive;
  std::array<std::array<uintptr_t, 3>, kTensors> impls;
  for (size_t i = 0; i < kTensors; ++i) {
    const py::object tensor = torch.attr("empty")(3, "device"_a = "cpu");
    alive[i] = {tensor, tensor.attr("detach")(), tensor.attr("data")};
    std::transform(alive[i].begin(), alive[i].end(), impls[i].begin(), impl);
  }
  // So many changes that no other number beside it, of references or versions, is the same by chance.
  constexpr size_t kChanges = 1009;
  py::handle(torch_.increment_version)(py::make_tuple(alive[0][0]) * py::int_(kChanges));
  const auto version = alive[0][0].attr("_version").cast<uint32_t>();

  VersionPlace found;
  for (ptrdiff_t place = sizeof(uint64_t); place < end; place += sizeof(uint64_t)) {
    const auto word = [place](uintptr_t of) { return *reinterpret_cast<const uintptr_t*>(of + place); };
    std::set<uintptr_t> counters;
    for (const auto& [tensor, shares, shares_not] : impls)
      if (word(tensor) == word(shares)) counters.insert({word(tensor), word(shares_not)});
    const uintptr_t counter = word(impls[0][0]);
    if (counters.size() != 2 * kTensors || counters.contains(0) || !is_mapped(counter)) continue;
    // Behind the table of functions: what counts references, and the version.
    for (ptrdiff_t number = sizeof(uint64_t); number < ptrdiff_t(3 * sizeof(uint64_t)); number += sizeof(uint32_t))
      if (*reinterpret_cast<const uint32_t*>(counter + number) == version) found = {place, number};
  }
  return found;
}

void look_up_torch() {
  const py::object torch = py::module_::import("torch"), internals = torch.attr("_C");
  const auto kept = [](const py::object& object) { return py::object(object).release().ptr(); };  // while we live
  torch_.tensor = reinterpret_cast<PyTypeObject*>(kept(torch.attr("Tensor")));
  torch_.increment_version = kept(internals.attr("_increment_version"));
  torch_.dispatch_keys = kept(internals.attr("_dispatch_keys"));
  torch_.requires_grad = PyUnicode_InternFromString("requires_grad");

  const auto keys_of = [&](const char* name) {
    return internals.attr("DispatchKeySet")(internals.attr("DispatchKey").attr(name))
        .attr("raw_repr")()
        .cast<uint64_t>();
  };
  torch_.dense = keys_of("Dense");
  for (const char* name :
       {"Python", "Functionalize", "FuncTorchBatched", "FuncTorchGradWrapper", "Negative", "Conjugate", "ZeroTensor"})
    torch_.owned |= keys_of(name);

  // Imported inside inference mode, too: a tensor of that mode has no version.
  const py::object normal_mode = torch.attr("inference_mode")(false);
  normal_mode.attr("__enter__")();
  const py::object one = torch.attr("empty")(3, "device"_a = "cpu");
  const std::array<py::object, 4> tensors{one, torch.attr("_neg_view")(one), one.attr("to")("meta"),
                                          one.attr("to_sparse")()};
  std::vector<std::pair<uintptr_t, uint64_t>> objects, impls;
  for (const py::object& tensor : tensors) {
    const auto impl = tensor.attr("_cdata").cast<uintptr_t>();
    objects.emplace_back(reinterpret_cast<uintptr_t>(tensor.ptr()), impl);
    impls.emplace_back(impl, told_keys(tensor));
  }
  constexpr ptrdiff_t kLeastTensor = 23 * sizeof(uint64_t);  // what a tensor has at least, in every torch so far
  torch_.handle = find(objects, sizeof(PyObject), torch_.tensor->tp_basicsize);
  torch_.keys = find(impls, sizeof(uint64_t), kLeastTensor);
  if (torch_.handle && torch_.keys) version_place = find_version(torch, kLeastTensor);
  normal_mode.attr("__exit__")(py::none(), py::none(), py::none());
}

bool is_true(PyObject* answer) {
  if (!answer) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(answer).is(py::bool_(true));
}

// A given tensor's view, and whether its memory is what its sizes and strides say. Another one belongs to a mode, a
// transform, a layout or a subclass (a fake one, a DTensor, a vmapped one, a sparse one): it goes through the
// dispatcher, where its owner does his part, or there is no kernel for it.
struct Look {
  TensorView view;
  bool is_plain;

  explicit Look(Given given) {
    const char* impl;
    if (torch_.handle) {
      char* place = reinterpret_cast<char*>(given.object) + torch_.handle;
      view.handle = reinterpret_cast<AtenTensorHandle>(place);
      impl = *reinterpret_cast<const char* const*>(place);
    } else {
      impl_ = given.keep().attr("_cdata").cast<uintptr_t>();
      view.handle = reinterpret_cast<AtenTensorHandle>(&impl_);
      impl = reinterpret_cast<const char*>(impl_);
    }
    const uint64_t keys =
        torch_.keys ? *reinterpret_cast<const uint64_t*>(impl + torch_.keys) : told_keys(given.object);
    is_plain = (keys & torch_.dense) && !(keys & torch_.owned);
    if (!is_plain) return;
    view = TensorView(view.handle);
    is_plain = view.device.is_cpu() || view.device.is_cuda();
  }
  Look(const Look&) = delete;  // the view may refer to it

 private:
  uintptr_t impl_;
};

// How Python gives each kind of argument of an op, and how it is looked at.
template <class Argument>
struct Seen;

template <>
struct Seen<const TensorView&> {
  using From = Given;
  Look look;

  explicit Seen(Given given) : look(given) {}
  bool is_plain() const { return look.is_plain; }
  const TensorView& get() const { return look.view; }
};

template <>
struct Seen<Optional> {
  using From = std::optional<Given>;
  std::optional<Look> look;

  explicit Seen(From given) {
    if (given) look.emplace(*given);
  }
  bool is_plain() const { return !look || look->is_plain; }
  Optional get() const { return look ? &look->view : nullptr; }
};

template <>
struct Seen<TensorList> {
  using From = std::vector<Given>;
  std::deque<Look> looks;
  std::vector<TensorView> views;

  explicit Seen(const From& given) {
    for (const Given& tensor : given) views.push_back(looks.emplace_back(tensor).view);
  }
  bool is_plain() const {
    return std::all_of(looks.begin(), looks.end(), [](const Look& look) { return look.is_plain; });
  }
  TensorList get() const { return views; }
};

template <>
struct Seen<double> {
  using From = double;
  double value;

  explicit Seen(double value) : value(value) {}
  bool is_plain() const { return true; }
  double get() const { return value; }
};

py::object to_python(Given given) { return given.keep(); }
py::object to_python(const std::optional<Given>& given) { return given ? given->keep() : py::none(); }
py::object to_python(double given) { return py::float_(given); }
py::object to_python(const std::vector<Given>& given) {
  py::list list;
  for (const Given& tensor : given) list.append(tensor.keep());
  return list;
}

// What autograd is told of a tensor that a direct call changes: what the dispatcher's door announces, at less cost.
// Before the call one that needs a gradient is refused, behind it the change is counted.
void check_may_change(Given given, const char* name) {
  check_needs_no_gradient(
      aoti_torch_grad_mode_is_enabled() && is_true(PyObject_GetAttr(given.object, torch_.requires_grad)), name);
}
void check_may_change(const std::vector<Given>& given, const char* name) {
  for (const Given& tensor : given) check_may_change(tensor, name);
}

void mark_changed(Given given, const TensorView& view) {
  if (count_change(view.handle)) return;
  py::handle(torch_.increment_version)(py::make_tuple(given.keep()));
}
void mark_changed(const std::vector<Given>& given, TensorList views) {
  for (size_t i = 0; i < given.size(); ++i) mark_changed(given[i], views[i]);
}

void dispatch(const char* op, const py::dict& arguments) {
  py::module_::import("torch").attr("ops").attr("axiscap").attr(op)(**arguments);
}

// An op's door: the op itself on plain tensors, and else the dispatcher, under the same name with the same arguments.
// `Changing` are the places of the arguments that it changes.
template <class Changing, class... Arguments>
class Door {
 public:
  Door(const char* name, void (*op)(Arguments...), std::array<const char*, sizeof...(Arguments)> names)
      : name_(name), op_(op), names_(names) {}

  void operator()(typename Seen<Arguments>::From... given) const {
    call(std::index_sequence_for<Arguments...>(), Changing(), std::tie(given...));
  }

 private:
  template <size_t... I, size_t... C, class Tuple>
  void call(std::index_sequence<I...>, std::index_sequence<C...>, Tuple given) const {
    const std::tuple<Seen<Arguments>...> seen{std::get<I>(given)...};
    if (!(std::get<I>(seen).is_plain() && ...)) {
      py::dict arguments;
      ((arguments[names_[I]] = to_python(std::get<I>(given))), ...);
      return dispatch(name_, arguments);
    }
    (check_may_change(std::get<C>(given), names_[C]), ...);
    op_(std::get<I>(seen).get()...);
    (mark_changed(std::get<C>(given), std::get<C>(seen).get()), ...);
  }

  const char* name_;
  void (*op_)(Arguments...);
  std::array<const char*, sizeof...(Arguments)> names_;
};

template <size_t... changing, class... Arguments, class... Names>
auto door(const char* name, void (*op)(Arguments...), Names... names) {
  return Door<std::index_sequence<changing...>, Arguments...>(name, op, {names...});
}

// A bank that holds its tensors, checked once; once more where somebody freed, moved or resized one since.
struct KeptBank {
  py::object axes, floors, lifts, limits;  // the last two may be None
  Seen<const TensorView&> axes_seen, floors_seen;
  Seen<Optional> lifts_seen, limits_seen;
  Bank bank;

  KeptBank(Given axes_, Given floors_, std::optional<Given> lifts_, std::optional<Given> limits_)
      : axes(axes_.keep()),
        floors(floors_.keep()),
        lifts(to_python(lifts_)),
        limits(to_python(limits_)),
        axes_seen(axes_),
        floors_seen(floors_),
        lifts_seen(lifts_),
        limits_seen(limits_),
        bank(described(), floors_seen.get(), lifts_seen.get(), limits_seen.get()) {
    CHECK_VALUE(is_plain(), kNotDense);
    check_values(bank);
  }
  KeptBank(const KeptBank&) = delete;  // the bank refers to its neighbours

 private:
  static constexpr const char* kNotDense = "a bank is made of dense tensors with data";

  bool is_plain() const {
    return axes_seen.is_plain() && floors_seen.is_plain() && lifts_seen.is_plain() && limits_seen.is_plain();
  }

  // What is wrong with sizes and dtypes is said before that tensors have no data: those of a mode, or of no device.
  const TensorView& described() {
    const auto describe = [](Look& look) {
      if (!look.is_plain) look.view = TensorView(look.view.handle, false);
    };
    try {
      describe(axes_seen.look);
      describe(floors_seen.look);
      if (lifts_seen.look) describe(*lifts_seen.look);
      if (limits_seen.look) describe(*limits_seen.look);
    } catch (const std::runtime_error&) {
      throw py::value_error(kNotDense);
    }
    return axes_seen.get();
  }
};

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
    Sizes sizes;
    std::vector<ggml::Callback::Layer> made(layers.size());
    for (size_t i = 0; i < made.size(); ++i) {
      if (layers[i].is_none()) continue;
      const auto pair = layers[i].cast<py::tuple>();
      const KeptBank& kept = pair[0].cast<const KeptBank&>();
      const Look looked(pair[1].cast<Given>());
      const TensorView& axes = kept.bank.axes;
      const TensorView& stats = looked.view;
      if (sizes.count == 0) sizes = axes.sizes;
      CHECK_VALUE(axes.device.is_cpu() && axes.sizes == sizes, "banks must be of one size, on the CPU");
      const std::array<int64_t, 3> fields{sizes[0], sizes[1], kStatFields};
      const Sizes wanted{fields.data(), 3};
      CHECK_VALUE(looked.is_plain && stats.device.is_cpu() && stats.is_contiguous() && stats.dtype == kDouble &&
                      stats.sizes == wanted,
                  "stats must be (S, K, fields) float64, contiguous, on the CPU");
      made[i].axes = axes.as<const float>();
      made[i].floors = kept.bank.floors.as<const float>();
      made[i].lifts = kept.bank.lifts ? kept.bank.lifts->as<const float>() : nullptr;
      made[i].limits = kept.bank.limits ? kept.bank.limits->as<const float>() : nullptr;
      made[i].stats = stats.as<double>();
    }
    CHECK_VALUE(sizes.count > 0, "at least one layer must be capped");
    return {library, std::move(made), sizes[0], sizes[1], sizes[2]};
  }
};

// The memory bound over a tensor's bytes, with the threads that the ops would use.
template <class Pass>
void over_bytes(Given tensor, Pass pass) {
  const Look looked(tensor);
  const TensorView& view = looked.view;
  CHECK_VALUE(looked.is_plain && view.device.is_cpu() && view.is_contiguous(),
              "tensor must be contiguous and on the CPU");
  constexpr int64_t kGrain = 64 * 1024;
  parallel_for(0, view.numel * view.item_bytes, kGrain,
               [&](int64_t begin, int64_t end) { pass(view.data + begin, end - begin); });
}

PYBIND11_MODULE(_C, m) {
  look_up_torch();

  py::class_<KeptBank>(m, "Bank")
      .def(py::init<Given, Given, std::optional<Given>, std::optional<Given>>(), "axes"_a, "floors"_a,
           "lifts"_a = py::none(), "limits"_a = py::none())
      .def_readonly("axes", &KeptBank::axes)
      .def_readonly("floors", &KeptBank::floors)
      .def_readonly("lifts", &KeptBank::lifts)
      .def_readonly("limits", &KeptBank::limits)
      .def(
          "cap_",
          [](const KeptBank& kept, Given hidden, std::optional<Given> slots, std::optional<Given> projections) {
            const Seen<const TensorView&> stream(hidden);
            const Seen<Optional> of_rows(slots), read(projections);
            if (!stream.is_plain() || !of_rows.is_plain() || !read.is_plain() || !kept.bank.is_as_it_was())
              return dispatch("cap_",
                              py::dict("hidden"_a = hidden.keep(), "axes"_a = kept.axes, "floors"_a = kept.floors,
                                       "slots"_a = to_python(slots), "lifts"_a = kept.lifts, "limits"_a = kept.limits,
                                       "projections"_a = to_python(projections)));
            check_may_change(hidden, "hidden");
            cap_bank_(stream.get(), kept.bank, of_rows.get(), read.get());
            mark_changed(hidden, stream.get());
          },
          "hidden"_a, "slots"_a = py::none(), "projections"_a = py::none());

  const auto slots = "slots"_a = py::none(), lifts = "lifts"_a = py::none(), limits = "limits"_a = py::none(),
             projections = "projections"_a = py::none();
  m.def("cap_", door<0>("cap_", cap_, "hidden", "axes", "floors", "slots", "lifts", "limits", "projections"),
        "hidden"_a, "axes"_a, "floors"_a, slots, lifts, limits, projections);
  m.def("cap_residual_",
        door<1>("cap_residual_", cap_residual_, "hidden", "residual", "axes", "floors", "slots", "lifts", "limits",
                "projections"),
        "hidden"_a, "residual"_a, "axes"_a, "floors"_a, slots, lifts, limits, projections);
  m.def("add_rms_norm_cap_",
        door<0, 1>("add_rms_norm_cap_", add_rms_norm_cap_, "hidden", "residual", "weight", "eps", "axes", "floors",
                   "slots", "weight_bias", "lifts", "limits", "projections"),
        "hidden"_a, "residual"_a, "weight"_a, "eps"_a, "axes"_a, "floors"_a, slots, "weight_bias"_a = 0.0, lifts,
        limits, projections);
  m.def("add_rms_norm_cap_fp8_",
        door<0, 2>("add_rms_norm_cap_fp8_", add_rms_norm_cap_fp8_, "quantized", "hidden", "residual", "weight", "eps",
                   "axes", "floors", "slots", "weight_bias", "scale", "scales", "lifts", "limits", "projections"),
        "quantized"_a, "hidden"_a, "residual"_a, "weight"_a, "eps"_a, "axes"_a, "floors"_a, slots,
        "weight_bias"_a = 0.0, "scale"_a = py::none(), "scales"_a = py::none(), lifts, limits, projections);
  m.def("cap_layers_",
        door<0>("cap_layers_", cap_layers_, "hiddens", "axes", "floors", "slots", "lifts", "limits", "projections"),
        "hiddens"_a, "axes"_a, "floors"_a, slots, lifts, limits, projections);
  m.def("accumulate_", door<0>("accumulate_", accumulate_, "stats", "projections", "floors", "slots"), "stats"_a,
        "projections"_a, "floors"_a, slots);

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

  m.def(
      "read_pass",
      [](Given tensor) {
        over_bytes(tensor, [](const char* data, int64_t bytes) {
          // The result is the proof that the bytes were read; without a use the compiler may drop the pass.
          volatile uint64_t sink = cpu::read_pass(data, bytes);
          (void)sink;
        });
      },
      "tensor"_a);
  m.def("read_modify_write_pass", [](Given tensor) { over_bytes(tensor, cpu::read_modify_write_pass); }, "tensor"_a);
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

}  // namespace
}  // namespace axiscap
