// The checks of an op's arguments, which come before any change, and their conversion to the kernels' parameters.
#pragma once

#include <initializer_list>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/params.h"
#include "torch/tensor.h"

namespace axiscap {

// Whether a buffer has exactly the rows of the call, or may have more.
enum class Extent { kExact, kAtLeast };

// A tensor of a call, and the name of its argument.
struct NamedTensor {
  Optional tensor;
  const char* name;
  bool is_changed;
};

// The arguments of a call, with the names of the schemas. Null or empty: the caller has left the argument out.
struct Arguments {
  Optional quantized = nullptr, hidden = nullptr, residual = nullptr, weight = nullptr, axes = nullptr,
           floors = nullptr, slots = nullptr, scale = nullptr, scales = nullptr, lifts = nullptr, targets = nullptr,
           norm_limits = nullptr, projections = nullptr, stats = nullptr;
  std::vector<Tensor> hiddens;
  double eps = 0, weight_bias = 0;
  Extent extent = Extent::kExact;  // of slots and projections

  static constexpr int kMaxTensors = 15;
  NamedTensor tensor_list[kMaxTensors];  // all tensors of the call except `hiddens`
  int tensor_count = 0;
  void add(const NamedTensor& tensor) { tensor_list[tensor_count++] = tensor; }
};

inline constexpr std::pair<std::string_view, Optional Arguments::*> kTensorArguments[] = {
    {"quantized", &Arguments::quantized},
    {"hidden", &Arguments::hidden},
    {"residual", &Arguments::residual},
    {"weight", &Arguments::weight},
    {"axes", &Arguments::axes},
    {"floors", &Arguments::floors},
    {"slots", &Arguments::slots},
    {"scale", &Arguments::scale},
    {"scales", &Arguments::scales},
    {"targets", &Arguments::targets},
    {"lifts", &Arguments::lifts},
    {"norm_limits", &Arguments::norm_limits},
    {"projections", &Arguments::projections},
    {"stats", &Arguments::stats}};
inline constexpr std::pair<std::string_view, double Arguments::*> kNumberArguments[] = {
    {"eps", &Arguments::eps}, {"weight_bias", &Arguments::weight_bias}};

struct Rows {
  int64_t count;
  int64_t stride;  // in elements
};

// Views the leading dimensions of a (..., H) tensor as one dimension of rows. Raises if the rows have no uniform
// stride.
Rows rows_of(const Tensor& tensor, const char* name);
// The same for a tensor that is changed. Raises also if the rows overlap.
Rows writable_rows_of(const Tensor& tensor, const char* name);

// Checks the shapes, dtypes and devices of a bank: axes and lifts (S, K, H), floors and targets (S, K), norm_limits
// (S,); with has_layers all have a leading dimension L. Only axes are required.
void check_bank(const Arguments& a, bool has_layers = false);
// Checks the values of a bank: axes are finite and of unit length, floors finite or -inf, targets at least the floors,
// lifts finite with 0 < <axis, lift> <= 1, norm_limits positive. It copies the bank to the host, so it is for set-up.
void check_bank_values(const Arguments& a);

// Raises if a tensor that is changed shares memory with another tensor. Kernels work on several rows at once and may
// read a row twice, so a write must not change another input.
void check_no_overlap(std::span<const NamedTensor> tensors);

bool is_row_dtype(const Tensor& tensor);
DType dtype_of(const Tensor& tensor, const char* name);
void check_dtype(const Tensor& tensor, const char* name, ScalarType expected);
void check_device(const Tensor& tensor, const char* name, const Tensor& hidden);

// `rows_tensor` is the tensor whose device slots must be on.
const int32_t* check_slots(Optional slots, const Tensor& rows_tensor, int64_t rows, int64_t num_slots, Extent extent);
float* check_projections(Optional projections, const Tensor& hidden, std::initializer_list<int64_t> expected,
                         Extent extent);

// Makes the parameters that every op has: the rows, the axes and the slots.
CapParams params_for(const Tensor& hidden, Rows rows, const Tensor& axes, Optional slots, Extent extent);
void use_bank(CapParams& p, const Arguments& a);
void write_in_place(CapParams& p);
// Sets the second stream, which the correction is added to.
void use_residual(CapParams& p, const Tensor& hidden, const Tensor& residual);
// Sets the norm of the sum, which replaces hidden.
void use_norm(CapParams& p, const Tensor& hidden, const Tensor& weight, double eps, double weight_bias);

}  // namespace axiscap
