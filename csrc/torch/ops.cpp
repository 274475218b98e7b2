#include "ops.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "axiscap/accelerator.h"
#include "axiscap/cpu.h"

namespace axiscap {
namespace {

// What a thread must have to do: waking it costs a few microseconds where it spins, and some twenty where it sleeps.
constexpr int64_t kBytesPerThread = 128 * 1024;

struct Rows {
  int64_t count;
  int64_t stride;
};

// The leading dimensions of (..., H) as one dimension of rows with one stride.
Rows rows_of(const at::Tensor& tensor, const char* name) {
  const at::IntArrayRef sizes = tensor.sizes(), strides = tensor.strides();
  const int64_t dim = int64_t(sizes.size());
  TORCH_CHECK_VALUE(dim >= 1 && sizes[dim - 1] >= 1, name, " must have shape (..., H) with H >= 1, got ", sizes);
  TORCH_CHECK_VALUE(strides[dim - 1] == 1 || sizes[dim - 1] == 1, name,
                    " must have stride 1 in its last dimension, got strides ", strides);
  Rows rows{1, sizes[dim - 1]};
  for (int64_t d = dim - 2; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (rows.count == 1) rows.stride = strides[d];
    TORCH_CHECK_VALUE(rows.count == 0 || sizes[d] == 0 || strides[d] == rows.stride * rows.count, name,
                      " must have rows with one uniform stride, got shape ", sizes, " with strides ", strides);
    rows.count *= sizes[d];
  }
  return rows;
}

Rows writable_rows_of(const at::Tensor& tensor, const char* name) {
  const Rows rows = rows_of(tensor, name);
  TORCH_CHECK_VALUE(rows.count <= 1 || rows.stride >= tensor.size(-1), name,
                    " is changed in place, so its rows must not overlap; got a row stride of ", rows.stride,
                    " for H = ", tensor.size(-1));
  TORCH_CHECK_VALUE(!(tensor.requires_grad() && at::GradMode::is_enabled()), name,
                    " requires grad and is changed in place; use axiscap.ops.cap, which is differentiable");
  return rows;
}

// The memory of a tensor. A storage that was resized, or freed by a parameter's owner, has less than its tensor says.
Span span_of(const at::Tensor& tensor, const char* name) {
  const c10::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
  int64_t last = impl.numel() - 1;
  if (last < 0) return {};
  if (!impl.is_contiguous()) {
    last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  }
  const int64_t bytes = impl.itemsize(), begin = impl.storage_offset() * bytes, end = begin + (last + 1) * bytes;
  const c10::StorageImpl& storage = *impl.unsafe_storage().unsafeGetStorageImpl();
  TORCH_CHECK_VALUE(end <= int64_t(storage.nbytes()), name, " has less memory than its shape ", tensor.sizes(),
                    " needs");
  const char* data = static_cast<const char*>(storage.data());
  return {data + begin, data + end};
}

// The memory of what a call is given. Each has as much as its shape says, and what is changed shares none with the
// rest.
class Memory {
 public:
  Memory& read(const at::Tensor& tensor, const char* name) { return add(tensor, name, false); }
  Memory& read(const OptionalTensor& tensor, const char* name) { return tensor ? add(*tensor, name, false) : *this; }
  Memory& change(const at::Tensor& tensor, const char* name) { return add(tensor, name, true); }
  Memory& change(const OptionalTensor& tensor, const char* name) { return tensor ? add(*tensor, name, true) : *this; }
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
    const at::Tensor* tensor;
    const char* name;
  };

  Memory& add(const at::Tensor& tensor, const char* name, bool changed) {
    put(span_of(tensor, name), tensor, name);
    if (changed) std::swap(parts_[changed_++], parts_[count_ - 1]);
    return *this;
  }

  void put(Span span, const at::Tensor& tensor, const char* name) { parts_[count_++] = {span, &tensor, name}; }

  // Rows that lie side by side in one buffer, with one stride, share nothing.
  static void check_apart(const Part& a, const Part& b) {
    bool apart = false;
    if (a.tensor->dim() >= 2 && b.tensor->dim() >= 2 && a.tensor->stride(-2) == b.tensor->stride(-2) &&
        a.tensor->stride(-2) > 0 && a.tensor->element_size() == b.tensor->element_size()) {
      const int64_t bytes = a.tensor->element_size(), stride = a.tensor->stride(-2) * bytes;
      const int64_t shift = ((b.span.begin - a.span.begin) % stride + stride) % stride;
      apart = shift >= a.tensor->size(-1) * bytes && shift + b.tensor->size(-1) * bytes <= stride;
    }
    TORCH_CHECK_VALUE(apart, a.name, " is changed, and shares memory with ", b.name);
  }

