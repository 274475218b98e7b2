// The torch.library door: schemas, and each op's one implementation for every device with kernels. Fake kernels are in
// axiscap/fake.py, autograd in axiscap/ops.py.
#include <torch/library.h>

#include "ops.h"

namespace axiscap {
namespace {

TORCH_LIBRARY(axiscap, m) {
  m.set_python_module("axiscap.fake");
  m.def(
      "cap_(Tensor(a!) hidden, Tensor axes, Tensor floors, Tensor? slots=None, *, Tensor? lifts=None, "
      "Tensor? limits=None, Tensor(b!)? projections=None) -> ()");
  m.def(
      "cap(Tensor hidden, Tensor axes, Tensor floors, Tensor? slots=None, Tensor? lifts=None, Tensor? limits=None) -> "
      "(Tensor, Tensor, Tensor)");
  m.def("project(Tensor hidden, Tensor axes, Tensor? slots=None) -> Tensor");
  m.def(
      "cap_residual_(Tensor hidden, Tensor(a!) residual, Tensor axes, Tensor floors, Tensor? slots=None, *, "
      "Tensor? lifts=None, Tensor? limits=None, Tensor(b!)? projections=None) -> ()");
  m.def(
      "cap_.buffers(Tensor(a!) hidden, Tensor axes, Tensor floors, Tensor slots, Tensor(b!) projections, "
      "Tensor? lifts=None, Tensor? limits=None) -> ()");
  m.def(
      "cap_residual_.buffers(Tensor hidden, Tensor(a!) residual, Tensor axes, Tensor floors, Tensor slots, "
      "Tensor(b!) projections, Tensor? lifts=None, Tensor? limits=None) -> ()");
  m.def(
      "add_rms_norm_cap_(Tensor(a!) hidden, Tensor(b!) residual, Tensor weight, float eps, Tensor axes, Tensor floors, "
      "Tensor? slots=None, *, float weight_bias=0.0, Tensor? lifts=None, Tensor? limits=None, "
      "Tensor(c!)? projections=None) -> ()");
  m.def(
      "add_rms_norm_cap_.buffers(Tensor(a!) hidden, Tensor(b!) residual, Tensor weight, float eps, Tensor axes, "
      "Tensor floors, Tensor slots, Tensor(c!) projections, float weight_bias=0.0, Tensor? lifts=None, "
      "Tensor? limits=None) -> ()");
  m.def(
      "cap_layers_(Tensor(a!)[] hiddens, Tensor axes, Tensor floors, Tensor? slots=None, *, Tensor? lifts=None, "
      "Tensor? limits=None, Tensor(b!)? projections=None) -> ()");
  m.def("accumulate_(Tensor(a!) stats, Tensor projections, Tensor floors, Tensor? slots=None) -> ()");
}

// CPU and CUDA dispatch to the same functions: the device is looked at where the kernel is launched.
void implement(torch::Library& m) {
  m.impl("cap_", cap_);
  m.impl("cap", cap);
  m.impl("project", project);
  m.impl("cap_residual_", cap_residual_);
  m.impl("cap_.buffers", cap__buffers);
  m.impl("cap_residual_.buffers", cap_residual__buffers);
  m.impl("add_rms_norm_cap_", add_rms_norm_cap_);
  m.impl("add_rms_norm_cap_.buffers", add_rms_norm_cap__buffers);
  m.impl("cap_layers_", cap_layers_);
  m.impl("accumulate_", accumulate_);
}

TORCH_LIBRARY_IMPL(axiscap, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(axiscap, CUDA, m) { implement(m); }

}  // namespace
}  // namespace axiscap
