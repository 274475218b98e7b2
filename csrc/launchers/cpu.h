// The CPU kernels' door: plain functions over a range of rows, so that whoever calls brings the threads.
#pragma once

#include "kernels/params.h"

namespace axiscap::cpu {

// Rows [begin, end) of the call. Distinct ranges may run at the same time.
void cap(const CapParams& params, int64_t begin, int64_t end);

// Adds what one call's projections say to the running statistics. Not to be run twice at once on the same stats.
void accumulate(const StatsParams& params);

// The memory bound that the kernels are measured against: the bytes are only read, or read and written back changed.
uint64_t read_pass(const void* data, int64_t bytes);
void read_modify_write_pass(void* data, int64_t bytes);

// The instruction set in use: "avx512bf16", "avx512", "avx2", "neon" or "baseline". AXISCAP_ISA in the environment asks
// for a lower one than the best of this machine.
const char* isa();

}  // namespace axiscap::cpu
