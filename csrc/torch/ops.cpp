#include "ops.h"

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "launchers/accelerator.h"
#include "launchers/cpu.h"

namespace axiscap {
namespace {

// What a thread must have to do: waking it costs a few microseconds where it spins, and some twenty where it sleeps.
constexpr int64_t kBytesPerThread = 128 * 1024;

struct Rows {
  int64_t count;
  int64_t stride;
};

// The leading dimensions of (..., H) as one dimension of rows with one stride.
Rows rows_of(const TensorView& tensor, const char* name) {
  const Sizes sizes = tensor.sizes, strides = tensor.strides;
  const int64_t dim = sizes.count;
  CHECK_VALUE(dim >= 1 && sizes[dim - 1] >= 1, name, " must have shape (..., H) with H >= 1, got ", sizes);
  CHECK_VALUE(strides[dim - 1] == 1 || sizes[dim - 1] == 1, name,
              " must have stride 1 in its last dimension, got strides ", strides);
  Rows rows{1, sizes[dim - 1]};
  for (int64_t d = dim - 2; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (rows.count == 1) rows.stride = strides[d];
    CHECK_VALUE(rows.count == 0 || sizes[d] == 0 || strides[d] == rows.stride * rows.count, name,
                " must have rows with one uniform stride, got shape ", sizes, " with strides ", strides);
    rows.count *= sizes[d];
  }
  return rows;
}

Rows writable_rows_of(const TensorView& tensor, const char* name) {
  const Rows rows = rows_of(tensor, name);
  CHECK_VALUE(rows.count <= 1 || rows.stride >= tensor.size(-1), name,
              " is changed in place, so its rows must not overlap; got a row stride of ", rows.stride,
              " for H = ", tensor.size(-1));
  return rows;
}

// The memory of what a call is given. Each has as much as its shape says, and what is changed shares none with the
// rest.
class Memory {
 public:
  Memory& read(const TensorView& tensor, const char* name) { return add(tensor, name, false); }
  Memory& read(Optional tensor, const char* name) { return tensor ? add(*tensor, name, false) : *this; }
  Memory& change(const TensorView& tensor, const char* name) { return add(tensor, name, true); }
  Memory& change(Optional tensor, const char* name) { return tensor ? add(*tensor, name, true) : *this; }
  Memory& read(const Bank& bank) {
    put(bank.spans[0], bank.axes, "axes");
    put(bank.spans[1], bank.floors, "floors");
    if (bank.lifts) put(bank.spans[2], *bank.lifts, "lifts");
    if (bank.limits) put(bank.spans[3], *bank.limits, "limits");
    return *this;
  }

  void check() const {
    for (int i = 0; i < changed_; ++i)
      for (int j = i + 1; j < count_; ++j)
        if (parts_[i].span.meets(parts_[j].span)) check_apart(parts_[i], parts_[j]);
  }

 private:
  struct Part {
    Span span;
    const TensorView* tensor;
    const char* name;
  };

  Memory& add(const TensorView& tensor, const char* name, bool changed) {
    put(tensor.span(name), tensor, name);
    if (changed) std::swap(parts_[changed_++], parts_[count_ - 1]);
    return *this;
  }

  void put(Span span, const TensorView& tensor, const char* name) { parts_[count_++] = {span, &tensor, name}; }

  // Rows that lie side by side in one buffer, with one stride, share nothing.
  static void check_apart(const Part& a, const Part& b) {
    bool apart = false;
    if (a.tensor->dim() >= 2 && b.tensor->dim() >= 2 && a.tensor->stride(-2) == b.tensor->stride(-2) &&
        a.tensor->stride(-2) > 0 && a.tensor->item_bytes == b.tensor->item_bytes) {
      const int64_t bytes = a.tensor->item_bytes, stride = a.tensor->stride(-2) * bytes;
      const int64_t shift = ((b.span.begin - a.span.begin) % stride + stride) % stride;
      apart = shift >= a.tensor->size(-1) * bytes && shift + b.tensor->size(-1) * bytes <= stride;
    }
    CHECK_VALUE(apart, a.name, " is changed, and shares memory with ", b.name);
  }

