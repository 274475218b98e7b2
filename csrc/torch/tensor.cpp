#include "tensor.h"

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>

namespace axiscap {
namespace {

const int32_t kCpu = aoti_torch_device_type_cpu(), kCuda = aoti_torch_device_type_cuda(),
              kMeta = aoti_torch_device_type_meta();

}  // namespace

const ScalarType kFloat{aoti_torch_dtype_float32()}, kBFloat16{aoti_torch_dtype_bfloat16()},
    kHalf{aoti_torch_dtype_float16()}, kFloat8{aoti_torch_dtype_float8_e4m3fn()}, kDouble{aoti_torch_dtype_float64()},
    kInt{aoti_torch_dtype_int32()}, kBool{aoti_torch_dtype_bool()};

bool Sizes::operator==(const Sizes& other) const {
  return count == other.count && std::equal(begin(), end(), other.begin());
}

std::ostream& operator<<(std::ostream& out, const Sizes& sizes) {
  out << '[';
  for (int64_t i = 0; i < sizes.count; ++i) out << (i ? ", " : "") << sizes[i];
  return out << ']';
}

bool Device::is_cpu() const { return type == kCpu; }
bool Device::is_cuda() const { return type == kCuda; }

std::ostream& operator<<(std::ostream& out, const Device& device) {
  if (device.is_cpu()) return out << "cpu";
  if (device.is_cuda()) return out << "cuda:" << device.index;
  if (device.type == kMeta) return out << "meta";
  return out << "device " << device.index << " of type " << device.type;
}

std::ostream& operator<<(std::ostream& out, ScalarType type) {
  return out << torch::headeronly::toString(static_cast<torch::headeronly::ScalarType>(type.number));
}

TensorView::TensorView(AtenTensorHandle handle, bool with_data) : handle(handle) {
  void* first = nullptr;
  if (with_data) TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle, &first));
  data = static_cast<char*>(first);
  int64_t dims = 0, *shape = nullptr, *steps = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dims));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &shape));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &steps));
  sizes = {shape, dims};
  strides = {steps, dims};
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype.number));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device.type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device.index));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(handle, &numel));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(handle, &offset));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(handle, &storage_bytes));
  item_bytes = int64_t(aoti_torch_dtype_element_size(dtype.number));
}

bool TensorView::is_contiguous(int64_t first_dim) const {
  if (numel == 0) return true;
  int64_t expected = 1;
  for (int64_t d = dim() - 1; d >= first_dim; --d) {
    if (sizes[d] == 1) continue;
    if (strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

Span TensorView::span(const char* name) const {
  if (numel == 0) return {};
  int64_t last = 0;
  for (int64_t d = 0; d < dim(); ++d) last += (sizes[d] - 1) * strides[d];
  CHECK_VALUE((offset + last + 1) * item_bytes <= storage_bytes, name, " has less memory than its shape ", sizes,
              " needs");
  return {data, data + (last + 1) * item_bytes};
}

VersionPlace version_place;

bool count_change(AtenTensorHandle tensor) {
  if (!version_place.counter) return false;
  const char* impl = *reinterpret_cast<const char* const*>(tensor);
  char* counter = *reinterpret_cast<char* const*>(impl + version_place.counter);
  if (!counter) return false;
  std::atomic_ref(*reinterpret_cast<uint32_t*>(counter + version_place.number)).fetch_add(1);
  return true;
}

}  // namespace axiscap
