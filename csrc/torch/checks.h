// What is checked of an op's arguments before a byte changes, and the plain pointers that remain of them.
#pragma once

#include <initializer_list>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/params.h"
#include "torch/tensor.h"

namespace axiscap {

// Whether a buffer has the rows of the call, or room for them at its beginning.
enum class Extent { kExact, kAtLeast };

// A tensor of a call under the name of its argument.
struct Part {
  Optional tensor;
  const char* name;
  bool is_changed;
};

// A call's arguments, by the names that the schemas give them. Null or empty: not given.
struct Arguments {
  Optional quantized = nullptr, hidden = nullptr, residual = nullptr, weight = nullptr, axes = nullptr,
           floors = nullptr, slots = nullptr, scale = nullptr, scales = nullptr, lifts = nullptr, targets = nullptr,
           norm_limits = nullptr, projections = nullptr, stats = nullptr;
  std::vector<Tensor> hiddens;
  double eps = 0, weight_bias = 0;
  Extent extent = Extent::kExact;  // of slots and projections

  static constexpr int kMaxTensors = 15;
  Part parts[kMaxTensors];  // every tensor that is given, but for the hiddens
  int parts_count = 0;
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

// The leading dimensions of (..., H) as one dimension of rows with one stride.
Rows rows_of(const Tensor& tensor, const char* name);
// The same of a tensor that is changed: its rows do not overlap.
Rows writable_rows_of(const Tensor& tensor, const char* name);

// Checks the tensors that every cap has: axes (S, K, H), lifts like them, floors (S, K), targets like them, norm_limits
// (S,);
// all of several layers with a leading L. `project` has axes alone.
void check_bank(const Arguments& a, bool has_layers = false);
// Checks their values, with a copy to the host: for set-up, not for calls. Axes are finite and of unit length, floors
// finite or -inf, targets at least the floors, lifts finite, above 0 and at most 1 along their axes, norm_limits
// positive.
void check_bank_values(const Arguments& a);

// Raises if a tensor that is changed shares memory with another one: a kernel reads a row again after it wrote another,
// and rows are worked on at the same time.
void check_apart(std::span<const Part> parts);

bool is_row_dtype(const Tensor& tensor);
DType dtype_of(const Tensor& tensor, const char* name);
void check_dtype(const Tensor& tensor, const char* name, ScalarType expected);
void check_device(const Tensor& tensor, const char* name, const Tensor& hidden);

const int32_t* check_slots(Optional slots, const Tensor& beside, int64_t rows, int64_t num_slots, Extent extent);
float* check_projections(Optional projections, const Tensor& hidden, std::initializer_list<int64_t> expected,
                         Extent extent);

// What every op needs: a stream of rows, and the axes that measure it.
CapParams params_for(const Tensor& hidden, Rows rows, const Tensor& axes, Optional slots, Extent extent);
void use_bank(CapParams& p, const Arguments& a);
void write_in_place(CapParams& p);
// The second stream, which the correction goes into.
void use_residual(CapParams& p, const Tensor& hidden, const Tensor& residual);
// The norm of the sum, which replaces hidden.
void use_norm(CapParams& p, const Tensor& hidden, const Tensor& weight, double eps, double weight_bias);

}  // namespace axiscap
