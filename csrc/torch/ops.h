// The ops: one table with each op's schema and the function that checks a call and starts it. The Python binding, the
// registration with torch.library and the fake kernels all follow from the schemas.
#pragma once

#include <span>

#include "torch/checks.h"

namespace axiscap {

struct Op {
  // As torch.library takes it. An overload ".buffers" has slots and projections of at least as many rows as the call,
  // at addresses that a captured graph keeps: a slice that the graph takes may be copied before the call and after it.
  const char* schema;
  py::object (*run)(const Arguments&);
};

std::span<const Op> ops();

// The arguments of Bank, as a schema.
extern const char* const kBankSchema;

// cap_ with a bank that has been checked.
py::object cap_with_checked_bank_(const Arguments& a);

// Starts a checked call: one for each layer, of one row count and dtype.
void launch(const CapParams* layers, int64_t count, Device device);
void launch(const StatsParams& p, Device device);

}  // namespace axiscap