  // As many as the op with the most arguments has; those that are changed come first. (Not for copying: it costs what
  // the checks themselves do.)
  Part parts_[12];
  int count_ = 0, changed_ = 0;
};

DType dtype_of(const TensorView& tensor, const char* name) {
  CHECK_TYPE(tensor.dtype == kFloat || tensor.dtype == kBFloat16 || tensor.dtype == kHalf, name,
             " must be float32, bfloat16 or float16, got ", tensor.dtype);
  return tensor.dtype == kFloat ? DType::kFloat32 : tensor.dtype == kHalf ? DType::kFloat16 : DType::kBFloat16;
}

void check_dtype(const TensorView& tensor, const char* name, ScalarType wanted) {
  CHECK_TYPE(tensor.dtype == wanted, name, " must be ", wanted, ", got ", tensor.dtype);
}

void check_device(const TensorView& tensor, const char* name, const TensorView& hidden) {
  CHECK_VALUE(tensor.device == hidden.device, name, " must be on the device of hidden, ", hidden.device, ", got ",
              tensor.device);
}

void check_axes(const TensorView& axes, int64_t dim) {
  check_dtype(axes, "axes", kFloat);
  const Sizes sizes = axes.sizes;
  CHECK_VALUE(sizes.count == dim, "axes must have shape ", dim == 3 ? "(S, K, H)" : "(L, S, K, H)", ", got ", sizes);
  CHECK_VALUE(axes.numel > 0, "axes must have no dimension of size 0, got shape ", sizes);
  CHECK_VALUE(sizes[dim - 2] <= kMaxDirections, "axes must have at most ", kMaxDirections,
              " directions (dimension -2), got ", sizes[dim - 2]);
  CHECK_VALUE(axes.is_contiguous(), "axes must be contiguous, got strides ", axes.strides);
  CHECK_VALUE(!axes.device.is_cuda() || !accelerator || sizes[dim - 1] <= accelerator->max_hidden_size,
              "axes must have an H of at most ", accelerator->max_hidden_size, " on ", axes.device, ", got ",
              sizes[dim - 1]);
}

// What lies in a bank beside its axes: of their shape, or of that less H.
void check_beside(const TensorView& tensor, const char* name, const TensorView& axes, bool whole) {
  check_dtype(tensor, name, kFloat);
  const Sizes wanted = whole ? axes.sizes : axes.sizes.first(axes.dim() - 1);
  CHECK_VALUE(tensor.sizes == wanted, name, " must have the shape of axes", whole ? ", " : " less H, ", wanted,
              ", got ", tensor.sizes);
  CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous, got strides ", tensor.strides);
  CHECK_VALUE(tensor.device == axes.device, name, " must be on the device of axes, ", axes.device, ", got ",
              tensor.device);
}

const float* floats(Span span) { return reinterpret_cast<const float*>(span.begin); }

const int32_t* check_slots(Optional slots, const TensorView& beside, int64_t rows, int64_t num_slots) {
  if (!slots) return nullptr;
  check_dtype(*slots, "slots", kInt);
  CHECK_VALUE(slots->dim() == 1 && slots->size(0) == rows, "slots must have shape (rows,) = (", rows, ",), got ",
              slots->sizes);
  CHECK_VALUE(slots->is_contiguous(), "slots must be contiguous, got strides ", slots->strides);
  check_device(*slots, "slots", beside);
  const int32_t* data = slots->as<const int32_t>();
  // On an accelerator reading them would wait for the device; its kernels leave such rows alone and report NaN.
  if (slots->device.is_cpu())
    for (int64_t row = 0; row < rows; ++row)
      CHECK_INDEX(data[row] >= kNoSlot && data[row] < num_slots, "slots[", row, "] must be in [0, ", num_slots,
                  ") or -1, got ", data[row]);
  return data;
}

float* check_projections(Optional projections, const TensorView& hidden, std::initializer_list<int64_t> wanted) {
  if (!projections) return nullptr;
  const Sizes shape{wanted.begin(), int64_t(wanted.size())};
  check_dtype(*projections, "projections", kFloat);
  CHECK_VALUE(projections->sizes == shape, "projections must have shape ", shape, ", got ", projections->sizes);
  CHECK_VALUE(projections->is_contiguous(), "projections must be contiguous, got strides ", projections->strides);
  check_device(*projections, "projections", hidden);
  return projections->as<float>();
}

// What every op needs: a stream of rows and the axes, with their memory, that measure it.
CapParams params_for(const TensorView& hidden, Rows rows, const TensorView& axes, Span memory, Optional slots) {
  CapParams p;
  p.dtype = dtype_of(hidden, "hidden");
  p.rows = rows.count;
  p.hidden_size = hidden.sizes.back();
  p.hidden = hidden.data;
  p.hidden_stride = rows.stride;
  const Sizes sizes = axes.sizes;
  const int64_t dim = sizes.count;
  CHECK_VALUE(sizes[dim - 1] == p.hidden_size, "axes must have the H of hidden, ", p.hidden_size, ", got ",
              sizes[dim - 1]);
  check_device(axes, "axes", hidden);
  p.axes = floats(memory);
  p.num_slots = sizes[dim - 3];
  p.directions = sizes[dim - 2];
  p.slots = check_slots(slots, hidden, p.rows, p.num_slots);
  return p;
}

// What a cap needs beside them.
void use_bank(CapParams& p, const Bank& bank) {
  p.floors = floats(bank.spans[1]);
  p.lifts = floats(bank.spans[2]);
  p.limits = floats(bank.spans[3]);
}

// The second stream, which the correction goes into.
void use_residual(CapParams& p, const TensorView& hidden, const TensorView& residual) {
  CHECK_VALUE(residual.sizes == hidden.sizes, "residual must have the shape of hidden, ", hidden.sizes, ", got ",
              residual.sizes);
  check_dtype(residual, "residual", hidden.dtype);
  check_device(residual, "residual", hidden);
  p.residual = residual.data;
  p.residual_stride = writable_rows_of(residual, "residual").stride;
  p.out = residual.data;
  p.out_stride = p.residual_stride;
}

// The norm of the sum; where it goes is the op's.
void use_norm(CapParams& p, const TensorView& hidden, const TensorView& weight, double eps, double weight_bias) {
  check_dtype(weight, "weight", hidden.dtype);
  CHECK_VALUE(weight.dim() == 1 && weight.size(0) == p.hidden_size && weight.is_contiguous(),
              "weight must have shape (H,) = (", p.hidden_size, ",), contiguous, got ", weight.sizes);
  check_device(weight, "weight", hidden);
  CHECK_VALUE(eps >= 0 && std::isfinite(eps), "eps must be finite and not negative, got ", eps);
  CHECK_VALUE(std::isfinite(weight_bias), "weight_bias must be finite, got ", weight_bias);
  p.weight = weight.data;
  p.eps = float(eps);
  p.weight_bias = float(weight_bias);
}

const Accelerator& accelerator_for(Device device) {
  CHECK_VALUE(device.is_cuda() && accelerator, "hidden is on ", device,
              ", for which this build of axiscap has no kernels; see `axiscap doctor`");
  return *accelerator;
}

// Of torch's stable interface, what its CUDA library has: looked up there, since a torch without CUDA has no such
// library.
struct TorchCuda {
  AOTITorchError (*create_guard)(int32_t, CUDAGuardHandle*);
  AOTITorchError (*delete_guard)(CUDAGuardHandle);
  AOTITorchError (*current_stream)(int32_t, void**);

