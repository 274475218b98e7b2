// The parameters of a launch, and Rows, the base of RegisterRows and SharedRows.
#pragma once

#include <cfloat>

#include "kernels/cuda/group.cuh"
#include "kernels/cuda/vec.cuh"
#include "kernels/params.h"

namespace axiscap::cuda {

enum class Op {
  kCap,          // x = hidden
  kCapResidual,  // x = hidden + residual; only the correction is added to residual
  kNorm,         // x = hidden + residual; residual becomes x, capped or not, and the norm of residual is written
};

// The most layers of one launch: their pointers fit the 4 KiB that kernel parameters may have. CUDA copies the
// parameters, so a launch allocates nothing and a CUDA graph can capture it. A kernel for one layer has parameters for
// one, because copying them is a large part of a small launch.
inline constexpr int kMaxLayers = 48;

// The parameters of one layer. All layers of a launch share the other parameters.
struct Layer {
  const void* hidden;
  void* out;
  int64_t hidden_stride;
  int64_t out_stride;
  const float* axes;
  const float* lifts;
  const float* floors;
  const float* targets;
  const float* norm_limits;
  float* projections;
};

template <int kLayers>
struct Call {
  CapParams shared;
  int32_t threads_per_row;
  float inverse_size;  // 1 / H
  bool aligned;        // every row, axis, lift and weight begins at a multiple of kVecBytes
  Layer layers[kLayers];
};

// One direction of a slot, and the norm limit of the slot.
struct Direction {
  const float* axis = nullptr;
  const float* lift = nullptr;
  float floor = -INFINITY;
  float target = -INFINITY;
  float norm_limit = INFINITY;
  int size = 0;  // elements of axis and lift; 0 until the first select

  __device__ void select(const Layer& layer, int32_t slot, int k, int directions, int hidden_size) {
    const int64_t entry = int64_t(slot) * directions + k;
    floor = layer.floors ? __ldg(layer.floors + entry) : -INFINITY;
    target = layer.targets ? __ldg(layer.targets + entry) : floor;
    norm_limit = layer.norm_limits ? __ldg(layer.norm_limits + slot) : INFINITY;
    axis = layer.axes + entry * hidden_size;
    lift = layer.lifts ? layer.lifts + entry * hidden_size : axis;
    size = hidden_size;
  }
};

// The rows that a group works on, one after the other. Each thread has the same vectors of every row.
template <class T, Op kOp>
struct Rows {
  static constexpr int kVecSize = kVecBytes / sizeof(T);
  static constexpr bool kTwoStreams = kOp != Op::kCap;
  static constexpr bool kNorm = kOp == Op::kNorm;
  using Element = T;
  using Packed = Vec<T, kVecSize>;
  using Floats = Vec<float, kVecSize>;

  const CapParams& p;
  const Layer& layer;
  Group group;
  const int size;
  const bool is_out_of_place;  // out is another buffer than hidden: every row is written
  Direction direction;
  int64_t row, step;  // the current row, and the distance to the group's next row

  template <int kLayers>
  __device__ Rows(const Call<kLayers>& call, const Layer& layer)
      : p(call.shared),
        layer(layer),
        group(call.threads_per_row),
        size(int(p.hidden_size)),
        is_out_of_place(kOp == Op::kCap && layer.out && layer.out != layer.hidden) {
    const int rows_per_block = blockDim.x / group.threads;
    row = int64_t(blockIdx.x) * rows_per_block + group.index;
    step = int64_t(gridDim.x) * rows_per_block;
  }

  // Whether the block has rows left. The threads of a block leave together.
  __device__ bool block_has_rows() const { return row - group.index < p.rows; }
  __device__ bool has_row() const { return row < p.rows; }
  __device__ bool is_reporter() const { return has_row() && group.lane == 0; }

  // Whether the kernel needs the row. A row without a slot is needed if every row is written.
  __device__ bool is_read(int64_t row, int32_t slot) const {
    return kNorm || is_out_of_place ? row < p.rows : slot != kNoSlot;
  }

  // The slot of a row; kNoSlot if the row's slot is not in the bank.
  __device__ int32_t slot_of(int64_t row) const {
    const int32_t slot = row >= p.rows ? kNoSlot : p.slots ? p.slots[row] : 0;
    return uint32_t(slot) < uint64_t(p.num_slots) ? slot : kNoSlot;
  }

  // The first element of vector i of this thread.
  __device__ int offset(int i) const { return (i * group.threads + group.lane) * kVecSize; }

  __device__ const T* hidden(int64_t row) const {
    return static_cast<const T*>(layer.hidden) + row * layer.hidden_stride;
  }
  __device__ const T* residual(int64_t row) const {
    return static_cast<const T*>(p.residual) + row * p.residual_stride;
  }
  template <class U>
  __device__ U* normed() const {
    return static_cast<U*>(p.normed) + row * p.normed_stride;
  }
  __device__ T* out() const { return static_cast<T*>(layer.out) + row * layer.out_stride; }

  // Writes entry k of the current row to `values`, (rows, directions) or null.
  template <class Value>
  __device__ void report(Value* values, int k, Value value) const {
    if (is_reporter() && values) values[row * p.directions + k] = value;
  }
};

// sum + <x, axis>
template <int N>
__device__ inline float dot(const Vec<float, N>& x, const Vec<float, N>& axis, float sum) {
#pragma unroll
  for (int e = 0; e < N; ++e) sum = fmaf(x[e], axis[e], sum);
  return sum;
}

// base + scale * lift
template <int N>
__device__ inline Vec<float, N> add_scaled(Vec<float, N> base, const Vec<float, N>& lift, float scale) {
#pragma unroll
  for (int e = 0; e < N; ++e) base[e] = fmaf(lift[e], scale, base[e]);
  return base;
}

// The residual that makes hidden + residual equal to x.
template <int N>
__device__ inline Vec<float, N> add_difference(const Vec<float, N>& residual, const Vec<float, N>& x,
                                               const Vec<float, N>& hidden) {
  Vec<float, N> sum;
#pragma unroll
  for (int e = 0; e < N; ++e) sum[e] = residual[e] + (x[e] - (hidden[e] + residual[e]));
  return sum;
}

template <int N>
__device__ inline Vec<float, N> operator+(Vec<float, N> a, const Vec<float, N>& b) {
#pragma unroll
  for (int e = 0; e < N; ++e) a[e] += b[e];
  return a;
}

}  // namespace axiscap::cuda
