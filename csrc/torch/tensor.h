// A tensor as torch's stable C interface tells of it, and the errors that speak of one. Nothing in csrc/torch knows
// torch's own C++: one binary runs beside every torch from the version that CMakeLists.txt names.
#pragma once

#include <pybind11/pybind11.h>

// torch's stable interface alone, as its version 2.10 has it: the module runs with that torch and every later one. Not
// defined for the whole compilation, because the pybind11 that comes with torch 2.10 cannot be included after it.
#define TORCH_TARGET_VERSION 0x020a000000000000
#define TORCH_STABLE_ONLY
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <ostream>
#include <sstream>
#include <string>

namespace axiscap {

// What Python sees as its own exceptions, through either door: torch's bindings translate those of pybind11.
#define AXISCAP_CHECK(error, condition, ...) \
  if (!(condition)) [[unlikely]]             \
  throw error(::axiscap::words(__VA_ARGS__))
#define CHECK_VALUE(condition, ...) AXISCAP_CHECK(pybind11::value_error, condition, __VA_ARGS__)
#define CHECK_TYPE(condition, ...) AXISCAP_CHECK(pybind11::type_error, condition, __VA_ARGS__)
#define CHECK_INDEX(condition, ...) AXISCAP_CHECK(pybind11::index_error, condition, __VA_ARGS__)
#define CHECK_RUN(condition, ...) AXISCAP_CHECK(std::runtime_error, condition, __VA_ARGS__)

template <class... Parts>
std::string words(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Sizes or strides: borrowed.
struct Sizes {
  const int64_t* data = nullptr;
  int64_t count = 0;

  int64_t operator[](int64_t i) const { return data[i]; }
  const int64_t* begin() const { return data; }
  const int64_t* end() const { return data + count; }
  int64_t back() const { return data[count - 1]; }
  Sizes first(int64_t n) const { return {data, n}; }
  bool operator==(const Sizes& other) const;
};

std::ostream& operator<<(std::ostream& out, const Sizes& sizes);  // [2, 3]

struct Device {
  int32_t type = 0;
  int32_t index = 0;

  bool is_cpu() const;
  bool is_cuda() const;
  bool operator==(const Device& other) const { return type == other.type && (is_cpu() || index == other.index); }
};

std::ostream& operator<<(std::ostream& out, const Device& device);  // cuda:0

// torch's number for a dtype.
struct ScalarType {
  int32_t number = 0;

  bool operator==(const ScalarType&) const = default;
};

std::ostream& operator<<(std::ostream& out, ScalarType type);  // Float

extern const ScalarType kFloat, kBFloat16, kHalf, kFloat8, kDouble, kInt, kBool;

// From a tensor's first byte to the one behind its last.
struct Span {
  const char* begin;
  const char* end;

  bool meets(const Span& other) const { return begin < other.end && other.begin < end; }
};

// Borrowed from a tensor, for as long as it lives and keeps its sizes.
struct TensorView {
  AtenTensorHandle handle = nullptr;
  Sizes sizes, strides;
  ScalarType dtype;
  Device device;
  int64_t numel = 0;
  int64_t item_bytes = 0;
  int64_t offset = 0;  // of the first element in the storage, in elements
  int64_t storage_bytes = 0;
  char* data = nullptr;  // of the first element

  TensorView() = default;
  // Raises std::runtime_error where a tensor has no data, as those of torch.func; a view without is for checks of
  // sizes.
  explicit TensorView(AtenTensorHandle handle, bool with_data = true);

  int64_t dim() const { return sizes.count; }
  int64_t size(int64_t d) const { return sizes[d < 0 ? d + sizes.count : d]; }
  int64_t stride(int64_t d) const { return strides[d < 0 ? d + strides.count : d]; }
  bool is_contiguous(int64_t first_dim = 0) const;
  // Raises where the storage has less memory than the sizes need, since it was resized, or freed by a parameter's
  // owner.
  Span span(const char* name) const;

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
};

// Where a tensor's version lies, by which autograd notices that a saved one is not what it was: the place of the
// pointer to its counter in the tensor, and that of the number in the counter. torch's stable interface has no function
// for it; module.cpp finds the two on import. 0: not found.
struct VersionPlace {
  ptrdiff_t counter = 0, number = 0;
};
extern VersionPlace version_place;

// Counts a change of a tensor's elements. False where torch must be asked to: its version was not found, or it has
// none, as those of inference mode.
bool count_change(AtenTensorHandle tensor);

// Raises, in the words of both doors, where a tensor that is changed needs a gradient.
inline void check_needs_no_gradient(bool needs, const char* name) {
  CHECK_VALUE(!needs, name, " requires grad and is changed in place; use axiscap.ops.cap, which is differentiable");
}

}  // namespace axiscap
