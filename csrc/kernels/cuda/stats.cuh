// The running statistics on a GPU. A warp counts the rows of one slot of one layer, or a block does if rows are many
// and slots are few (stats_plan_for). It reads the slots of all rows and adds up its own rows in a fixed order, so that
// the same rows give the same bits. The statistics of a slot without rows are not written.
#pragma once

#include "kernels/cuda/plan.h"
#include "kernels/params.h"

namespace axiscap::cuda {

// A thread loads the slots of so many rows at once, to wait for memory once.
inline constexpr int kSlotsAtOnce = 4;

// Merges the counts of two threads in one field.
__device__ inline double merge(int field, double a, double b) {
  return field == kMin ? fmin(a, b) : field == kMax ? fmax(a, b) : a + b;
}

// Returns the result to every thread of the warp.
__device__ inline double merge_over_warp(int field, double value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value = merge(field, value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}

// Returns the result to every thread of the first warp.
__device__ inline void merge_over_block(double (&counts)[kStatFields], int warp, int lane) {
  __shared__ double partials[kStatFields][kStatsWarps];
  if (lane == 0)
#pragma unroll
    for (int field = 0; field < kStatFields; ++field) partials[field][warp] = counts[field];
  __syncthreads();
  if (warp == 0)
#pragma unroll
    for (int field = 0; field < kStatFields; ++field) counts[field] = merge_over_warp(field, partials[field][lane]);
  __syncthreads();
}

// Adds one row's projection on direction k to the counts.
__device__ inline void count_row(const StatsParams& p, const float* projections, const float* floors, int64_t row,
                                 int64_t k, double (&counts)[kStatFields]) {
  const double projection = projections[row * p.directions + k], floor = floors[k];
  counts[kSeen] += 1;
  if (!isfinite(projection)) {
    counts[kNonFinite] += 1;
    return;
  }
  counts[kSum] += projection;
  counts[kMin] = fmin(counts[kMin], projection);
  counts[kMax] = fmax(counts[kMax], projection);
  if (!(projection < floor)) return;
  counts[kBelow] += 1;
  counts[kShortfall] += floor - projection;
  // The row is unchanged until a direction fires, so the first direction below its floor fires first.
  bool first = true;
#pragma unroll 1  // 44 registers a thread instead of 60
  for (int64_t j = 0; j < k; ++j) first = first && !(projections[row * p.directions + j] < floors[j]);
  if (first) counts[kFired] += 1;
}

// Adds the slot's rows among begin, begin + step, begin + 2 step, ... to the counts.
__device__ inline void count_rows(const StatsParams& p, const float* projections, const float* floors, int64_t slot,
                                  int64_t begin, int step, int64_t k, double (&counts)[kStatFields]) {
  for (; begin < p.rows; begin += kSlotsAtOnce * step) {
    int64_t slots[kSlotsAtOnce];
#pragma unroll
    for (int i = 0; i < kSlotsAtOnce; ++i) {
      const int64_t row = begin + i * step;
      slots[i] = row >= p.rows ? kNoSlot : p.slots ? p.slots[row] : 0;
    }
#pragma unroll
    for (int i = 0; i < kSlotsAtOnce; ++i)
      if (slots[i] == slot) count_row(p, projections, floors, begin + i * step, k, counts);
  }
}

template <bool kBlockPerSlot>
__global__ void __launch_bounds__(kStatsWarps* kWarp) accumulate_rows(const __grid_constant__ StatsParams p) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t slot = kBlockPerSlot ? blockIdx.x : int64_t(blockIdx.x) * (blockDim.x / kWarp) + warp;
  if (slot >= p.num_slots) return;
  const float* projections = p.projections + blockIdx.y * p.layer_stride;
  const int64_t entry = (blockIdx.y * p.num_slots + slot) * p.directions;
  for (int64_t k = 0; k < p.directions; ++k) {
    double counts[kStatFields] = {};
    counts[kMin] = INFINITY;
    counts[kMax] = -INFINITY;
    count_rows(p, projections, p.floors + entry, slot, kBlockPerSlot ? threadIdx.x : lane,
               kBlockPerSlot ? kStatsWarps * kWarp : kWarp, k, counts);
    if (!kBlockPerSlot && !__any_sync(0xffffffffu, counts[kSeen] > 0)) return;
#pragma unroll
    for (int field = 0; field < kStatFields; ++field) counts[field] = merge_over_warp(field, counts[field]);
    if constexpr (kBlockPerSlot) merge_over_block(counts, warp, lane);
    double* stats = p.stats + (entry + k) * kStatFields;
    if (lane == 0 && (!kBlockPerSlot || warp == 0))
#pragma unroll
      for (int field = 0; field < kStatFields; ++field) stats[field] = merge(field, stats[field], counts[field]);
  }
}

}  // namespace axiscap::cuda
