// What is checked of an op's arguments before a byte changes, and the plain pointers that remain of them.
#pragma once

#include <initializer_list>
#include <span>
#include <vector>

#include "kernels/params.h"
#include "torch/tensor.h"

namespace axiscap {

struct Rows {
  int64_t count;
  int64_t stride;  // in elements
};

// The leading dimensions of (..., H) as one dimension of rows with one stride.
Rows rows_of(const Tensor& tensor, const char* name);
// The same of a tensor that is changed: its rows do not overlap.
Rows writable_rows_of(const Tensor& tensor, const char* name);

// Axes (S, K, H) and floors (S, K), with lifts like the axes and limits like the floors where they are given; all of
// several layers with a leading L.
struct Bank {
  Optional axes, floors, lifts, limits;

  void check(bool several_layers = false) const;
  // Reads the values: for set-up, not for calls. Raises unless every axis is finite and of unit length, every floor
  // finite or -inf, every lift finite, above 0 and at most 1 along its axis, and every limit positive.
  void check_values() const;
};

// A tensor of a call under the name of its argument.
struct Part {
  Optional tensor;
  const char* name;
  bool is_changed;
};

// Raises if a tensor that is changed shares memory with another one: a kernel reads a row again after it wrote another,
// and rows are worked on at the same time.
void check_apart(std::span<const Part> parts);

void check_dtype(const Tensor& tensor, const char* name, ScalarType wanted);
void check_device(const Tensor& tensor, const char* name, const Tensor& hidden);

// Whether a buffer has the rows of the call, or room for them at its beginning.
enum class Extent { kExact, kAtLeast };

const int32_t* check_slots(Optional slots, const Tensor& beside, int64_t rows, int64_t num_slots, Extent extent);
float* check_projections(Optional projections, const Tensor& hidden, std::initializer_list<int64_t> wanted,
                         Extent extent);

// What every op needs: a stream of rows, and the axes that measure it.
CapParams params_for(const Tensor& hidden, Rows rows, const Tensor& axes, Optional slots, Extent extent);
// What a cap needs beside them.
void use_bank(CapParams& p, const Bank& bank);
// The correction goes back to where the rows are.
void write_in_place(CapParams& p);
// The second stream, which the correction goes into.
void use_residual(CapParams& p, const Tensor& hidden, const Tensor& residual);
// The norm of the sum, which replaces hidden.
void use_norm(CapParams& p, const Tensor& hidden, const Tensor& weight, double eps, double weight_bias);

}  // namespace axiscap
