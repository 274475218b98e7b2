// The group of threads that work on one row, and the reductions over it.
#pragma once

#include "kernels/cuda/plan.h"

namespace axiscap::cuda {

inline constexpr uint32_t kAllLanes = 0xffffffffu;

// A group is a part of a warp, a warp, or all warps of the block.
struct Group {
  int threads, lane, index;

  __device__ explicit Group(int threads_per_row)
      : threads(threads_per_row), lane(threadIdx.x % threads_per_row), index(threadIdx.x / threads_per_row) {}

  // Returns the sum over the group to each of its threads, added in a fixed order. All threads of the block must call.
  __device__ float sum(float value) {
    return reduce(value, [](float a, float b) { return a + b; });
  }

  // Returns the largest value of the group, like sum. The values must not be negative.
  __device__ float largest(float value) {
    return reduce(value, [](float a, float b) { return fmaxf(a, b); });
  }

 private:
  static constexpr int kMaxWarps = kMaxThreads / kWarp;

  int phase_ = 0;

  // The partial results of a reduction, one for each warp. Two sets alternate: between a read of a set and the next
  // write to it lies the barrier of the other set's reduction.
  __device__ static float (&partials(int phase)) [kMaxWarps] {
    __shared__ float sets[2][kMaxWarps];
    return sets[phase];
  }

  template <class Join>
  __device__ static float reduce_lanes(float value, int lanes, Join join) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
      if (distance < lanes) value = join(value, __shfl_xor_sync(kAllLanes, value, distance));
    return value;
  }

  template <class Join>
  __device__ float reduce(float value, Join join) {
    if (threads < kWarp) {
      for (int distance = threads / 2; distance > 0; distance /= 2)
        value = join(value, __shfl_xor_sync(kAllLanes, value, distance));
      return value;
    }
    value = reduce_lanes(value, kWarp, join);
    if (threads == kWarp) return value;
    phase_ ^= 1;
    if (lane % kWarp == 0) partials(phase_)[lane / kWarp] = value;
    __syncthreads();
    value = lane % kMaxWarps < threads / kWarp ? partials(phase_)[lane % kMaxWarps] : 0.f;
    return reduce_lanes(value, kMaxWarps, join);
  }
};

}  // namespace axiscap::cuda