  // As many as the op with the most arguments has; those that are changed come first. (Not for copying: it costs what
  // the checks themselves do.)
  Part parts_[9];
  int count_ = 0, changed_ = 0;
};

DType dtype_of(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, name, " must be float32, bfloat16 or float16, got ", tensor.scalar_type());
  }
}

void check_dtype(const at::Tensor& tensor, const char* name, at::ScalarType wanted) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == wanted, name, " must be ", wanted, ", got ", tensor.scalar_type());
}

void check_device(const at::Tensor& tensor, const char* name, const at::Tensor& hidden) {
  TORCH_CHECK_VALUE(tensor.device() == hidden.device(), name, " must be on the device of hidden, ", hidden.device(),
                    ", got ", tensor.device());
}

void check_axes(const at::Tensor& axes, int64_t dim) {
  check_dtype(axes, "axes", at::kFloat);
  const at::IntArrayRef sizes = axes.sizes();
  TORCH_CHECK_VALUE(int64_t(sizes.size()) == dim, "axes must have shape ", dim == 3 ? "(S, K, H)" : "(L, S, K, H)",
                    ", got ", sizes);
  TORCH_CHECK_VALUE(axes.numel() > 0, "axes must have no dimension of size 0, got shape ", sizes);
  TORCH_CHECK_VALUE(sizes[dim - 2] <= kMaxDirections, "axes must have at most ", kMaxDirections,
                    " directions (dimension -2), got ", sizes[dim - 2]);
  TORCH_CHECK_VALUE(axes.is_contiguous(), "axes must be contiguous, got strides ", axes.strides());
  TORCH_CHECK_VALUE(!axes.is_cuda() || !accelerator || sizes[dim - 1] <= accelerator->max_hidden_size,
                    "axes must have an H of at most ", accelerator->max_hidden_size, " on ", axes.device(), ", got ",
                    sizes[dim - 1]);
}

// What lies in a bank beside its axes: of their shape, or of that less H.
void check_beside(const at::Tensor& tensor, const char* name, const at::Tensor& axes, bool whole) {
  check_dtype(tensor, name, at::kFloat);
  const at::IntArrayRef wanted = whole ? axes.sizes() : axes.sizes().slice(0, axes.dim() - 1);
  TORCH_CHECK_VALUE(tensor.sizes() == wanted, name, " must have the shape of axes", whole ? ", " : " less H, ", wanted,
                    ", got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous, got strides ", tensor.strides());
  TORCH_CHECK_VALUE(tensor.device() == axes.device(), name, " must be on the device of axes, ", axes.device(), ", got ",
                    tensor.device());
}

const float* floats(Span span) { return reinterpret_cast<const float*>(span.begin); }

const int32_t* check_slots(const OptionalTensor& slots, const at::Tensor& beside, int64_t rows, int64_t num_slots) {
  if (!slots) return nullptr;
  check_dtype(*slots, "slots", at::kInt);
  TORCH_CHECK_VALUE(slots->dim() == 1 && slots->size(0) == rows, "slots must have shape (rows,) = (", rows, ",), got ",
                    slots->sizes());
  TORCH_CHECK_VALUE(slots->is_contiguous(), "slots must be contiguous, got strides ", slots->strides());
  check_device(*slots, "slots", beside);
  const int32_t* data = slots->const_data_ptr<int32_t>();
  // On an accelerator reading them would wait for the device; its kernels leave such rows alone and report NaN.
  if (slots->is_cpu())
    for (int64_t row = 0; row < rows; ++row)
      TORCH_CHECK_INDEX(data[row] >= kNoSlot && data[row] < num_slots, "slots[", row, "] must be in [0, ", num_slots,
                        ") or -1, got ", data[row]);
  return data;
}

float* check_projections(const OptionalTensor& projections, const at::Tensor& hidden, at::IntArrayRef shape) {
  if (!projections) return nullptr;
  check_dtype(*projections, "projections", at::kFloat);
  TORCH_CHECK_VALUE(projections->sizes() == shape, "projections must have shape ", shape, ", got ",
                    projections->sizes());
  TORCH_CHECK_VALUE(projections->is_contiguous(), "projections must be contiguous, got strides ",
                    projections->strides());
  check_device(*projections, "projections", hidden);
  return projections->mutable_data_ptr<float>();
}