  static const TorchCuda& get() {
    static const TorchCuda found = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      CHECK_RUN(library, "axiscap: this torch has no CUDA");
      TorchCuda cuda;
      look_up(library, "aoti_torch_create_cuda_guard", cuda.create_guard);
      look_up(library, "aoti_torch_delete_cuda_guard", cuda.delete_guard);
      look_up(library, "aoti_torch_get_current_cuda_stream", cuda.current_stream);
      return cuda;
    }();
    return found;
  }

 private:
  template <class Function>
  static void look_up(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    CHECK_RUN(function, "axiscap: torch's CUDA library has no ", name);
  }
};

// Starts what takes a stream, on a device that is made the current one for it.
template <class Start>
void launch_on(Device device, Start start) {
  const TorchCuda& cuda = TorchCuda::get();
  struct Guard {
    const TorchCuda& cuda;
    CUDAGuardHandle handle;
    Guard(const TorchCuda& cuda, int32_t index) : cuda(cuda) {
      TORCH_ERROR_CODE_CHECK(cuda.create_guard(index, &handle));
    }
    ~Guard() { cuda.delete_guard(handle); }
  } const guard(cuda, device.index);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(cuda.current_stream(device.index, &stream));
  const char* error = start(stream);
  CHECK_RUN(!error, "axiscap: the launch on ", device, " failed: ", error);
}

// Calls of equal row count and size, one for each layer.
void launch(const CapParams* layers, int64_t count, Device device) {
  const CapParams& p = layers[0];
  if (p.rows == 0) return;
  if (!device.is_cpu()) {
    const Accelerator& on = accelerator_for(device);
    return launch_on(device, [&](void* stream) { return on.cap(layers, count, device.index, stream); });
  }
  const int64_t row_bytes = p.hidden_size * (p.dtype == DType::kFloat32 ? 4 : 2) * (p.residual ? 2 : 1);
  // A few rows take less time than to work out what each thread would do.
  if (count == 1 && p.rows * row_bytes < 2 * kBytesPerThread) return cpu::cap(p, 0, p.rows);
  const int64_t threads = std::max<int64_t>(1, count * p.rows * row_bytes / kBytesPerThread);
  const int64_t grain = (count * p.rows + threads - 1) / threads;
  parallel_for(0, count * p.rows, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t layer = begin / p.rows;
      const int64_t stop = std::min(end, (layer + 1) * p.rows);
      cpu::cap(layers[layer], begin - layer * p.rows, stop - layer * p.rows);
      begin = stop;
    }
  });
}

