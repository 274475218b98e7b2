// The hook of a capped layer in a model of transformers: one call caps a block's output, stores its projections and
// adds them to the statistics.
#pragma once

#include <pybind11/pybind11.h>

namespace axiscap {

// Adds the class Pass and the function layer(bank, stats, pass_, index), which returns a hook.
void define_layers(pybind11::module_& m);

}  // namespace axiscap
