// The functions of an accelerator. launchers/cuda.cu sets `accelerator` if it is linked; other code looks here alone.
#pragma once

#include "kernels/params.h"

namespace axiscap {

// Each call is asynchronous on `stream` (the runtime's own handle) of a device, and returns null, or a text that says
// what went wrong. device: its number, or -1 for the current one; the caller's current device stays as it is.
struct Accelerator {
  const char* name;
  const char* (*cap)(const CapParams* layers, int64_t count, int device, void* stream);
  const char* (*accumulate)(const StatsParams&, int device, void* stream);
  int64_t max_hidden_size;  // of a row
  int runtime;              // version of the runtime that is linked, such as 13000
  int (*driver)();          // the newest runtime that the driver can run; 0: there is no driver
};

inline const Accelerator* accelerator = nullptr;

}  // namespace axiscap
