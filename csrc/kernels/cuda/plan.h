// The launch configuration of a call on a GPU, computed on the host. The number of threads per row decides the order of
// a row's sum, and so its bits: it depends on H and dtype alone. The grid depends on how many blocks the device holds.
#pragma once

#include <cstdint>

#include "kernels/params.h"

namespace axiscap::cuda {

inline constexpr int kWarp = 32;
inline constexpr int kVecBytes = 16;  // one access of one thread
// With more threads a block, or more elements a thread, the kernels would spill: 65,536 registers a processor give each
// of 512 threads 128 registers.
inline constexpr int kMaxThreads = 512;
// Threads of a block if a warp or less works on a row.
inline constexpr int kSmallBlock = 128;

constexpr int elements_per_vec(DType dtype) { return dtype == DType::kFloat32 ? 4 : 8; }

// Vectors of a row that a thread has in registers. Each warp of a row takes part in its sums, so few warps with many
// vectors are best; 4 is the most that does not spill.
inline constexpr int kVecsPerThread = 4;
// Vectors that a thread has in shared memory, or prefetches into it: two rows of one stream, or one row of two.
inline constexpr int kVecsAhead = 8;

// Dynamic shared memory that a block can have on every supported GPU (sm_86 has 99 KiB), beside the static memory of
// its sums. It holds a wide row in float32.
inline constexpr int kMaxSharedBytes = 96 << 10;
inline constexpr int64_t kMaxHiddenSize = kMaxSharedBytes / int(sizeof(float));

constexpr bool is_wide(DType dtype, int64_t hidden_size) {
  return hidden_size > int64_t(kVecsPerThread) * elements_per_vec(dtype) * kMaxThreads;
}

struct Plan {
  int threads_per_row;  // a power of two up to a warp, or whole warps
  int block;            // threads
  int rows_per_block;
  int shared_bytes;  // of a block; a multiple of kSharedUnit
  int64_t grid;      // blocks for each layer
};

inline constexpr int kSharedUnit = kWarp * kVecsAhead * kVecBytes;

// A launch has this many times the blocks that the device holds at once. With 1, a block that does not fit after all
// would take as long again as all others. With more, the axis is loaded more often.
inline constexpr int64_t kPasses = 2;

// max_blocks: the most blocks of the grid. hidden_size must be in [1, kMaxHiddenSize].
constexpr Plan plan_for(DType dtype, int64_t hidden_size, int64_t rows, int64_t max_blocks) {
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
  // As many blocks as possible, with the same number of steps each: all blocks end together. A step of a block is
  // rows_per_block rows, and the axis stays in registers from step to step.
  const int64_t steps = (rows + plan.rows_per_block - 1) / plan.rows_per_block;
  const int64_t steps_per_block = (steps + max_blocks - 1) / max_blocks;
  plan.grid = steps == 0 ? 0 : (steps + steps_per_block - 1) / steps_per_block;
  return plan;
}

// The statistics of a slot are counted by a warp, or by a block of kStatsWarps if the rows are more than
// kMaxRowsPerWarp and the slots of all layers are at most kMaxSlotBlocks.
inline constexpr int kStatsWarps = 32;
inline constexpr int64_t kMaxRowsPerWarp = 256, kMaxSlotBlocks = 1024;

struct StatsPlan {
  bool block_per_slot;  // else a warp counts a slot
  int block;            // threads
  int64_t grid;         // blocks for each layer
};

constexpr StatsPlan stats_plan_for(const StatsParams& p) {
  const int warps = kSmallBlock / kWarp;
  if (p.rows > kMaxRowsPerWarp && p.num_slots * p.layers <= kMaxSlotBlocks)
    return {true, kStatsWarps * kWarp, p.num_slots};
  return {false, kSmallBlock, (p.num_slots + warps - 1) / warps};
}

}  // namespace axiscap::cuda