// What every op needs: a stream of rows and the axes, with their memory, that measure it.
CapParams params_for(const at::Tensor& hidden, Rows rows, const at::Tensor& axes, Span memory,
                     const OptionalTensor& slots) {
  CapParams p;
  p.dtype = dtype_of(hidden, "hidden");
  p.rows = rows.count;
  p.hidden_size = hidden.sizes().back();
  p.hidden = hidden.const_data_ptr();
  p.hidden_stride = rows.stride;
  const at::IntArrayRef sizes = axes.sizes();
  const int64_t dim = int64_t(sizes.size());
  TORCH_CHECK_VALUE(sizes[dim - 1] == p.hidden_size, "axes must have the H of hidden, ", p.hidden_size, ", got ",
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
void use_residual(CapParams& p, const at::Tensor& hidden, const at::Tensor& residual) {
  TORCH_CHECK_VALUE(residual.sizes() == hidden.sizes(), "residual must have the shape of hidden, ", hidden.sizes(),
                    ", got ", residual.sizes());
  check_dtype(residual, "residual", hidden.scalar_type());
  check_device(residual, "residual", hidden);
  p.residual = residual.const_data_ptr();
  p.residual_stride = writable_rows_of(residual, "residual").stride;
  p.out = residual.mutable_data_ptr();
  p.out_stride = p.residual_stride;
}

void* stream_of(at::Device device) {
  return reinterpret_cast<void*>(c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle());
}

const Accelerator& accelerator_for(at::Device device) {
  TORCH_CHECK_VALUE(device.is_cuda() && accelerator, "hidden is on ", device,
                    ", for which this build of axiscap has no kernels; see `axiscap doctor`");
  return *accelerator;
}

// Calls of equal row count and size, one for each layer.
void launch(const CapParams* layers, int64_t count, at::Device device) {
  const CapParams& p = layers[0];
  if (p.rows == 0) return;
  if (!device.is_cpu()) {
    const c10::DeviceGuard guard(device);
    const char* error = accelerator_for(device).cap(layers, count, stream_of(device));
    TORCH_CHECK(!error, "axiscap: the launch on ", device, " failed: ", error);
    return;
  }
  const int64_t row_bytes = p.hidden_size * (p.dtype == DType::kFloat32 ? 4 : 2) * (p.residual ? 2 : 1);
  // A few rows take less time than to work out what each thread would do.
  if (count == 1 && p.rows * row_bytes < 2 * kBytesPerThread) return cpu::cap(p, 0, p.rows);
  const int64_t threads = std::max<int64_t>(1, count * p.rows * row_bytes / kBytesPerThread);
  const int64_t grain = at::divup(count * p.rows, threads);
  at::parallel_for(0, count * p.rows, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t layer = begin / p.rows;
      const int64_t stop = std::min(end, (layer + 1) * p.rows);
      cpu::cap(layers[layer], begin - layer * p.rows, stop - layer * p.rows);
      begin = stop;
    }
  });
}

// Of a buffer that is kept for the largest call: the part for the rows of hidden.
at::Tensor first_rows(const at::Tensor& buffer, const char* name, const at::Tensor& hidden) {
  const int64_t rows = rows_of(hidden, "hidden").count;
  TORCH_CHECK_VALUE(buffer.dim() >= 1 && buffer.size(0) >= rows, name, " must have room for the ", rows,
                    " rows, got shape ", buffer.sizes());
  return buffer.narrow(0, 0, rows);
}

// The dispatcher does this for an op whose schema says (a!); a direct call has to say it itself, so that autograd
// notices a saved tensor that was changed.
void mark_changed(const at::Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

}  // namespace

Bank::Bank(const at::Tensor& axes, const at::Tensor& floors, const OptionalTensor& lifts, const OptionalTensor& limits,
           bool many_layers)
    : axes(axes), floors(floors), lifts(lifts), limits(limits) {
  check_axes(axes, many_layers ? 4 : 3);
  check_beside(floors, "floors", axes, false);
  if (lifts) check_beside(*lifts, "lifts", axes, true);
  if (limits) check_beside(*limits, "limits", axes, false);
  if (axes.is_meta() || axes.key_set().has(c10::DispatchKey::Python)) return;  // no memory, and for no kernel
  spans = {span_of(axes, "axes"), span_of(floors, "floors"), lifts ? span_of(*lifts, "lifts") : Span(),
           limits ? span_of(*limits, "limits") : Span()};
}

