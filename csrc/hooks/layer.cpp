#include "hooks/layer.h"

#include <limits>
#include <utility>
#include <vector>

#include "torch/bank.h"

using namespace pybind11::literals;

namespace axiscap {
namespace {

// The state of a forward pass, which all its layers share. `begin` runs before the first layer.
struct Pass {
  unsigned long thread = 0;    // the thread of the pass; 0: no pass has begun, and every hook returns false
  std::vector<int64_t> shape;  // (batch, tokens) of the hidden states
  Device device;
  py::object slots_object, projections_object;
  const int32_t* slots = nullptr;
  float* projections = nullptr;  // (layers, rows, K)
  int64_t layers = 0, rows = 0, directions = 0;

  // slots: (batch * tokens,) int32 in the bank, or None; projections: (layers, rows, K) float32.
  void begin(int64_t batch, int64_t tokens, const py::object& slots_argument, const py::object& projections_argument);
  void end() { thread = 0; }
};

void Pass::begin(int64_t batch, int64_t tokens, const py::object& slots_argument,
                 const py::object& projections_argument) {
  end();
  Pass next;
  Tensor projections_tensor;
  check_is_tensor(projections_argument.ptr(), "projections");
  if (!projections_tensor.read(projections_argument.ptr(), false)) return;
  next.rows = batch * tokens;
  CHECK_VALUE(projections_tensor.dim() == 3 && projections_tensor.size(1) == next.rows &&
                  projections_tensor.is_contiguous() && projections_tensor.dtype == kFloat,
              "projections must be (layers, ", next.rows, ", K) float32, contiguous, got ", projections_tensor.sizes);
  if (!slots_argument.is_none()) {
    Tensor slots_tensor;
    check_is_tensor(slots_argument.ptr(), "slots");
    if (!slots_tensor.read(slots_argument.ptr(), false)) return;
    next.slots =
        check_slots(&slots_tensor, projections_tensor, next.rows, std::numeric_limits<int32_t>::max(), Extent::kExact);
  }
  next.slots_object = slots_argument;
  next.projections_object = projections_argument;
  next.projections = projections_tensor.as<float>();
  next.layers = projections_tensor.size(0);
  next.directions = projections_tensor.size(2);
  next.device = projections_tensor.device;
  next.shape = {batch, tokens};
  next.thread = PyThread_get_thread_ident();
  // One swap changes all members. Dropping a tensor of the last pass can release the GIL, and another thread may begin
  // its pass then.
  std::swap(*this, next);
}

// A capped layer of a model: `run` caps its hidden states, stores their projections and adds them to the statistics.
// The tensors of the bank and the statistics belong to the installation: no other code frees or moves them.
struct Layer {
  py::object bank_object, stats_object, pass_object;
  const Pass& pass;
  Device device;
  CapParams cap;
  StatsParams stats;
  int64_t index;  // of the layer in the projections of the pass

  Layer(const py::object& bank, const py::object& stats_tensor, const py::object& shared_pass, int64_t index);

  // Caps plain hidden states: (batch, tokens, H) of the current pass, contiguous, on the bank's device, without a
  // gradient. For all others it returns false and changes nothing.
  bool run(PyObject* output) const;

 private:
  bool fits(const Tensor& hidden) const;
};

Layer::Layer(const py::object& bank, const py::object& stats_tensor, const py::object& shared_pass, int64_t index)
    : bank_object(bank),
      stats_object(stats_tensor),
      pass_object(shared_pass),
      pass(shared_pass.cast<const Pass&>()),
      index(index) {
  Tensor tensors[Bank::kMaxTensors];
  Arguments bank_arguments;
  CHECK_VALUE(bank.cast<const Bank&>().add_to(bank_arguments, tensors), "bank has moved");
  const Tensor& axes = *bank_arguments.axes;
  device = axes.device;
  cap.num_slots = axes.size(0);
  cap.directions = axes.size(1);
  cap.hidden_size = axes.size(2);
  cap.axes = axes.as<const float>();
  use_bank(cap, bank_arguments);
  stats.floors = cap.floors;
  stats.stats = check_stats(stats_tensor, bank_arguments);
  stats.num_slots = cap.num_slots;
  stats.directions = cap.directions;
}

bool Layer::fits(const Tensor& hidden) const {
  const int64_t dim = hidden.dim();
  const bool has_pass_shape = (dim == 3 && hidden.sizes.first(2) == Sizes{pass.shape.data(), 2}) ||
                              (dim == 2 && pass.shape[0] == 1 && hidden.size(0) == pass.shape[1]);
  return has_pass_shape && hidden.sizes.back() == cap.hidden_size && hidden.is_contiguous() &&
         hidden.device == device && pass.device == device && pass.layers > index && pass.directions == cap.directions &&
         is_row_dtype(hidden);
}

bool Layer::run(PyObject* output) const {
  if (is_grad_enabled() || in_dual_level()) return false;
  PyObject* object = PyTuple_Check(output) && PyTuple_GET_SIZE(output) > 0 ? PyTuple_GET_ITEM(output, 0) : output;
  Tensor hidden;
  if (!hidden.read(object, false) || hidden.is_negated()) return false;
  // Nothing may release the GIL until the members of the pass are copied, or another thread could begin its pass.
  if (pass.thread != PyThread_get_thread_ident() || !fits(hidden)) return false;

  CapParams p = cap;
  p.dtype = dtype_of(hidden, "hidden");
  p.hidden = hidden.data;
  p.hidden_stride = p.hidden_size;
  write_in_place(p);
  p.rows = pass.rows;
  p.slots = pass.slots;
  p.projections = pass.projections + index * p.rows * p.directions;
  increment_versions(py::make_tuple(py::handle(object)));
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

// Returns a function of a layer's output that returns True if it has capped. Python calls a builtin function faster
// than a method.
py::object layer_function(const py::object& bank, const py::object& stats, const py::object& pass, int64_t index) {
  static PyMethodDef definition{"cap_layer", run_layer, METH_O, "Caps a layer's output in place, if it is plain."};
  const py::capsule self(new Layer(bank, stats, pass, index), [](void* layer) { delete static_cast<Layer*>(layer); });
  return py::reinterpret_steal<py::object>(PyCFunction_New(&definition, self.ptr()));
}

}  // namespace

void define_layers(py::module_& m) {
  py::class_<Pass>(m, "Pass")
      .def(py::init())
      .def("begin", &Pass::begin, "batch"_a, "tokens"_a, "slots"_a, "projections"_a)
      .def("end", &Pass::end);
  m.def("layer", layer_function, "bank"_a, "stats"_a, "pass_"_a, "index"_a);
}

}  // namespace axiscap
