// The running statistics on a GPU: a warp for each layer and slot, or where these are few and rows are many, a block.
// It looks at the slots of all rows, counts its own, in one fixed order of sums, so that the same rows give the same
// bits, and leaves the statistics of a slot without rows alone.
#pragma once

#include "kernels/cuda/plan.h"
#include "kernels/params.h"

namespace axiscap::cuda {

// Slots of the rows that a thread asks for at once: it waits for all of them together.
inline constexpr int kSlotsAtOnce = 4;

// What several threads found in one field, as one.
__device__ inline double joined(int field, double a, double b) {
  return field == kMin ? fmin(a, b) : field == kMax ? fmax(a, b) : a + b;
}

__device__ inline double joined_over_warp(int field, double value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value = joined(field, value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

__device__ inline void count_row(const StatsParams& p, const float* projections, const float* floors, int64_t row,
                                 int64_t k, double (&mine)[kStatFields]) {
  const double projection = projections[row * p.directions + k], floor = floors[k];
  mine[kSeen] += 1;
  if (!isfinite(projection)) {
    mine[kNonFinite] += 1;
    return;
  }
  mine[kSum] += projection;
  mine[kMin] = fmin(mine[kMin], projection);
  mine[kMax] = fmax(mine[kMax], projection);
  if (!(projection < floor)) return;
  mine[kBelow] += 1;
  mine[kShortfall] += floor - projection;
  // Until a direction fires the row is as it came, so the first one below its floor is the first to fire.
  bool first = true;
#pragma unroll 1
  for (int64_t j = 0; j < k; ++j) first = first && !(projections[row * p.directions + j] < floors[j]);
  if (first) mine[kFired] += 1;
}

// kWhole: a block for each slot, and not a warp.
template <bool kWhole>
__global__ void __launch_bounds__(kStatsWarps* kWarp) accumulate_rows(const __grid_constant__ StatsParams p) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t slot = kWhole ? blockIdx.x : int64_t(blockIdx.x) * (blockDim.x / kWarp) + warp;
  const int step = kWhole ? kStatsWarps * kWarp : kWarp;
  if (slot >= p.num_slots) return;
  const float* projections = p.projections + blockIdx.y * p.layer_stride;
  const int64_t entry = (blockIdx.y * p.num_slots + slot) * p.directions;
#pragma unroll 1
  for (int64_t k = 0; k < p.directions; ++k) {
    double mine[kStatFields] = {};
    mine[kMin] = INFINITY;
    mine[kMax] = -INFINITY;
    for (int64_t begin = kWhole ? threadIdx.x : lane; begin < p.rows; begin += kSlotsAtOnce * step) {
      int64_t of[kSlotsAtOnce];
#pragma unroll
      for (int i = 0; i < kSlotsAtOnce; ++i) {
        const int64_t row = begin + i * step;
        of[i] = row >= p.rows ? kNoSlot : p.slots ? p.slots[row] : 0;
      }
#pragma unroll
      for (int i = 0; i < kSlotsAtOnce; ++i)
        if (of[i] == slot) count_row(p, projections, p.floors + entry, begin + i * step, k, mine);
    }
    if (!kWhole && !__any_sync(0xffffffffu, mine[kSeen] > 0)) return;
#pragma unroll
    for (int field = 0; field < kStatFields; ++field) mine[field] = joined_over_warp(field, mine[field]);
    if constexpr (kWhole) {
      __shared__ double all[kStatFields][kStatsWarps];
      if (lane == 0)
#pragma unroll
        for (int field = 0; field < kStatFields; ++field) all[field][warp] = mine[field];
      __syncthreads();
      if (warp == 0)
#pragma unroll
        for (int field = 0; field < kStatFields; ++field) mine[field] = joined_over_warp(field, all[field][lane]);
      __syncthreads();
    }
    double* stats = p.stats + (entry + k) * kStatFields;
    if (lane == 0 && (!kWhole || warp == 0))
#pragma unroll
      for (int field = 0; field < kStatFields; ++field) stats[field] = joined(field, stats[field], mine[field]);
  }
}

}  // namespace axiscap::cuda