bool Bank::is_as_it_was() const {
  const auto holds = [](const at::Tensor& tensor, const char* name, const Span& was) {
    const Span now = span_of(tensor, name);
    return now.begin == was.begin && now.end == was.end;
  };
  return holds(axes, "axes", spans[0]) && holds(floors, "floors", spans[1]) &&
         (!lifts || holds(*lifts, "lifts", spans[2])) && (!limits || holds(*limits, "limits", spans[3])) &&
         floors.numel() * axes.sizes().back() == axes.numel();
}

void check_values(const Bank& bank) {
  const at::Tensor norms = at::linalg_vector_norm(bank.axes, 2, {-1});
  TORCH_CHECK_VALUE((norms - 1).abs().le(1e-3).all().item<bool>(),
                    "axes must be finite and of unit length (1e-3), got norms from ", norms.min().item<float>(), " to ",
                    norms.max().item<float>());
  TORCH_CHECK_VALUE((bank.floors < std::numeric_limits<float>::infinity()).all().item<bool>(),
                    "floors must be finite, or -inf for a direction that is off");
  if (bank.lifts) {
    const at::Tensor along = (bank.axes * *bank.lifts).sum(-1);
    TORCH_CHECK_VALUE(bank.lifts->isfinite().all().item<bool>() && (along > 0).all().item<bool>() &&
                          along.le(1 + 1e-3).all().item<bool>(),
                      "lifts must be finite, above 0 and at most 1 along their axes (1e-3), got from ",
                      along.min().item<float>(), " to ", along.max().item<float>());
  }
  if (bank.limits) TORCH_CHECK_VALUE((*bank.limits > 0).all().item<bool>(), "limits must be positive, or inf for none");
}

void cap_bank_(const at::Tensor& hidden, const Bank& bank, const OptionalTensor& slots,
               const OptionalTensor& projections) {
  Memory memory;
  memory.change(hidden, "hidden").change(projections, "projections").read(bank).read(slots, "slots");
  CapParams p = params_for(hidden, writable_rows_of(hidden, "hidden"), bank.axes, bank.spans[0], slots);
  use_bank(p, bank);
  p.projections = check_projections(projections, hidden, {p.rows, p.directions});
  memory.check();
  p.out = hidden.mutable_data_ptr();
  p.out_stride = p.hidden_stride;
  launch(&p, 1, hidden.device());
  mark_changed(hidden);
}

void cap_(const at::Tensor& hidden, const at::Tensor& axes, const at::Tensor& floors, const OptionalTensor& slots,
          const OptionalTensor& lifts, const OptionalTensor& limits, const OptionalTensor& projections) {
  cap_bank_(hidden, Bank(axes, floors, lifts, limits), slots, projections);
}

