// The hook of a capped layer in a running model of transformers: one call caps a block's output, keeps its projections
// and counts them.
#pragma once

#include <pybind11/pybind11.h>

namespace axiscap {

// Adds the class Pass and the function layer(bank, stats, pass, index), which makes the hook.
void define_layers(pybind11::module_& m);

}  // namespace axiscap
