// The cap on a GPU. cap_row at the end of the file has the steps: load a row, project it, correct it if a projection is
// below its floor, write it. Sums are in float32, in an order that depends on H and dtype alone. Without a norm only
// rows that fired are written.
#pragma once

#include "kernels/cuda/register_rows.cuh"
#include "kernels/cuda/shared_rows.cuh"

namespace axiscap::cuda {

// The state of the current row.
struct Outcome {
  bool admitted;       // the row has a slot, its norm is within the limit, and its numbers are finite
  bool below = false;  // a projection of the incoming row is below its floor
  bool fired = false;  // a direction corrected the row
  bool large = false;  // a correction may have made an element overflow
};

// Records a projection of the incoming row.
template <class Rows>
__device__ inline void observe(const Rows& rows, int k, float projection, Outcome& outcome) {
  outcome.admitted = outcome.admitted && isfinite(projection);
  outcome.below = outcome.below || (rows.is_active() && projection < rows.direction.floor);
  rows.report(rows.layer.projections, k, projection);
  rows.report(rows.p.fired, k, uint8_t(0));
}

// Compares the norm of the incoming row with the limit of its slot.
template <class Rows>
__device__ inline void check_norm(Rows& rows, Outcome& outcome) {
  if (!rows.layer.norm_limits) return;
  const float limit = rows.direction.norm_limit;
  if (rows.group.sum(rows.squares()) > limit * limit) outcome.admitted = false;
}

// Whether a correction of this size may make an element of a finite row overflow T.
template <class T>
__device__ inline bool may_overflow(float correction) {
  return std::is_same_v<T, __half> || correction > kLargeCorrection;
}

// Corrects a row below the floor of direction k to the target. `projection` is the projection of the row that the
// earlier directions have corrected.
template <class Rows>
__device__ inline void correct(Rows& rows, int k, float projection, Outcome& outcome) {
  if (!isfinite(projection)) outcome.admitted = false;
  if (!outcome.admitted || !(projection < rows.direction.floor)) return;
  const float correction = rows.direction.target - projection;
  rows.add(correction);
  outcome.large = outcome.large || may_overflow<typename Rows::Element>(correction);  // true if it is infinite
  outcome.fired = true;
  rows.report(rows.p.fired, k, uint8_t(1));
}

// Projects the row on every axis. If a projection is below its floor, a second pass projects and corrects the row
// direction by direction.
template <class Rows>
__device__ inline Outcome cap_directions(Rows& rows) {
  Outcome outcome{rows.is_active()};
  if constexpr (Rows::kOneDirection) {
    const float projection = rows.project(0);
    check_norm(rows, outcome);
    observe(rows, 0, projection, outcome);
    if (outcome.admitted && outcome.below) correct(rows, 0, projection, outcome);
  } else {
    // A loop, so that the code of the projection is compiled once for both passes.
    for (int pass = 0; pass < 2; ++pass) {
      for (int k = 0; k < rows.directions(); ++k) {
        const float projection = rows.project(k);
        if (pass == 0)
          observe(rows, k, projection, outcome);
        else
          correct(rows, k, projection, outcome);
      }
      if (pass == 0) check_norm(rows, outcome);
      // A projection needs all threads of the warp, also those whose rows do not fire.
      if (!__any_sync(kAllLanes, outcome.admitted && outcome.below)) break;
    }
  }
  if (outcome.fired) rows.finish_correction();
  return outcome;
}

// Whether this thread's part of the corrected row is finite in T.
template <class Rows>
__device__ inline bool is_in_range(const Rows& rows) {
  bool finite = true;
  rows.for_each_vec([&](int i) {
    const auto vec = rows.corrected(i);
#pragma unroll
    for (int e = 0; e < Rows::kVecSize; ++e) finite = finite && fabsf(vec[e]) <= FLT_MAX;
  });
  return finite;
}

// Rejects the correction if an element of the corrected row overflows T.
template <class Rows>
__device__ inline void check_range(Rows& rows, Outcome& outcome) {
  if (!__any_sync(kAllLanes, outcome.large)) return;
  const bool overflows = outcome.fired && !is_in_range(rows);
  if (rows.group.sum(overflows ? 1.f : 0.f) > 0) outcome.admitted = false;
}

// Undoes the correction and reports NaN projections.
template <class Rows>
__device__ inline void leave_alone(Rows& rows, Outcome& outcome) {
  for (int k = 0; k < rows.directions(); ++k) {
    rows.report(rows.layer.projections, k, NAN);
    rows.report(rows.p.fired, k, uint8_t(0));
  }
  if (Rows::kNorm && outcome.fired) rows.restore();
  outcome.fired = false;
}

// Writes the stream that the correction is added to: corrected if the row fired, else as it came.
template <class Rows>
__device__ inline void write_row(const Rows& rows, bool fired) {
  rows.for_each_vec([&](int i) {
    const auto vec = Rows::kTwoStreams || fired ? rows.corrected(i) : rows.base(i);
    vec.store(rows.out(), rows.offset(i), rows.size, rows.is_aligned());
  });
}

// Writes and stashes the row. Returns the sum of the squares of this thread's part.
template <class Rows>
__device__ inline float write_sum(Rows& rows, int size) {
  float squares = 0;
  rows.for_each_vec([&](int i) {
    const auto vec = rows.corrected(i);
    vec.store(rows.out(), rows.offset(i), size, rows.is_aligned());
    rows.stash(i, vec);
    squares = dot(vec.floats(), vec.floats(), squares);
  });
  return squares;
}

// Writes the norm of the stashed row. For fp8 it stashes the norm instead, and returns the largest |element| of this
// thread's part.
template <class Rows>
__device__ inline float write_norm(Rows& rows, int size, float factor, bool fp8) {
  using T = typename Rows::Element;
  using Packed = typename Rows::Packed;
  const T* weights = static_cast<const T*>(rows.p.weight);
  float largest = 0;
  rows.for_each_vec([&](int i) {
    const auto weight = Packed::template load<Memory::kCached>(weights, rows.offset(i), rows.size, rows.is_aligned());
    auto y = rows.stashed(i).floats();
#pragma unroll
    for (int e = 0; e < Rows::kVecSize; ++e) y[e] = y[e] * factor * (weight[e] + rows.p.weight_bias);
    const Packed normed = Packed::round(y);
    if (!fp8) return normed.store(rows.template normed<T>(), rows.offset(i), size, rows.is_aligned());
    rows.stash(i, normed);
#pragma unroll
    for (int e = 0; e < Rows::kVecSize; ++e) largest = fmaxf(largest, fabsf(normed[e]));
  });
  return largest;
}

// The scale of a row in fp8: the caller's scale for all rows, or a scale from the largest |element| of the row.
template <class Rows>
__device__ inline float fp8_scale(Rows& rows, float largest) {
  if (rows.p.scale) return __ldg(rows.p.scale);
  const float scale = fmaxf(rows.group.largest(largest) / kFp8Max, kFp8MinScale);
  if (rows.is_reporter()) rows.p.scales[rows.row] = scale;
  return scale;
}

// Writes the stashed norm in fp8.
template <class Rows>
__device__ inline void write_fp8(const Rows& rows, int size, float inverse_scale) {
  rows.for_each_vec([&](int i) {
    auto y = rows.stashed(i).floats();
#pragma unroll
    for (int e = 0; e < Rows::kVecSize; ++e) y[e] *= inverse_scale;
    const auto quantized = Vec<Fp8, Rows::kVecSize>::round(y);
    quantized.store(rows.template normed<Fp8>(), rows.offset(i), size, rows.is_aligned());
  });
}

// Writes the row, capped or not, and its norm.
template <class Rows>
__device__ inline void write_normed_row(Rows& rows, float inverse_size) {
  const CapParams& p = rows.p;
  const int size = rows.has_row() ? rows.size : 0;
  const bool fp8 = p.scale || p.scales;
  const float squares = rows.group.sum(write_sum(rows, size));
  const float largest = write_norm(rows, size, rsqrtf(fmaf(squares, inverse_size, p.eps)), fp8);
  if (fp8) write_fp8(rows, size, 1.f / fp8_scale(rows, largest));
}

template <class Rows>
__device__ inline void cap_row(Rows& rows, float inverse_size) {
  rows.load();
  Outcome outcome = cap_directions(rows);
  check_range(rows, outcome);
  if (!outcome.admitted) leave_alone(rows, outcome);
  if constexpr (Rows::kNorm)
    write_normed_row(rows, inverse_size);
  else if (outcome.fired || (rows.is_out_of_place && rows.has_row()))
    write_row(rows, outcome.fired);
  rows.next();
}

// The minimum of 1 block is a hint to ptxas: without it, it aims at fewer registers on sm_120 and spills in three
// kernels (tests/ptx/test_compiled.py).
#define AXISCAP_CAP_KERNEL __global__ void __launch_bounds__(kMaxThreads, 1)

// For aligned rows of up to kMaxThreads * kVecsPerThread vectors.
template <class T, Op kOp, bool kAnyDirections, int kLayers>
AXISCAP_CAP_KERNEL cap_register_rows(const __grid_constant__ Call<kLayers> call) {
  ptx::wait_for_previous_grid();
  RegisterRows<T, kOp, kAnyDirections> rows(call);
  while (rows.block_has_rows()) cap_row(rows, call.inverse_size);
}

// For all other rows: wide rows and rows that are not aligned.
template <class T, Op kOp, int kLayers>
AXISCAP_CAP_KERNEL cap_shared_rows(const __grid_constant__ Call<kLayers> call) {
  ptx::wait_for_previous_grid();
  SharedRows<T, kOp> rows(call);
  while (rows.block_has_rows()) cap_row(rows, call.inverse_size);
}

}  // namespace axiscap::cuda
