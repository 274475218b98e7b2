// The ops: a table of schemas and the functions that check and launch a call. The Python binding, the registration with
// torch.library and the fake kernels are made from the schemas.
#pragma once

#include <span>

#include "torch/checks.h"

namespace axiscap {

struct Op {
  // The schema for torch.library. The slots and projections of an overload ".buffers" may have more rows than the call.
  // A captured graph passes whole buffers to it, because torch may copy a slice before and after the call.
  const char* schema;
  py::object (*run)(const Arguments&);
};

std::span<const Op> ops();

// The arguments of Bank, as a schema.
extern const char* const kBankSchema;

// cap_ without the checks of the bank.
py::object cap_with_checked_bank_(const Arguments& a);

// Starts a checked call on `count` layers, which have the same number of rows and the same dtype.
void launch(const CapParams* layers, int64_t count, Device device);
void launch(const StatsParams& p, Device device);

}  // namespace axiscap
