// The ops on tensors: every check, then one launch. Both doors (pybind11 and torch.library) call these and add nothing.
#pragma once

#include <array>
#include <functional>
#include <tuple>

#include "tensor.h"

namespace axiscap {

using Optional = const TensorView*;                 // null: not given
using TensorList = const std::vector<TensorView>&;  // of one shape
using NewTensor = torch::stable::Tensor;

// Axes (S, K, H) and floors (S, K), with lifts like the axes and limits like the floors where they are given: the
// caller's tensors, whose sizes, dtypes and layout have been checked.
struct Bank {
  const TensorView& axes;
  const TensorView& floors;
  Optional lifts;
  Optional limits;
  std::array<Span, 4> spans{};  // of the four, in their order

  // Of one layer, or of several, each with an entry of dimension 0.
  Bank(const TensorView& axes, const TensorView& floors, Optional lifts, Optional limits, bool many_layers = false);

  // Whether the memory is where it was, and as large: whoever keeps a bank asks before each use.
  bool is_as_it_was() const;
};

// Raises unless every axis is finite and of unit length, every floor finite or -inf, every lift finite and above 0
// and at most 1 along its axis, and every limit positive. Reads the values: for set-up, not for calls.
void check_values(const Bank& bank);

// With the threads that torch has for its own ops.
void parallel_for(int64_t begin, int64_t end, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

void cap_bank_(const TensorView& hidden, const Bank& bank, Optional slots, Optional projections);

// The ops, as their schemas in library.cpp have them.

void cap_(const TensorView& hidden, const TensorView& axes, const TensorView& floors, Optional slots, Optional lifts,
          Optional limits, Optional projections);

// (out, projections (rows, K), fired (rows, K) bool)
std::tuple<NewTensor, NewTensor, NewTensor> cap(const TensorView& hidden, const TensorView& axes,
                                                const TensorView& floors, Optional slots, Optional lifts,
                                                Optional limits);

NewTensor project(const TensorView& hidden, const TensorView& axes, Optional slots);

void cap_residual_(const TensorView& hidden, const TensorView& residual, const TensorView& axes,
                   const TensorView& floors, Optional slots, Optional lifts, Optional limits, Optional projections);

void cap__buffers(const TensorView& hidden, const TensorView& axes, const TensorView& floors, const TensorView& slots,
                  const TensorView& projections, Optional lifts, Optional limits);

void cap_residual__buffers(const TensorView& hidden, const TensorView& residual, const TensorView& axes,
                           const TensorView& floors, const TensorView& slots, const TensorView& projections,
                           Optional lifts, Optional limits);

void add_rms_norm_cap_(const TensorView& hidden, const TensorView& residual, const TensorView& weight, double eps,
                       const TensorView& axes, const TensorView& floors, Optional slots, double weight_bias,
                       Optional lifts, Optional limits, Optional projections);

void add_rms_norm_cap__buffers(const TensorView& hidden, const TensorView& residual, const TensorView& weight,
                               double eps, const TensorView& axes, const TensorView& floors, const TensorView& slots,
                               const TensorView& projections, double weight_bias, Optional lifts, Optional limits);

// One of scale and scales is given.
void add_rms_norm_cap_fp8_(const TensorView& quantized, const TensorView& hidden, const TensorView& residual,
                           const TensorView& weight, double eps, const TensorView& axes, const TensorView& floors,
                           Optional slots, double weight_bias, Optional scale, Optional scales, Optional lifts,
                           Optional limits, Optional projections);

void add_rms_norm_cap_fp8__buffers(const TensorView& quantized, const TensorView& hidden, const TensorView& residual,
                                   const TensorView& weight, double eps, const TensorView& axes,
                                   const TensorView& floors, const TensorView& slots, const TensorView& projections,
                                   double weight_bias, Optional scale, Optional scales, Optional lifts,
                                   Optional limits);

// The axes, floors, lifts and limits are of as many layers.
void cap_layers_(TensorList hiddens, const TensorView& axes, const TensorView& floors, Optional slots, Optional lifts,
                 Optional limits, Optional projections);

void accumulate_(const TensorView& stats, const TensorView& projections, const TensorView& floors, Optional slots);

}  // namespace axiscap