// Of a buffer that is kept for the largest call: the part for the rows of hidden.
class FirstRows {
 public:
  FirstRows(const TensorView& buffer, const char* name, const TensorView& hidden)
      : sizes_(buffer.sizes.begin(), buffer.sizes.end()), view_(buffer) {
    const int64_t rows = rows_of(hidden, "hidden").count;
    CHECK_VALUE(buffer.dim() >= 1 && buffer.size(0) >= rows, name, " must have room for the ", rows,
                " rows, got shape ", buffer.sizes);
    view_.numel = sizes_[0] == 0 ? 0 : buffer.numel / sizes_[0] * rows;
    sizes_[0] = rows;
    view_.sizes.data = sizes_.data();
  }
  FirstRows(const FirstRows&) = delete;  // the view refers to its neighbour

  Optional view() const { return &view_; }

 private:
  std::vector<int64_t> sizes_;
  TensorView view_;
};

NewTensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, Device device) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(1, sizes[d])) strides[d] = stride;
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype.number,
                                                  device.type, device.index, &made));
  return NewTensor(made);
}

// A tensor's numbers where the host can read them: its own, or a copy.
class OnHost {
 public:
  explicit OnHost(const TensorView& tensor) : data_(tensor.as<const float>()) {
    if (tensor.device.is_cpu()) return;
    copy_ = empty({tensor.sizes.begin(), tensor.sizes.end()}, kFloat, {aoti_torch_device_type_cpu(), 0});
    TORCH_ERROR_CODE_CHECK(aoti_torch_tensor_copy_(tensor.handle, copy_->get()));
    data_ = TensorView(copy_->get()).as<const float>();
  }

  float operator[](int64_t i) const { return data_[i]; }

 private:
  const float* data_;
  std::optional<NewTensor> copy_;
};

}  // namespace

