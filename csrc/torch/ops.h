// The ops on tensors: every check, then one launch. Both doors (pybind11 and torch.library) call these and add nothing.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace axiscap {

using OptionalTensor = std::optional<at::Tensor>;

// From a tensor's first byte to the one behind its last.
struct Span {
  const char* begin;
  const char* end;

  bool meets(const Span& other) const { return begin < other.end && other.begin < end; }
};

// Axes (S, K, H) and floors (S, K), with lifts like the axes and limits like the floors where they are given: the
// caller's tensors, whose sizes, dtypes and layout have been checked.
struct Bank {
  const at::Tensor& axes;
  const at::Tensor& floors;
  const OptionalTensor& lifts;
  const OptionalTensor& limits;
  std::array<Span, 4> spans{};  // of the four, in their order

  // Of one layer, or of several, each with an entry of dimension 0.
  Bank(const at::Tensor& axes, const at::Tensor& floors, const OptionalTensor& lifts, const OptionalTensor& limits,
       bool many_layers = false);

  // Whether the memory is where it was, and as large: whoever keeps a bank asks before each use.
  bool is_as_it_was() const;
};

// Raises unless every axis is finite and of unit length, every floor finite or -inf, every lift finite and above 0
// and at most 1 along its axis, and every limit positive. Reads the values: for set-up, not for calls.
void check_values(const Bank& bank);

void cap_bank_(const at::Tensor& hidden, const Bank& bank, const OptionalTensor& slots,
               const OptionalTensor& projections);

// The ops, as their schemas in library.cpp have them.

void cap_(const at::Tensor& hidden, const at::Tensor& axes, const at::Tensor& floors, const OptionalTensor& slots,
          const OptionalTensor& lifts, const OptionalTensor& limits, const OptionalTensor& projections);

// (out, projections (rows, K), fired (rows, K) bool)
std::tuple<at::Tensor, at::Tensor, at::Tensor> cap(const at::Tensor& hidden, const at::Tensor& axes,
                                                   const at::Tensor& floors, const OptionalTensor& slots,
                                                   const OptionalTensor& lifts, const OptionalTensor& limits);

at::Tensor project(const at::Tensor& hidden, const at::Tensor& axes, const OptionalTensor& slots);

void cap_residual_(const at::Tensor& hidden, const at::Tensor& residual, const at::Tensor& axes,
                   const at::Tensor& floors, const OptionalTensor& slots, const OptionalTensor& lifts,
                   const OptionalTensor& limits, const OptionalTensor& projections);

void cap__buffers(const at::Tensor& hidden, const at::Tensor& axes, const at::Tensor& floors, const at::Tensor& slots,
                  const at::Tensor& projections, const OptionalTensor& lifts, const OptionalTensor& limits);

void cap_residual__buffers(const at::Tensor& hidden, const at::Tensor& residual, const at::Tensor& axes,
                           const at::Tensor& floors, const at::Tensor& slots, const at::Tensor& projections,
                           const OptionalTensor& lifts, const OptionalTensor& limits);

void add_rms_norm_cap_(const at::Tensor& hidden, const at::Tensor& residual, const at::Tensor& weight, double eps,
                       const at::Tensor& axes, const at::Tensor& floors, const OptionalTensor& slots,
                       double weight_bias, const OptionalTensor& lifts, const OptionalTensor& limits,
                       const OptionalTensor& projections);

void add_rms_norm_cap__buffers(const at::Tensor& hidden, const at::Tensor& residual, const at::Tensor& weight,
                               double eps, const at::Tensor& axes, const at::Tensor& floors, const at::Tensor& slots,
                               const at::Tensor& projections, double weight_bias, const OptionalTensor& lifts,
                               const OptionalTensor& limits);

// The axes, floors, lifts and limits are of as many layers.
void cap_layers_(at::TensorList hiddens, const at::Tensor& axes, const at::Tensor& floors, const OptionalTensor& slots,
                 const OptionalTensor& lifts, const OptionalTensor& limits, const OptionalTensor& projections);

void accumulate_(const at::Tensor& stats, const at::Tensor& projections, const at::Tensor& floors,
                 const OptionalTensor& slots);

}  // namespace axiscap
