// torch tensors, read through DLPack's exchange interface for C, and the errors that name them.
#pragma once

#include <ATen/dlpack.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <ostream>
#include <sstream>
#include <string>

namespace axiscap {

namespace py = pybind11;

#define AXISCAP_CHECK(error, condition, ...) \
  if (!(condition)) [[unlikely]]             \
  throw error(::axiscap::format_message(__VA_ARGS__))
#define CHECK_VALUE(condition, ...) AXISCAP_CHECK(py::value_error, condition, __VA_ARGS__)
#define CHECK_TYPE(condition, ...) AXISCAP_CHECK(py::type_error, condition, __VA_ARGS__)
#define CHECK_INDEX(condition, ...) AXISCAP_CHECK(py::index_error, condition, __VA_ARGS__)
#define CHECK_RUN(condition, ...) AXISCAP_CHECK(std::runtime_error, condition, __VA_ARGS__)

template <class... Parts>
std::string format_message(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Sizes or strides of a tensor, which owns them.
struct Sizes {
  const int64_t* data;
  int64_t count;

  int64_t operator[](int64_t i) const { return data[i]; }
  const int64_t* begin() const { return data; }
  const int64_t* end() const { return data + count; }
  int64_t back() const { return data[count - 1]; }
  Sizes first(int64_t n) const { return {data, n}; }
  bool operator==(const Sizes& other) const;
};
std::ostream& operator<<(std::ostream& out, const Sizes& sizes);  // [2, 3]

struct Device {
  DLDeviceType type;
  int32_t index;

  bool is_cpu() const { return type == kDLCPU; }
  bool is_cuda() const { return type == kDLCUDA; }
  bool operator==(const Device& other) const { return type == other.type && (is_cpu() || index == other.index); }
};
std::ostream& operator<<(std::ostream& out, const Device& device);  // cuda:0

struct ScalarType {
  uint8_t code;  // DLDataTypeCode
  uint8_t bits;

  bool operator==(const ScalarType&) const = default;
};
std::ostream& operator<<(std::ostream& out, ScalarType type);  // Float

inline constexpr ScalarType kFloat{kDLFloat, 32}, kBFloat16{kDLBfloat, 16}, kHalf{kDLFloat, 16},
    kFloat8{kDLFloat8_e4m3fn, 8}, kDouble{kDLFloat, 64}, kInt{kDLInt, 32};

// The memory of a tensor, from its first byte to the byte behind its last.
struct Span {
  const char* begin;
  const char* end;

  bool overlaps(const Span& other) const { return begin < other.end && other.begin < end; }
};

// A tensor argument. It borrows the object and its sizes for the length of a call. `read` initialises it; there is no
// constructor, because a call reserves more tensors than most calls have.
struct Tensor {
  PyObject* object;
  Sizes sizes, strides;
  ScalarType dtype;
  Device device;
  int64_t numel;
  int64_t item_bytes;
  char* data;  // of the first element

  // Reads a dense tensor with its elements in memory. Returns false, without an error, for all others: sparse, fake,
  // meta, freed, or inside of a transform of torch.func. A subclass of torch.Tensor has code of its own that must run
  // first: it is read only if allow_subclass says that the dispatcher has called that code.
  bool read(PyObject* tensor, bool allow_subclass);

  int64_t dim() const { return sizes.count; }
  int64_t size(int64_t d) const { return sizes[d < 0 ? d + sizes.count : d]; }
  int64_t stride(int64_t d) const { return strides[d < 0 ? d + strides.count : d]; }
  bool is_contiguous(int64_t first_dim = 0) const;
  Span span() const;
  // Whether torch has not applied the sign of a view yet: the memory has the negative of each element.
  bool is_negated() const;
  bool requires_grad() const;
  std::string dtype_name() const;  // Float

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
};

using Optional = const Tensor*;  // null: the caller has left the argument out

// Looks up the objects of torch that this module uses. Runs once, on import.
void import_torch();
// Raises TypeError if the object is no torch.Tensor.
void check_is_tensor(PyObject* object, const char* name);
// The current stream of torch on the device.
void* current_stream(Device device);

// Counts a change of the tensors' elements, so that autograd refuses to use older values that it has saved.
void increment_versions(const py::tuple& tensors);

// Whether the call is inside of forward-mode differentiation, where tensors may have tangents.
bool in_dual_level();
bool is_grad_enabled();

// Runs `body` on parts of [begin, end) in the threads of torch's own ops.
void parallel_for(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

}  // namespace axiscap