void parallel_for(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  const auto call = [](int64_t from, int64_t to, void* given) {
    (*static_cast<const std::function<void(int64_t, int64_t)>*>(given))(from, to);
  };
  TORCH_ERROR_CODE_CHECK(
      torch_parallel_for(begin, end, grain, call, const_cast<std::function<void(int64_t, int64_t)>*>(&body)));
}

Bank::Bank(const TensorView& axes, const TensorView& floors, Optional lifts, Optional limits, bool many_layers)
    : axes(axes), floors(floors), lifts(lifts), limits(limits) {
  check_axes(axes, many_layers ? 4 : 3);
  check_beside(floors, "floors", axes, false);
  if (lifts) check_beside(*lifts, "lifts", axes, true);
  if (limits) check_beside(*limits, "limits", axes, false);
  spans = {axes.span("axes"), floors.span("floors"), lifts ? lifts->span("lifts") : Span(),
           limits ? limits->span("limits") : Span()};
}

bool Bank::is_as_it_was() const {
  const auto holds = [](const TensorView& was) {
    void* data = nullptr;
    int64_t bytes = 0, numel = 0;
    return torch_get_mutable_data_ptr(was.handle, &data) == TORCH_SUCCESS && data == was.data &&
           aoti_torch_get_storage_size(was.handle, &bytes) == TORCH_SUCCESS && bytes == was.storage_bytes &&
           aoti_torch_get_numel(was.handle, &numel) == TORCH_SUCCESS && numel == was.numel;
  };
  return holds(axes) && holds(floors) && (!lifts || holds(*lifts)) && (!limits || holds(*limits)) &&
         floors.numel * axes.sizes.back() == axes.numel;
}

void check_values(const Bank& bank) {
  constexpr double kTolerance = 1e-3;
  const int64_t size = bank.axes.sizes.back(), directions = bank.floors.numel;
  const OnHost axes(bank.axes), floors(bank.floors);
  std::optional<OnHost> lifts, limits;
  if (bank.lifts) lifts.emplace(*bank.lifts);
  if (bank.limits) limits.emplace(*bank.limits);
  const auto product = [size](const OnHost& a, const OnHost& b, int64_t k) {
    double sum = 0;
    for (int64_t i = k * size; i < (k + 1) * size; ++i) sum += double(a[i]) * b[i];
    return sum;
  };
  // Written so that what is not a number fails each of them.
  for (int64_t k = 0; k < directions; ++k) {
    const double norm = std::sqrt(product(axes, axes, k));
    CHECK_VALUE(std::abs(norm - 1) <= kTolerance, "axes must be finite and of unit length (", kTolerance,
                "), got a norm of ", norm);
    CHECK_VALUE(floors[k] < std::numeric_limits<float>::infinity(),
                "floors must be finite, or -inf for a direction that is off, got ", floors[k]);
    if (lifts) {
      const double along = product(axes, *lifts, k);
      CHECK_VALUE(along > 0 && along <= 1 + kTolerance,
                  "lifts must be finite, above 0 and at most 1 along their axes (", kTolerance, "), got ", along);
    }
    if (limits) CHECK_VALUE((*limits)[k] > 0, "limits must be positive, or inf for none, got ", (*limits)[k]);
  }
}

void cap_bank_(const TensorView& hidden, const Bank& bank, Optional slots, Optional projections) {
  Memory memory;
  memory.change(hidden, "hidden").change(projections, "projections").read(bank).read(slots, "slots");
  CapParams p = params_for(hidden, writable_rows_of(hidden, "hidden"), bank.axes, bank.spans[0], slots);
  use_bank(p, bank);
  p.projections = check_projections(projections, hidden, {p.rows, p.directions});
  memory.check();
  p.out = hidden.data;
  p.out_stride = p.hidden_stride;
  launch(&p, 1, hidden.device);
}

void cap_(const TensorView& hidden, const TensorView& axes, const TensorView& floors, Optional slots, Optional lifts,
          Optional limits, Optional projections) {
  cap_bank_(hidden, Bank(axes, floors, lifts, limits), slots, projections);
}

