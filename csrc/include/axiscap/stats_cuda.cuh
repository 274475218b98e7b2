// The running statistics on a GPU. One block for each layer, slot and direction walks over all rows, in one fixed order
// of sums, so that the same rows give the same bits; a decoding step has few.
#pragma once

#include "axiscap/params.h"

namespace axiscap::cuda {

inline constexpr int kStatsThreads = 128;

__global__ void __launch_bounds__(kStatsThreads) accumulate_rows(const __grid_constant__ StatsParams p) {
  const int64_t directions = p.directions;
  const int32_t slot = int32_t(blockIdx.x / directions);
  const int64_t k = blockIdx.x % directions;
  const int64_t entry = int64_t(blockIdx.y) * gridDim.x + blockIdx.x;
  const float* projections = p.projections + blockIdx.y * p.layer_stride;
  const float* floors = p.floors + (entry - k);  // of this slot
  const double floor = floors[k];
  double mine[kStatFields] = {};
  mine[kMin] = INFINITY;
  mine[kMax] = -INFINITY;
  for (int64_t row = threadIdx.x; row < p.rows; row += kStatsThreads) {
    if ((p.slots ? p.slots[row] : 0) != slot) continue;
    const double projection = projections[row * directions + k];
    mine[kSeen] += 1;
    if (!isfinite(projection)) {
      mine[kNonFinite] += 1;
      continue;
    }
    mine[kSum] += projection;
    mine[kMin] = fmin(mine[kMin], projection);
    mine[kMax] = fmax(mine[kMax], projection);
    if (!(projection < floor)) continue;
    mine[kBelow] += 1;
    mine[kShortfall] += floor - projection;
    // Until a direction fires the row is as it came, so the first one below its floor is the first to fire.
    bool first = true;
#pragma unroll 1
    for (int64_t j = 0; j < k; ++j) first = first && !(projections[row * directions + j] < floors[j]);
    if (first) mine[kFired] += 1;
  }
  __shared__ double all[kStatsThreads];
  double* stats = p.stats + entry * kStatFields;
#pragma unroll
  for (int field = 0; field < kStatFields; ++field) {
    all[threadIdx.x] = mine[field];
    __syncthreads();
    for (int half = kStatsThreads / 2; half > 0; half /= 2) {
      if (threadIdx.x < half) {
        const double other = all[threadIdx.x + half];
        all[threadIdx.x] = field == kMin   ? fmin(all[threadIdx.x], other)
                           : field == kMax ? fmax(all[threadIdx.x], other)
                                           : all[threadIdx.x] + other;
      }
      __syncthreads();
    }
    if (threadIdx.x == 0)
      stats[field] = field == kMin   ? fmin(stats[field], all[0])
                     : field == kMax ? fmax(stats[field], all[0])
                                     : stats[field] + all[0];
    __syncthreads();
  }
}

}  // namespace axiscap::cuda
