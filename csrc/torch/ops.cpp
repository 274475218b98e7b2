#include "torch/ops.h"

#include <pybind11/stl.h>

#include <algorithm>

#include "launchers/accelerator.h"
#include "launchers/cpu.h"

namespace axiscap {
namespace {

// The least work of a thread. To wake a thread takes a few microseconds while it spins, and about 20 when it sleeps.
constexpr int64_t kBytesPerThread = 128 * 1024;

const Accelerator& accelerator_for(Device device) {
  CHECK_VALUE(device.is_cuda() && accelerator, "hidden is on ", device,
              ", for which this build of axiscap has no kernels; see `axiscap doctor`");
  return *accelerator;
}

void check_launched(const char* error, Device device) {
  CHECK_RUN(!error, "axiscap: the launch on ", device, " failed: ", error);
}

// The last checks of an op in place. Autograd counts the change before it happens, so that torch can still refuse it.
void prepare_change(std::span<const NamedTensor> tensors) {
  check_no_overlap(tensors);
  const auto is_changed = [](const NamedTensor& tensor) { return tensor.is_changed; };
  py::tuple changed_tensors(std::count_if(tensors.begin(), tensors.end(), is_changed));
  size_t i = 0;
  for (const NamedTensor& tensor : tensors)
    if (tensor.is_changed) PyTuple_SET_ITEM(changed_tensors.ptr(), i++, Py_NewRef(tensor.tensor->object));
  increment_versions(changed_tensors);
}
void prepare_change(const Arguments& a) { prepare_change({a.tensor_list, size_t(a.tensor_count)}); }

py::object new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, const char* dtype = nullptr) {
  const py::object new_empty = py::handle(like.object).attr("new_empty");
  const py::object shape = py::cast(sizes);
  return dtype ? new_empty(shape, py::arg("dtype") = py::module_::import("torch").attr(dtype)) : new_empty(shape);
}

char* data_of(const py::object& object) {
  Tensor tensor;
  CHECK_RUN(tensor.read(object.ptr(), true), "axiscap: torch made a tensor without data");
  return tensor.data;
}

// The last steps of the ops in place on one layer.
py::object cap_in_place(const Arguments& a, CapParams& p) {
  use_bank(p, a);
  p.projections = check_projections(a.projections, *a.hidden, {p.rows, p.directions}, a.extent);
  prepare_change(a);
  launch(&p, 1, a.hidden->device);
  return py::none();
}

py::object cap_(const Arguments& a) {
  check_bank(a);
  return cap_with_checked_bank_(a);
}

// Returns (out, projections (rows, K), fired (rows, K) bool).
py::object cap(const Arguments& a) {
  const Tensor& hidden = *a.hidden;
  check_bank(a);
  CapParams p = params_for(hidden, rows_of(hidden, "hidden"), *a.axes, a.slots, a.extent);
  use_bank(p, a);
  const py::object out = new_tensor(hidden, {hidden.sizes.begin(), hidden.sizes.end()});
  const py::object projections = new_tensor(hidden, {p.rows, p.directions}, "float32");
  const py::object fired = new_tensor(hidden, {p.rows, p.directions}, "bool");
  p.projections = reinterpret_cast<float*>(data_of(projections));
  p.fired = reinterpret_cast<uint8_t*>(data_of(fired));
  p.out = data_of(out);
  p.out_stride = p.hidden_size;
  launch(&p, 1, hidden.device);
  return py::make_tuple(out, projections, fired);
}

py::object project(const Arguments& a) {
  const Tensor& hidden = *a.hidden;
  check_bank(a);
  CapParams p = params_for(hidden, rows_of(hidden, "hidden"), *a.axes, a.slots, a.extent);
  std::vector<int64_t> shape{hidden.sizes.begin(), hidden.sizes.end()};
  shape.back() = p.directions;
  const py::object projections = new_tensor(hidden, shape, "float32");
  p.projections = reinterpret_cast<float*>(data_of(projections));
  launch(&p, 1, hidden.device);
  return projections;
}

// Writes the norm to `quantized` in fp8, with one of scale and scales.
void use_quantized(CapParams& p, const Arguments& a) {
  const Tensor &hidden = *a.hidden, &quantized = *a.quantized;
  CHECK_VALUE(quantized.sizes == hidden.sizes, "quantized must have the shape of hidden, ", hidden.sizes, ", got ",
              quantized.sizes);
  check_dtype(quantized, "quantized", kFloat8);
  check_device(quantized, "quantized", hidden);
  CHECK_VALUE(!a.scale != !a.scales, "one of scale and scales must be given");
  const Tensor& factors = a.scale ? *a.scale : *a.scales;
  const char* name = a.scale ? "scale" : "scales";
  const int64_t count = a.scale ? 1 : p.rows;
  check_dtype(factors, name, kFloat);
  CHECK_VALUE(factors.numel == count && factors.is_contiguous(), name, " must be contiguous and have ", count,
              a.scale ? " element" : " elements, one for each row", ", got shape ", factors.sizes);
  check_device(factors, name, hidden);
  p.normed = quantized.data;
  p.normed_stride = writable_rows_of(quantized, "quantized").stride;
  if (a.scale) p.scale = factors.as<float>();
  if (a.scales) p.scales = factors.as<float>();
}

// cap_residual_, and with a weight also add_rms_norm_cap_.
py::object cap_residual_(const Arguments& a) {
  const Tensor& hidden = *a.hidden;
  check_bank(a);
  const bool changes_hidden = a.weight && !a.quantized;
  const Rows rows = changes_hidden ? writable_rows_of(hidden, "hidden") : rows_of(hidden, "hidden");
  CapParams p = params_for(hidden, rows, *a.axes, a.slots, a.extent);
  use_residual(p, hidden, *a.residual);
  if (a.weight) use_norm(p, hidden, *a.weight, a.eps, a.weight_bias);
  if (a.quantized) use_quantized(p, a);
  return cap_in_place(a, p);
}

// The parameters of the layer behind `p` in the bank.
CapParams next_layer(CapParams p, const Tensor& hidden) {
  p.hidden = hidden.data;
  p.hidden_stride = writable_rows_of(hidden, "hiddens").stride;
  const int64_t directions = p.num_slots * p.directions;
  p.axes += directions * p.hidden_size;
  p.floors += directions;
  if (p.targets) p.targets += directions;
  if (p.lifts) p.lifts += directions * p.hidden_size;
  if (p.norm_limits) p.norm_limits += p.num_slots;
  if (p.projections) p.projections += p.rows * p.directions;
  return p;
}

py::object cap_layers_(const Arguments& a) {
  check_bank(a, true);
  const int64_t count = a.hiddens.size();
  CHECK_VALUE(count == a.axes->size(0), "axes must have one entry for each of the ", count, " hiddens, got ",
              a.axes->size(0));
  const Tensor& first = a.hiddens[0];
  std::vector<CapParams> layers(count);
  for (int64_t layer = 0; layer < count; ++layer) {
    const Tensor& hidden = a.hiddens[layer];
    CHECK_VALUE(hidden.sizes == first.sizes, "hiddens must have one shape, got ", first.sizes, " and ", hidden.sizes);
    check_dtype(hidden, "hiddens", first.dtype);
    check_device(hidden, "hiddens", first);
    CapParams& p = layers[layer];
    if (layer == 0) {
      p = params_for(hidden, writable_rows_of(hidden, "hiddens"), *a.axes, a.slots, a.extent);
      use_bank(p, a);
      p.projections = check_projections(a.projections, first, {count, p.rows, p.directions}, a.extent);
    } else {
      p = next_layer(layers[layer - 1], hidden);
    }
    write_in_place(p);
  }
  std::vector<NamedTensor> tensors(a.tensor_list, a.tensor_list + a.tensor_count);
  for (const Tensor& hidden : a.hiddens) tensors.insert(tensors.begin(), {&hidden, "hiddens", true});
  prepare_change(tensors);
  launch(layers.data(), count, first.device);
  return py::none();
}

py::object accumulate_(const Arguments& a) {
  const Tensor &stats = *a.stats, &projections = *a.projections, &floors = *a.floors;
  check_dtype(stats, "stats", kDouble);
  check_dtype(projections, "projections", kFloat);
  check_dtype(floors, "floors", kFloat);
  const bool has_layers = floors.dim() == 3;
  CHECK_VALUE((has_layers || floors.dim() == 2) && floors.numel > 0 && floors.is_contiguous(),
              "floors must have shape (S, K) or (L, S, K), none of them 0, contiguous, got ", floors.sizes);
  std::vector<int64_t> sizes(floors.sizes.begin(), floors.sizes.end());
  sizes.push_back(kStatFields);
  const Sizes shape{sizes.data(), int64_t(sizes.size())};
  CHECK_VALUE(stats.sizes == shape && stats.is_contiguous(), "stats must have shape ", shape, ", contiguous, got ",
              stats.sizes);
  CHECK_VALUE(projections.dim() == floors.dim() && projections.size(-1) == floors.size(-1) &&
                  (!has_layers || projections.size(0) == floors.size(0)) &&
                  projections.is_contiguous(has_layers ? 1 : 0),
              "projections must have shape (", has_layers ? "L, " : "", "rows, K) with the sizes of floors, ",
              floors.sizes, ", rows contiguous, got ", projections.sizes, " with strides ", projections.strides);
  check_device(floors, "floors", projections);
  check_device(stats, "stats", projections);
  StatsParams p;
  p.rows = projections.size(-2);
  p.num_slots = floors.size(-2);
  p.directions = floors.size(-1);
  p.layers = has_layers ? floors.size(0) : 1;
  p.layer_stride = projections.stride(0);
  p.projections = projections.as<const float>();
  p.floors = floors.as<const float>();
  p.slots = check_slots(a.slots, projections, p.rows, p.num_slots, a.extent);
  p.stats = stats.as<double>();
  prepare_change(a);
  launch(p, projections.device);
  return py::none();
}

// The common parts of the schemas. BANK and OPTIONS have the arguments of every bank.
#define BANK "Tensor axes, Tensor floors, Tensor? slots=None"
#define OPTIONS "Tensor? targets=None, Tensor? lifts=None, Tensor? norm_limits=None"
#define PROJECTIONS "Tensor(z!)? projections=None"
#define BUFFERS "Tensor axes, Tensor floors, Tensor slots, Tensor(z!) projections"
#define NORMED "Tensor(a!) hidden, Tensor(b!) residual, Tensor weight, float eps"
#define QUANTIZED "Tensor(a!) quantized, Tensor hidden, Tensor(b!) residual, Tensor weight, float eps"
#define SCALES "float weight_bias=0.0, Tensor? scale=None, Tensor(c!)? scales=None"

constexpr Op kOps[] = {
    {"cap_(Tensor(a!) hidden, " BANK ", *, " OPTIONS ", " PROJECTIONS ") -> ()", cap_},
    {"cap_.buffers(Tensor(a!) hidden, " BUFFERS ", " OPTIONS ") -> ()", cap_},
    {"cap(Tensor hidden, " BANK ", " OPTIONS ") -> (Tensor, Tensor, Tensor)", cap},
    {"project(Tensor hidden, Tensor axes, Tensor? slots=None) -> Tensor", project},
    {"cap_residual_(Tensor hidden, Tensor(a!) residual, " BANK ", *, " OPTIONS ", " PROJECTIONS ") -> ()",
     cap_residual_},
    {"cap_residual_.buffers(Tensor hidden, Tensor(a!) residual, " BUFFERS ", " OPTIONS ") -> ()", cap_residual_},
    {"add_rms_norm_cap_(" NORMED ", " BANK ", *, float weight_bias=0.0, " OPTIONS ", " PROJECTIONS ") -> ()",
     cap_residual_},
    {"add_rms_norm_cap_.buffers(" NORMED ", " BUFFERS ", float weight_bias=0.0, " OPTIONS ") -> ()", cap_residual_},
    {"add_rms_norm_cap_fp8_(" QUANTIZED ", " BANK ", *, " SCALES ", " OPTIONS ", " PROJECTIONS ") -> ()",
     cap_residual_},
    {"add_rms_norm_cap_fp8_.buffers(" QUANTIZED ", " BUFFERS ", " SCALES ", " OPTIONS ") -> ()", cap_residual_},
    {"cap_layers_(Tensor(a!)[] hiddens, " BANK ", *, " OPTIONS ", " PROJECTIONS ") -> ()", cap_layers_},
    {"accumulate_(Tensor(a!) stats, Tensor projections, Tensor floors, Tensor? slots=None) -> ()", accumulate_},
};

}  // namespace

