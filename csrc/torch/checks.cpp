#include "torch/checks.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "launchers/accelerator.h"

namespace axiscap {
namespace {

void check_axes(const Tensor& axes, int64_t dim) {
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

// Checks a tensor of a bank against the axes: it has their shape without the last missing_dims dimensions.
void check_bank_tensor(const Tensor& tensor, const char* name, const Tensor& axes, int64_t missing_dims) {
  constexpr const char* kMissing[] = {"", " less H", " less K and H"};
  check_dtype(tensor, name, kFloat);
  const Sizes expected = axes.sizes.first(axes.dim() - missing_dims);
  CHECK_VALUE(tensor.sizes == expected, name, " must have the shape of axes", kMissing[missing_dims], ", ", expected,
              ", got ", tensor.sizes);
  CHECK_VALUE(tensor.is_contiguous(), name, " must be contiguous, got strides ", tensor.strides);
  CHECK_VALUE(tensor.device == axes.device, name, " must be on the device of axes, ", axes.device, ", got ",
              tensor.device);
}

// Whether the rows of a and b alternate in one buffer with one stride: then they share no memory.
bool is_interleaved(const Tensor& a, const Tensor& b) {
  if (a.dim() < 2 || b.dim() < 2 || a.item_bytes != b.item_bytes) return false;
  const int64_t bytes = a.item_bytes, stride = a.stride(-2) * bytes;
  if (stride <= 0 || b.stride(-2) * bytes != stride) return false;
  const int64_t offset = ((b.data - a.data) % stride + stride) % stride;
  return offset >= a.size(-1) * bytes && offset + b.size(-1) * bytes <= stride;
}

}  // namespace

bool is_row_dtype(const Tensor& tensor) {
  return tensor.dtype == kFloat || tensor.dtype == kBFloat16 || tensor.dtype == kHalf;
}

DType dtype_of(const Tensor& tensor, const char* name) {
  CHECK_TYPE(is_row_dtype(tensor), name, " must be float32, bfloat16 or float16, got ", tensor.dtype_name());
  return tensor.dtype == kFloat ? DType::kFloat32 : tensor.dtype == kHalf ? DType::kFloat16 : DType::kBFloat16;
}

Rows rows_of(const Tensor& tensor, const char* name) {
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

Rows writable_rows_of(const Tensor& tensor, const char* name) {
  const Rows rows = rows_of(tensor, name);
  CHECK_VALUE(rows.count <= 1 || rows.stride >= tensor.size(-1), name,
              " is changed in place, so its rows must not overlap; got a row stride of ", rows.stride,
              " for H = ", tensor.size(-1));
  return rows;
}

void check_bank(const Arguments& a, bool has_layers) {
  check_axes(*a.axes, has_layers ? 4 : 3);
  if (a.floors) check_bank_tensor(*a.floors, "floors", *a.axes, 1);
  if (a.targets) check_bank_tensor(*a.targets, "targets", *a.axes, 1);
  if (a.lifts) check_bank_tensor(*a.lifts, "lifts", *a.axes, 0);
  if (a.norm_limits) check_bank_tensor(*a.norm_limits, "norm_limits", *a.axes, 2);
}

void check_bank_values(const Arguments& a) {
  constexpr double kTolerance = 1e-3;
  const int64_t size = a.axes->sizes.back(), directions = a.floors->numel;
  std::vector<py::object> copies;  // on the CPU
  const auto copy_to_host = [&](Optional tensor) -> const float* {
    Tensor copy;
    if (!tensor || !copy.read(copies.emplace_back(py::handle(tensor->object).attr("cpu")()).ptr(), true))
      return nullptr;
    return copy.as<const float>();
  };
  const float *axes = copy_to_host(a.axes), *floors = copy_to_host(a.floors), *targets = copy_to_host(a.targets),
              *lifts = copy_to_host(a.lifts), *limits = copy_to_host(a.norm_limits);
  const auto dot = [size](const float* a, const float* b, int64_t k) {
    double sum = 0;
    for (int64_t i = k * size; i < (k + 1) * size; ++i) sum += double(a[i]) * b[i];
    return sum;
  };
  // Each comparison is false for NaN, so the checks reject it.
  for (int64_t k = 0; k < directions; ++k) {
    const double norm = std::sqrt(dot(axes, axes, k));
    CHECK_VALUE(std::abs(norm - 1) <= kTolerance, "axes must be finite and of unit length (", kTolerance,
                "), got a norm of ", norm);
    CHECK_VALUE(floors[k] < std::numeric_limits<float>::infinity(),
                "floors must be finite, or -inf for a direction that is off, got ", floors[k]);
    if (targets)
      CHECK_VALUE(targets[k] >= floors[k] && targets[k] < std::numeric_limits<float>::infinity(),
                  "targets must be finite and at least the floors, got ", targets[k], " for a floor of ", floors[k]);
    if (lifts) {
      const double strength = dot(axes, lifts, k);
      CHECK_VALUE(strength > 0 && strength <= 1 + kTolerance,
                  "lifts must be finite, above 0 and at most 1 along their axes (", kTolerance, "), got ", strength);
    }
  }
  for (int64_t i = 0; limits && i < a.norm_limits->numel; ++i)
    CHECK_VALUE(limits[i] > 0, "norm_limits must be positive, or inf for none, got ", limits[i]);
}

void check_no_overlap(std::span<const NamedTensor> tensors) {
  for (const NamedTensor& a : tensors) {
    if (!a.is_changed) continue;
    const Span span = a.tensor->span();
    for (const NamedTensor& b : tensors) {
      if (&a == &b || !span.overlaps(b.tensor->span()) || is_interleaved(*a.tensor, *b.tensor)) continue;
      // If both are changed and b is residual, the message begins with residual.
      const bool is_residual_first = b.is_changed && std::string_view(b.name) == "residual";
      const char* first = is_residual_first ? b.name : a.name;
      const char* second = a.name == b.name ? "another of them" : is_residual_first ? a.name : b.name;
      throw py::value_error(format_message(first, " is changed, and shares memory with ", second));
    }
  }
}

void check_dtype(const Tensor& tensor, const char* name, ScalarType expected) {
  CHECK_TYPE(tensor.dtype == expected, name, " must be ", expected, ", got ", tensor.dtype_name());
}

void check_device(const Tensor& tensor, const char* name, const Tensor& hidden) {
  CHECK_VALUE(tensor.device == hidden.device, name, " must be on the device of hidden, ", hidden.device, ", got ",
              tensor.device);
}

const int32_t* check_slots(Optional slots, const Tensor& rows_tensor, int64_t rows, int64_t num_slots, Extent extent) {
  if (!slots) return nullptr;
  check_dtype(*slots, "slots", kInt);
  if (extent == Extent::kAtLeast)
    CHECK_VALUE(slots->dim() >= 1 && slots->size(0) >= rows, "slots must have room for the ", rows, " rows, got shape ",
                slots->sizes);
  CHECK_VALUE(slots->dim() == 1 && (slots->size(0) == rows || extent == Extent::kAtLeast),
              "slots must have shape (rows,) = (", rows, ",), got ", slots->sizes);
  CHECK_VALUE(slots->is_contiguous(), "slots must be contiguous, got strides ", slots->strides);
  check_device(*slots, "slots", rows_tensor);
  const int32_t* data = slots->as<const int32_t>();
  // To read the slots of an accelerator would wait for the device. Its kernels leave a row with a wrong slot alone and
  // report NaN.
  if (slots->device.is_cpu())
    for (int64_t row = 0; row < rows; ++row)
      CHECK_INDEX(data[row] >= kNoSlot && data[row] < num_slots, "slots[", row, "] must be in [0, ", num_slots,
                  ") or -1, got ", data[row]);
  return data;
}

float* check_projections(Optional projections, const Tensor& hidden, std::initializer_list<int64_t> expected,
                         Extent extent) {
  if (!projections) return nullptr;
  const Sizes shape{expected.begin(), int64_t(expected.size())};
  const int64_t rows = shape[0];
  check_dtype(*projections, "projections", kFloat);
  const Sizes sizes = projections->sizes;
  bool is_match = sizes == shape;
  if (extent == Extent::kAtLeast) {
    CHECK_VALUE(sizes.count >= 1 && sizes[0] >= rows, "projections must have room for the ", rows, " rows, got shape ",
                sizes);
    is_match = sizes.count == shape.count && std::equal(sizes.begin() + 1, sizes.end(), shape.begin() + 1);
  }
  CHECK_VALUE(is_match, "projections must have shape ", shape, ", got ", sizes);
  CHECK_VALUE(projections->is_contiguous(), "projections must be contiguous, got strides ", projections->strides);
  check_device(*projections, "projections", hidden);
  return projections->as<float>();
}

CapParams params_for(const Tensor& hidden, Rows rows, const Tensor& axes, Optional slots, Extent extent) {
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
  p.axes = axes.as<const float>();
  p.num_slots = sizes[dim - 3];
  p.directions = sizes[dim - 2];
  p.slots = check_slots(slots, hidden, p.rows, p.num_slots, extent);
  return p;
}

void use_bank(CapParams& p, const Arguments& a) {
  p.floors = a.floors->as<const float>();
  p.targets = a.targets ? a.targets->as<const float>() : nullptr;
  p.lifts = a.lifts ? a.lifts->as<const float>() : nullptr;
  p.norm_limits = a.norm_limits ? a.norm_limits->as<const float>() : nullptr;
}

void write_in_place(CapParams& p) {
  p.out = const_cast<void*>(p.hidden);
  p.out_stride = p.hidden_stride;
}

void use_residual(CapParams& p, const Tensor& hidden, const Tensor& residual) {
  CHECK_VALUE(residual.sizes == hidden.sizes, "residual must have the shape of hidden, ", hidden.sizes, ", got ",
              residual.sizes);
  check_dtype(residual, "residual", hidden.dtype);
  check_device(residual, "residual", hidden);
  p.residual = residual.data;
  p.residual_stride = writable_rows_of(residual, "residual").stride;
  p.out = residual.data;
  p.out_stride = p.residual_stride;
}

void use_norm(CapParams& p, const Tensor& hidden, const Tensor& weight, double eps, double weight_bias) {
  check_dtype(weight, "weight", hidden.dtype);
  CHECK_VALUE(weight.dim() == 1 && weight.size(0) == p.hidden_size && weight.is_contiguous(),
              "weight must have shape (H,) = (", p.hidden_size, ",), contiguous, got ", weight.sizes);
  check_device(weight, "weight", hidden);
  CHECK_VALUE(eps >= 0 && std::isfinite(eps), "eps must be finite and not negative, got ", eps);
  CHECK_VALUE(std::isfinite(weight_bias), "weight_bias must be finite, got ", weight_bias);
  p.weight = weight.data;
  p.normed = hidden.data;
  p.normed_stride = p.hidden_stride;
  p.eps = float(eps);
  p.weight_bias = float(weight_bias);
}

}  // namespace axiscap
