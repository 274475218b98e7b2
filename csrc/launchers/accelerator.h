// The interface of an accelerator. If launchers/cuda.cu is linked, it sets `accelerator`; other code uses no CUDA name.
#pragma once

#include "kernels/params.h"

namespace axiscap {

// cap and accumulate start asynchronously on `stream`, a cudaStream_t of the device, and return null or an error text.
// device: a number, or -1 for the current device. The caller's current device does not change.
struct Accelerator {
  const char* name;
  const char* (*cap)(const CapParams* layers, int64_t count, int device, void* stream);
  const char* (*accumulate)(const StatsParams&, int device, void* stream);
  int64_t max_hidden_size;
  int runtime_version;      // of the linked runtime, such as 13000
  int (*driver_version)();  // the newest runtime that the driver supports; 0: no driver
};

inline const Accelerator* accelerator = nullptr;

}  // namespace axiscap
