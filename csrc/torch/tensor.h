// Tensors as torch exports them to C (DLPack's exchange interface), and the errors that name them.
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
  throw error(::axiscap::words(__VA_ARGS__))
#define CHECK_VALUE(condition, ...) AXISCAP_CHECK(py::value_error, condition, __VA_ARGS__)
#define CHECK_TYPE(condition, ...) AXISCAP_CHECK(py::type_error, condition, __VA_ARGS__)
#define CHECK_INDEX(condition, ...) AXISCAP_CHECK(py::index_error, condition, __VA_ARGS__)
#define CHECK_RUN(condition, ...) AXISCAP_CHECK(std::runtime_error, condition, __VA_ARGS__)

template <class... Parts>
std::string words(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Sizes or strides: borrowed.
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
std::ostream& operator<<(std::ostream& out, ScalarType type);  // Float: the dtypes that an op takes

inline constexpr ScalarType kFloat{kDLFloat, 32}, kBFloat16{kDLBfloat, 16}, kHalf{kDLFloat, 16},
    kFloat8{kDLFloat8_e4m3fn, 8}, kDouble{kDLFloat, 64}, kInt{kDLInt, 32};

// From a tensor's first byte to the one behind its last.
struct Span {
  const char* begin;
  const char* end;

  bool overlaps(const Span& other) const { return begin < other.end && other.begin < end; }
};

// A tensor that Python passes. The object and its sizes are borrowed for the length of a call. Nothing is initialised
// before `read`: a call has room for many of them.
struct Tensor {
  PyObject* object;
  Sizes sizes, strides;
  ScalarType dtype;
  Device device;
  int64_t numel;
  int64_t item_bytes;
  char* data;  // of the first element

  // Reads a dense tensor that has its elements in memory. Returns false, without an error, for every other one: sparse,
  // fake, meta, freed, of a transform of torch.func. `any_class` admits subclasses of torch.Tensor, which the
  // dispatcher has seen before; without it they are refused, since their own code must run first.
  bool read(PyObject* given, bool any_class);

  int64_t dim() const { return sizes.count; }
  int64_t size(int64_t d) const { return sizes[d < 0 ? d + sizes.count : d]; }
  int64_t stride(int64_t d) const { return strides[d < 0 ? d + strides.count : d]; }
  bool is_contiguous(int64_t first_dim = 0) const;
  Span span() const;
  // A view whose sign torch has not applied yet: the exported memory holds the negative of each element.
  bool is_negated() const;
  bool requires_grad() const;
  std::string dtype_name() const;  // Float

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
};

using Optional = const Tensor*;  // null: not given

// Looks up what this module needs of torch. Once, on import.
void import_torch();
// Raises TypeError if the object is no torch.Tensor.
void check_is_tensor(PyObject* object, const char* name);
// The stream that torch would launch on.
void* current_stream(Device device);

// Counts a change of the tensors' elements, so that autograd refuses to use what it saved of them.
void increment_versions(const py::tuple& tensors);

// Whether a level of forward-mode differentiation is entered, in which a tensor, or one that torch.func wraps around
// it, may have a tangent.
bool in_dual_level();
bool is_grad_enabled();

// Runs `body` over parts of [begin, end) with the threads that torch has for its own ops.
void parallel_for(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

}  // namespace axiscap
