// The threads that share a row, and their sums.
#pragma once

#include "kernels/cuda/plan.h"

namespace axiscap::cuda {

inline constexpr uint32_t kAllLanes = 0xffffffffu;

// Part of a warp, a warp, or all warps of the block.
struct Group {
  int threads, lane, index;

  __device__ explicit Group(int threads_per_row)
      : threads(threads_per_row), lane(threadIdx.x % threads_per_row), index(threadIdx.x / threads_per_row) {}

  // Every thread gets the sum over its group, added in one fixed order. All threads of the block call it.
  __device__ float sum(float value) {
    return reduce(value, [](float a, float b) { return a + b; });
  }

  // Every thread gets the largest of numbers that are not negative.
  __device__ float largest(float value) {
    return reduce(value, [](float a, float b) { return fmaxf(a, b); });
  }

 private:
  static constexpr int kMaxWarps = kMaxThreads / kWarp;

  int phase_ = 0;

  // One number a warp. There are two sets, used in turn: a thread that writes to one has passed the barrier behind the
  // last read of it.
  __device__ static float (&partials(int phase)) [kMaxWarps] {
    __shared__ float both[2][kMaxWarps];
    return both[phase];
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