std::span<const Op> ops() { return kOps; }

const char* const kBankSchema = "Bank(Tensor axes, Tensor floors, " OPTIONS ") -> ()";

py::object cap_with_checked_bank_(const Arguments& a) {
  CapParams p = params_for(*a.hidden, writable_rows_of(*a.hidden, "hidden"), *a.axes, a.slots, a.extent);
  write_in_place(p);
  return cap_in_place(a, p);
}

void launch(const CapParams* layers, int64_t count, Device device) {
  const CapParams& p = layers[0];
  if (p.rows == 0) return;
  if (!device.is_cpu()) {
    const char* error = accelerator_for(device).cap(layers, count, device.index, current_stream(device));
    return check_launched(error, device);
  }
  const int64_t row_bytes = p.hidden_size * (p.dtype == DType::kFloat32 ? 4 : 2) * (p.residual ? 2 : 1);
  // To cap a few rows takes less time than to wake a thread.
  if (count == 1 && p.rows * row_bytes < 2 * kBytesPerThread) return cpu::cap(p, 0, p.rows);
  const int64_t threads = std::max<int64_t>(1, count * p.rows * row_bytes / kBytesPerThread);
  const int64_t grain = (count * p.rows + threads - 1) / threads;
  parallel_for(0, count * p.rows, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t layer = begin / p.rows;
      const int64_t layer_end = std::min(end, (layer + 1) * p.rows);
      cpu::cap(layers[layer], begin - layer * p.rows, layer_end - layer * p.rows);
      begin = layer_end;
    }
  });
}

void launch(const StatsParams& p, Device device) {
  if (device.is_cpu()) return cpu::accumulate(p);
  check_launched(accelerator_for(device).accumulate(p, device.index, current_stream(device)), device);
}

}  // namespace axiscap