// A slice that a graph itself takes of a buffer may be copied around the call: functionalisation does so where vLLM
// compiles.
void cap__buffers(const at::Tensor& hidden, const at::Tensor& axes, const at::Tensor& floors, const at::Tensor& slots,
                  const at::Tensor& projections, const OptionalTensor& lifts, const OptionalTensor& limits) {
  cap_(hidden, axes, floors, first_rows(slots, "slots", hidden), lifts, limits,
       first_rows(projections, "projections", hidden));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> cap(const at::Tensor& hidden, const at::Tensor& axes,
                                                   const at::Tensor& floors, const OptionalTensor& slots,
                                                   const OptionalTensor& lifts, const OptionalTensor& limits) {
  const Bank bank(axes, floors, lifts, limits);
  Memory().read(hidden, "hidden").read(bank).read(slots, "slots");
  CapParams p = params_for(hidden, rows_of(hidden, "hidden"), bank.axes, bank.spans[0], slots);
  const at::Tensor out = at::empty(hidden.sizes(), hidden.options());
  const at::Tensor projections = at::empty({p.rows, p.directions}, axes.options());
  const at::Tensor fired = at::empty({p.rows, p.directions}, axes.options().dtype(at::kBool));
  use_bank(p, bank);
  p.projections = projections.mutable_data_ptr<float>();
  p.fired = static_cast<uint8_t*>(fired.mutable_data_ptr());
  p.out = out.mutable_data_ptr();
  p.out_stride = p.hidden_size;
  launch(&p, 1, hidden.device());
  return {out, projections, fired};
}

at::Tensor project(const at::Tensor& hidden, const at::Tensor& axes, const OptionalTensor& slots) {
  Memory().read(hidden, "hidden").read(slots, "slots");
  check_axes(axes, 3);
  CapParams p = params_for(hidden, rows_of(hidden, "hidden"), axes, span_of(axes, "axes"), slots);
  std::vector<int64_t> shape = hidden.sizes().vec();
  shape.back() = p.directions;
  const at::Tensor projections = at::empty(shape, axes.options());
  p.projections = projections.mutable_data_ptr<float>();
  launch(&p, 1, hidden.device());
  return projections;
}

void cap_residual_(const at::Tensor& hidden, const at::Tensor& residual, const at::Tensor& axes,
                   const at::Tensor& floors, const OptionalTensor& slots, const OptionalTensor& lifts,
                   const OptionalTensor& limits, const OptionalTensor& projections) {
  const Bank bank(axes, floors, lifts, limits);
  Memory memory;
  memory.change(residual, "residual").read(hidden, "hidden").read(bank).read(slots, "slots");
  memory.change(projections, "projections");
  CapParams p = params_for(hidden, rows_of(hidden, "hidden"), bank.axes, bank.spans[0], slots);
  use_residual(p, hidden, residual);
  use_bank(p, bank);
  p.projections = check_projections(projections, hidden, {p.rows, p.directions});
  memory.check();
  launch(&p, 1, hidden.device());
  mark_changed(residual);
}

void cap_residual__buffers(const at::Tensor& hidden, const at::Tensor& residual, const at::Tensor& axes,
                           const at::Tensor& floors, const at::Tensor& slots, const at::Tensor& projections,
                           const OptionalTensor& lifts, const OptionalTensor& limits) {
  cap_residual_(hidden, residual, axes, floors, first_rows(slots, "slots", hidden), lifts, limits,
                first_rows(projections, "projections", hidden));
}

void add_rms_norm_cap_(const at::Tensor& hidden, const at::Tensor& residual, const at::Tensor& weight, double eps,
                       const at::Tensor& axes, const at::Tensor& floors, const OptionalTensor& slots,
                       double weight_bias, const OptionalTensor& lifts, const OptionalTensor& limits,
                       const OptionalTensor& projections) {
  const Bank bank(axes, floors, lifts, limits);
  Memory memory;
  memory.change(residual, "residual").change(hidden, "hidden").change(projections, "projections");
  memory.read(weight, "weight").read(bank).read(slots, "slots");
  CapParams p = params_for(hidden, writable_rows_of(hidden, "hidden"), bank.axes, bank.spans[0], slots);
  use_residual(p, hidden, residual);
  check_dtype(weight, "weight", hidden.scalar_type());
  TORCH_CHECK_VALUE(weight.dim() == 1 && weight.size(0) == p.hidden_size && weight.is_contiguous(),
                    "weight must have shape (H,) = (", p.hidden_size, ",), contiguous, got ", weight.sizes());
  check_device(weight, "weight", hidden);
  TORCH_CHECK_VALUE(eps >= 0 && std::isfinite(eps), "eps must be finite and not negative, got ", eps);
  TORCH_CHECK_VALUE(std::isfinite(weight_bias), "weight_bias must be finite, got ", weight_bias);
  use_bank(p, bank);
  p.projections = check_projections(projections, hidden, {p.rows, p.directions});
  memory.check();
  p.weight = weight.const_data_ptr();
  p.normed = hidden.mutable_data_ptr();
  p.normed_stride = p.hidden_stride;
  p.eps = float(eps);
  p.weight_bias = float(weight_bias);
  launch(&p, 1, hidden.device());
  mark_changed(hidden);
  mark_changed(residual);
}

void add_rms_norm_cap__buffers(const at::Tensor& hidden, const at::Tensor& residual, const at::Tensor& weight,
                               double eps, const at::Tensor& axes, const at::Tensor& floors, const at::Tensor& slots,
                               const at::Tensor& projections, double weight_bias, const OptionalTensor& lifts,
                               const OptionalTensor& limits) {
  add_rms_norm_cap_(hidden, residual, weight, eps, axes, floors, first_rows(slots, "slots", hidden), weight_bias, lifts,
                    limits, first_rows(projections, "projections", hidden));
}

void cap_layers_(at::TensorList hiddens, const at::Tensor& axes, const at::Tensor& floors, const OptionalTensor& slots,
                 const OptionalTensor& lifts, const OptionalTensor& limits, const OptionalTensor& projections) {
  const Bank bank(axes, floors, lifts, limits, true);
  const int64_t count = hiddens.size();
  TORCH_CHECK_VALUE(count == axes.size(0), "axes must have one entry for each of the ", count, " hiddens, got ",
                    axes.size(0));
  const at::Tensor& first = hiddens[0];
  const Memory shared = Memory().change(projections, "projections").read(bank).read(slots, "slots");
  std::vector<CapParams> layers(count);
  for (int64_t layer = 0; layer < count; ++layer) {
    const at::Tensor& hidden = hiddens[layer];
    const Memory memory = Memory(shared).change(hidden, "hiddens");
    TORCH_CHECK_VALUE(hidden.sizes() == first.sizes(), "hiddens must have one shape, got ", first.sizes(), " and ",
                      hidden.sizes());
    check_dtype(hidden, "hiddens", first.scalar_type());
    check_device(hidden, "hiddens", first);
    CapParams& p = layers[layer];
    if (layer == 0) {
      p = params_for(hidden, writable_rows_of(hidden, "hiddens"), axes, bank.spans[0], slots);
      use_bank(p, bank);
      p.projections = check_projections(projections, first, {count, p.rows, p.directions});
    } else {
      p = layers[layer - 1];
      p.hidden = hidden.const_data_ptr();
      p.hidden_stride = writable_rows_of(hidden, "hiddens").stride;
      const int64_t directions = p.num_slots * p.directions;
      p.axes += directions * p.hidden_size;
      p.floors += directions;
      if (p.lifts) p.lifts += directions * p.hidden_size;
      if (p.limits) p.limits += directions;
      if (p.projections) p.projections += p.rows * p.directions;
    }
    memory.check();
    p.out = hidden.mutable_data_ptr();
    p.out_stride = p.hidden_stride;
  }
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return layers[a].hidden < layers[b].hidden; });
  for (int64_t i = 1; i < count; ++i)
    Memory().change(hiddens[order[i]], "hiddens").read(hiddens[order[i - 1]], "another of them").check();
  launch(layers.data(), count, first.device());
  for (const at::Tensor& hidden : hiddens) mark_changed(hidden);
}

