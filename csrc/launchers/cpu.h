// The entry points of the CPU kernels. They run on the calling thread: the caller divides the rows among threads.
#pragma once

#include "kernels/params.h"

namespace axiscap::cpu {

// Caps rows [begin, end) of the call. Distinct ranges may run at the same time.
void cap(const CapParams& params, int64_t begin, int64_t end);

// Adds the projections of one call to the running statistics. Two threads must not add to the same statistics at once.
void accumulate(const StatsParams& params);

// The memory bound of the benchmarks: one pass reads the bytes, the other one reads, changes and writes them.
uint64_t read_pass(const void* data, int64_t bytes);
void read_modify_write_pass(void* data, int64_t bytes);

// The instruction set in use: "avx512bf16", "avx512", "avx2", "neon" or "baseline". It is the best of this machine, or
// the one that the environment variable AXISCAP_ISA names.
const char* isa();

}  // namespace axiscap::cpu