// A slice that a graph itself takes of a buffer may be copied around the call: functionalisation does so where vLLM
// compiles.
void cap__buffers(const TensorView& hidden, const TensorView& axes, const TensorView& floors, const TensorView& slots,
                  const TensorView& projections, Optional lifts, Optional limits) {
  const FirstRows own_slots(slots, "slots", hidden), own_projections(projections, "projections", hidden);
  cap_(hidden, axes, floors, own_slots.view(), lifts, limits, own_projections.view());
}

std::tuple<NewTensor, NewTensor, NewTensor> cap(const TensorView& hidden, const TensorView& axes,
                                                const TensorView& floors, Optional slots, Optional lifts,
                                                Optional limits) {
  const Bank bank(axes, floors, lifts, limits);
  Memory().read(hidden, "hidden").read(bank).read(slots, "slots");
  CapParams p = params_for(hidden, rows_of(hidden, "hidden"), bank.axes, bank.spans[0], slots);
  const NewTensor out = empty({hidden.sizes.begin(), hidden.sizes.end()}, hidden.dtype, hidden.device);
  const NewTensor projections = empty({p.rows, p.directions}, kFloat, hidden.device);
  const NewTensor fired = empty({p.rows, p.directions}, kBool, hidden.device);
  use_bank(p, bank);
  p.projections = TensorView(projections.get()).as<float>();
  p.fired = TensorView(fired.get()).as<uint8_t>();
  p.out = TensorView(out.get()).data;
  p.out_stride = p.hidden_size;
  launch(&p, 1, hidden.device);
  return {out, projections, fired};
}

NewTensor project(const TensorView& hidden, const TensorView& axes, Optional slots) {
  Memory().read(hidden, "hidden").read(slots, "slots");
  check_axes(axes, 3);
  CapParams p = params_for(hidden, rows_of(hidden, "hidden"), axes, axes.span("axes"), slots);
  std::vector<int64_t> shape{hidden.sizes.begin(), hidden.sizes.end()};
  shape.back() = p.directions;
  const NewTensor projections = empty(shape, kFloat, hidden.device);
  p.projections = TensorView(projections.get()).as<float>();
  launch(&p, 1, hidden.device);
  return projections;
}

void cap_residual_(const TensorView& hidden, const TensorView& residual, const TensorView& axes,
                   const TensorView& floors, Optional slots, Optional lifts, Optional limits, Optional projections) {
  const Bank bank(axes, floors, lifts, limits);
  Memory memory;
  memory.change(residual, "residual").read(hidden, "hidden").read(bank).read(slots, "slots");
  memory.change(projections, "projections");
  CapParams p = params_for(hidden, rows_of(hidden, "hidden"), bank.axes, bank.spans[0], slots);
  use_residual(p, hidden, residual);
  use_bank(p, bank);
  p.projections = check_projections(projections, hidden, {p.rows, p.directions});
  memory.check();
  launch(&p, 1, hidden.device);
}

void cap_residual__buffers(const TensorView& hidden, const TensorView& residual, const TensorView& axes,
                           const TensorView& floors, const TensorView& slots, const TensorView& projections,
                           Optional lifts, Optional limits) {
  const FirstRows own_slots(slots, "slots", hidden), own_projections(projections, "projections", hidden);
  cap_residual_(hidden, residual, axes, floors, own_slots.view(), lifts, limits, own_projections.view());
}

void add_rms_norm_cap_(const TensorView& hidden, const TensorView& residual, const TensorView& weight, double eps,
                       const TensorView& axes, const TensorView& floors, Optional slots, double weight_bias,
                       Optional lifts, Optional limits, Optional projections) {
  const Bank bank(axes, floors, lifts, limits);
  Memory memory;
  memory.change(residual, "residual").change(hidden, "hidden").change(projections, "projections");
  memory.read(weight, "weight").read(bank).read(slots, "slots");
  CapParams p = params_for(hidden, writable_rows_of(hidden, "hidden"), bank.axes, bank.spans[0], slots);
  use_residual(p, hidden, residual);
  use_norm(p, hidden, weight, eps, weight_bias);
  use_bank(p, bank);
  p.projections = check_projections(projections, hidden, {p.rows, p.directions});
  memory.check();
  p.normed = hidden.data;
  p.normed_stride = p.hidden_stride;
  launch(&p, 1, hidden.device);
}