void accumulate_(const at::Tensor& stats, const at::Tensor& projections, const at::Tensor& floors,
                 const OptionalTensor& slots) {
  Memory memory;
  memory.change(stats, "stats").read(projections, "projections").read(floors, "floors").read(slots, "slots");
  check_dtype(stats, "stats", at::kDouble);
  check_dtype(projections, "projections", at::kFloat);
  check_dtype(floors, "floors", at::kFloat);
  const bool many = floors.dim() == 3;
  TORCH_CHECK_VALUE((many || floors.dim() == 2) && floors.numel() > 0 && floors.is_contiguous(),
                    "floors must have shape (S, K) or (L, S, K), none of them 0, contiguous, got ", floors.sizes());
  std::vector<int64_t> wanted = floors.sizes().vec();
  wanted.push_back(kStatFields);
  TORCH_CHECK_VALUE(stats.sizes() == at::IntArrayRef(wanted) && stats.is_contiguous(), "stats must have shape ",
                    at::IntArrayRef(wanted), ", contiguous, got ", stats.sizes());
  TORCH_CHECK_VALUE(projections.dim() == floors.dim() && projections.size(-1) == floors.size(-1) &&
                        (!many || projections.size(0) == floors.size(0)) &&
                        (many ? projections.select(0, 0) : projections).is_contiguous(),
                    "projections must have shape (", many ? "L, " : "", "rows, K) with the sizes of floors, ",
                    floors.sizes(), ", rows contiguous, got ", projections.sizes(), " with strides ",
                    projections.strides());
  check_device(floors, "floors", projections);
  check_device(stats, "stats", projections);
  memory.check();
  StatsParams p;
  p.rows = projections.size(-2);
  p.num_slots = floors.size(-2);
  p.directions = floors.size(-1);
  p.layers = many ? floors.size(0) : 1;
  p.layer_stride = projections.stride(0);
  p.projections = projections.const_data_ptr<float>();
  p.floors = floors.const_data_ptr<float>();
  p.slots = check_slots(slots, projections, p.rows, p.num_slots);
  p.stats = stats.mutable_data_ptr<double>();
  const at::Device device = projections.device();
  if (device.is_cpu()) {
    cpu::accumulate(p);
  } else {
    const c10::DeviceGuard guard(device);
    const char* error = accelerator_for(device).accumulate(p, stream_of(device));
    TORCH_CHECK(!error, "axiscap: the launch on ", device, " failed: ", error);
  }
  mark_changed(stats);
}

}  // namespace axiscap
