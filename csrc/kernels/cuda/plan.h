// How a call is laid out on a GPU: pure arithmetic on the host. Threads per row depend on H and dtype alone, because
// the order of a row's sum, and so its bits, depend on them. The grid depends on the blocks that the device holds.
#pragma once

#include <cstdint>

#include "kernels/params.h"

namespace axiscap::cuda {

inline constexpr int kWarp = 32;
inline constexpr int kVecBytes = 16;  // one access of one thread
// A row that fits is held in the registers of its threads. More threads a block, or more elements a thread, would not
// leave each thread the registers that it needs.
inline constexpr int kMaxThreads = 512;
// Threads of a block whose rows are a warp's or less.
inline constexpr int kSmallBlock = 128;

constexpr int elements_per_vec(DType dtype) { return dtype == DType::kFloat32 ? 4 : 8; }

// Vectors of a row that a thread holds: as many as its registers allow. Each warp pays for the sums of a row, so fewer
// warps are better.
inline constexpr int kVecsPerThread = 4;
// Vectors that a thread has in shared memory or on their way there: two rows of one stream, or one row of two.
inline constexpr int kVecsAhead = 8;

// Shared memory that a block has on every device, beside its sums. A wider row lies there, in float32.
inline constexpr int kMaxSharedBytes = 96 << 10;
inline constexpr int64_t kMaxHiddenSize = kMaxSharedBytes / int(sizeof(float));

constexpr bool is_wide(DType dtype, int64_t hidden_size) {
  return hidden_size > int64_t(kVecsPerThread) * elements_per_vec(dtype) * kMaxThreads;
}

// The launch of a call.
struct Plan {
  int threads_per_row;  // a power of two up to a warp, or whole warps
  int block;            // threads
  int rows_per_block;
  int shared_bytes;  // a block; a multiple of kSharedUnit
  int64_t grid;      // blocks a layer
};

inline constexpr int kSharedUnit = kWarp * kVecsAhead * kVecBytes;

// A launch has this many times the blocks that the device should hold at once. If fewer fit, or some end early, the
// rest is a part of a pass and not a whole one. More blocks would load the axis more often.
inline constexpr int64_t kPasses = 2;

// resident: blocks of that size that a launch may have. H must be in [1, kMaxHiddenSize].
constexpr Plan plan_for(DType dtype, int64_t hidden_size, int64_t rows, int64_t resident) {
  const int64_t vecs = (hidden_size + elements_per_vec(dtype) - 1) / elements_per_vec(dtype);
  Plan plan{};
  const int64_t threads = (vecs + kVecsPerThread - 1) / kVecsPerThread;
  plan.threads_per_row = 1;
  while (plan.threads_per_row < threads && plan.threads_per_row < kWarp) plan.threads_per_row *= 2;
  if (threads > kWarp) plan.threads_per_row = int((threads + kWarp - 1) / kWarp) * kWarp;
  if (is_wide(dtype, hidden_size)) plan.threads_per_row = kMaxThreads;
  plan.block = plan.threads_per_row > kWarp ? plan.threads_per_row : kSmallBlock;
  plan.rows_per_block = plan.block / plan.threads_per_row;
  plan.shared_bytes = plan.block * kVecsAhead * kVecBytes;
  if (is_wide(dtype, hidden_size))
    plan.shared_bytes = int((hidden_size * int64_t(sizeof(float)) + kSharedUnit - 1) / kSharedUnit) * kSharedUnit;
  // As many blocks as possible, each for the same number of rows: all end together, and a block keeps its axis from row
  // to row.
  const int64_t units = (rows + plan.rows_per_block - 1) / plan.rows_per_block;
  const int64_t units_per_block = (units + resident - 1) / resident;
  plan.grid = units == 0 ? 0 : (units + units_per_block - 1) / units_per_block;
  return plan;
}

// In the statistics a warp looks for the rows of one slot, or a block of kStatsWarps if rows are many and the device
// has room for as many blocks.
inline constexpr int kStatsWarps = 32;
inline constexpr int64_t kRowsOfAWarp = 256, kMostWholeBlocks = 1024;

// The launch of the statistics.
struct StatsPlan {
  bool whole;    // a block for each slot, not a warp
  int block;     // threads
  int64_t grid;  // blocks a layer
};

constexpr StatsPlan stats_plan_for(const StatsParams& p) {
  const bool whole = p.rows > kRowsOfAWarp && p.num_slots * p.layers <= kMostWholeBlocks;
  const int warps = kSmallBlock / kWarp;
  return {whole, whole ? kStatsWarps * kWarp : kSmallBlock, whole ? p.num_slots : (p.num_slots + warps - 1) / warps};
}

}  // namespace axiscap::cuda