void add_rms_norm_cap__buffers(const TensorView& hidden, const TensorView& residual, const TensorView& weight,
                               double eps, const TensorView& axes, const TensorView& floors, const TensorView& slots,
                               const TensorView& projections, double weight_bias, Optional lifts, Optional limits) {
  const FirstRows own_slots(slots, "slots", hidden), own_projections(projections, "projections", hidden);
  add_rms_norm_cap_(hidden, residual, weight, eps, axes, floors, own_slots.view(), weight_bias, lifts, limits,
                    own_projections.view());
}

void add_rms_norm_cap_fp8_(const TensorView& quantized, const TensorView& hidden, const TensorView& residual,
                           const TensorView& weight, double eps, const TensorView& axes, const TensorView& floors,
                           Optional slots, double weight_bias, Optional scale, Optional scales, Optional lifts,
                           Optional limits, Optional projections) {
  const Bank bank(axes, floors, lifts, limits);
  Memory memory;
  memory.change(residual, "residual").change(quantized, "quantized").change(scales, "scales");
  memory.change(projections, "projections").read(hidden, "hidden").read(weight, "weight").read(scale, "scale");
  memory.read(bank).read(slots, "slots");
  CapParams p = params_for(hidden, rows_of(hidden, "hidden"), bank.axes, bank.spans[0], slots);
  use_residual(p, hidden, residual);
  use_norm(p, hidden, weight, eps, weight_bias);
  CHECK_VALUE(quantized.sizes == hidden.sizes, "quantized must have the shape of hidden, ", hidden.sizes, ", got ",
              quantized.sizes);
  check_dtype(quantized, "quantized", kFloat8);
  check_device(quantized, "quantized", hidden);
  CHECK_VALUE(!scale != !scales, "one of scale and scales must be given");
  const TensorView& given = scale ? *scale : *scales;
  const char* name = scale ? "scale" : "scales";
  const int64_t wanted = scale ? 1 : p.rows;
  check_dtype(given, name, kFloat);
  CHECK_VALUE(given.numel == wanted && given.is_contiguous(), name, " must be contiguous and have ", wanted,
              scale ? " element" : " elements, one for each row", ", got shape ", given.sizes);
  check_device(given, name, hidden);
  use_bank(p, bank);
  p.projections = check_projections(projections, hidden, {p.rows, p.directions});
  memory.check();
  p.normed = quantized.data;
  p.normed_stride = writable_rows_of(quantized, "quantized").stride;
  p.scale = scale ? given.as<const float>() : nullptr;
  p.scales = scales ? given.as<float>() : nullptr;
  launch(&p, 1, hidden.device);
}

void add_rms_norm_cap_fp8__buffers(const TensorView& quantized, const TensorView& hidden, const TensorView& residual,
                                   const TensorView& weight, double eps, const TensorView& axes,
                                   const TensorView& floors, const TensorView& slots, const TensorView& projections,
                                   double weight_bias, Optional scale, Optional scales, Optional lifts,
                                   Optional limits) {
  const FirstRows own_slots(slots, "slots", hidden), own_projections(projections, "projections", hidden);
  add_rms_norm_cap_fp8_(quantized, hidden, residual, weight, eps, axes, floors, own_slots.view(), weight_bias, scale,
                        scales, lifts, limits, own_projections.view());
}

void cap_layers_(TensorList hiddens, const TensorView& axes, const TensorView& floors, Optional slots, Optional lifts,
                 Optional limits, Optional projections) {
  const Bank bank(axes, floors, lifts, limits, true);
  const int64_t count = hiddens.size();
  CHECK_VALUE(count == axes.size(0), "axes must have one entry for each of the ", count, " hiddens, got ",
              axes.size(0));
  const TensorView& first = hiddens[0];
  const Memory shared = Memory().change(projections, "projections").read(bank).read(slots, "slots");
  std::vector<CapParams> layers(count);
  for (int64_t layer = 0; layer < count; ++layer) {
    const TensorView& hidden = hiddens[layer];
    const Memory memory = Memory(shared).change(hidden, "hiddens");
    CHECK_VALUE(hidden.sizes == first.sizes, "hiddens must have one shape, got ", first.sizes, " and ", hidden.sizes);
    check_dtype(hidden, "hiddens", first.dtype);
    check_device(hidden, "hiddens", first);
    CapParams& p = layers[layer];
    if (layer == 0) {
      p = params_for(hidden, writable_rows_of(hidden, "hiddens"), axes, bank.spans[0], slots);
      use_bank(p, bank);
      p.projections = check_projections(projections, first, {count, p.rows, p.directions});
    } else {
      p = layers[layer - 1];
      p.hidden = hidden.data;
      p.hidden_stride = writable_rows_of(hidden, "hiddens").stride;
      const int64_t directions = p.num_slots * p.directions;
      p.axes += directions * p.hidden_size;
      p.floors += directions;
      if (p.lifts) p.lifts += directions * p.hidden_size;
      if (p.limits) p.limits += directions;
      if (p.projections) p.projections += p.rows * p.directions;
    }
    memory.check();
    p.out = hidden.data;
    p.out_stride = p.hidden_stride;
  }
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return layers[a].hidden < layers[b].hidden; });
  for (int64_t i = 1; i < count; ++i)
    Memory().change(hiddens[order[i]], "hiddens").read(hiddens[order[i - 1]], "another of them").check();
  launch(layers.data(), count, first.device);
}

void accumulate_(const TensorView& stats, const TensorView& projections, const TensorView& floors, Optional slots) {
  Memory memory;
  memory.change(stats, "stats").read(projections, "projections").read(floors, "floors").read(slots, "slots");
  check_dtype(stats, "stats", kDouble);
  check_dtype(projections, "projections", kFloat);
  check_dtype(floors, "floors", kFloat);
  const bool many = floors.dim() == 3;
  CHECK_VALUE((many || floors.dim() == 2) && floors.numel > 0 && floors.is_contiguous(),
              "floors must have shape (S, K) or (L, S, K), none of them 0, contiguous, got ", floors.sizes);
  std::vector<int64_t> wanted(floors.sizes.begin(), floors.sizes.end());
  wanted.push_back(kStatFields);
  const Sizes shape{wanted.data(), int64_t(wanted.size())};
  CHECK_VALUE(stats.sizes == shape && stats.is_contiguous(), "stats must have shape ", shape, ", contiguous, got ",
              stats.sizes);
  CHECK_VALUE(projections.dim() == floors.dim() && projections.size(-1) == floors.size(-1) &&
                  (!many || projections.size(0) == floors.size(0)) && projections.is_contiguous(many ? 1 : 0),
              "projections must have shape (", many ? "L, " : "", "rows, K) with the sizes of floors, ", floors.sizes,
              ", rows contiguous, got ", projections.sizes, " with strides ", projections.strides);
  check_device(floors, "floors", projections);
  check_device(stats, "stats", projections);
  memory.check();
  StatsParams p;
  p.rows = projections.size(-2);
  p.num_slots = floors.size(-2);
  p.directions = floors.size(-1);
  p.layers = many ? floors.size(0) : 1;
  p.layer_stride = projections.stride(0);
  p.projections = projections.as<const float>();
  p.floors = floors.as<const float>();
  p.slots = check_slots(slots, projections, p.rows, p.num_slots);
  p.stats = stats.as<double>();
  const Device device = projections.device;
  if (device.is_cpu()) return cpu::accumulate(p);
  const Accelerator& on = accelerator_for(device);
  launch_on(device, [&](void* stream) { return on.accumulate(p, device.index, stream); });
}

}  // namespace axiscap
