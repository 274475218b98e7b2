// The torch.library door: schemas, and each op's one implementation for every device with kernels. Fake kernels are in
// axiscap/fake.py, autograd in axiscap/ops.py.
#include <torch/library.h>

#include "ops.h"

namespace axiscap {
namespace {

using at::Tensor;

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
      "cap_layers_(Tensor(a!)[] hiddens, Tensor axes, Tensor floors, Tensor? slots=None, *, Tensor? lifts=None, "
      "Tensor? limits=None, Tensor(b!)? projections=None) -> ()");
  m.def("accumulate_(Tensor(a!) stats, Tensor projections, Tensor floors, Tensor? slots=None) -> ()");
}

using Optional = const OptionalTensor&;

void cap__op(const Tensor& hidden, const Tensor& axes, const Tensor& floors, Optional slots, Optional lifts,
             Optional limits, Optional projections) {
  cap_(hidden, Bank(axes, floors, lifts, limits), slots, projections);
}

std::tuple<Tensor, Tensor, Tensor> cap_op(const Tensor& hidden, const Tensor& axes, const Tensor& floors,
                                          Optional slots, Optional lifts, Optional limits) {
  return cap(hidden, Bank(axes, floors, lifts, limits), slots);
}

void cap_residual__op(const Tensor& hidden, const Tensor& residual, const Tensor& axes, const Tensor& floors,
                      Optional slots, Optional lifts, Optional limits, Optional projections) {
  cap_residual_(hidden, residual, Bank(axes, floors, lifts, limits), slots, projections);
}

// A slice that a graph itself takes of a buffer may be copied around the call: functionalisation does so where vLLM
// compiles.
void cap__buffers(const Tensor& hidden, const Tensor& axes, const Tensor& floors, const Tensor& slots,
                  const Tensor& projections, Optional lifts, Optional limits) {
  cap_(hidden, Bank(axes, floors, lifts, limits), first_rows(slots, "slots", hidden),
       first_rows(projections, "projections", hidden));
}

void cap_residual__buffers(const Tensor& hidden, const Tensor& residual, const Tensor& axes, const Tensor& floors,
                           const Tensor& slots, const Tensor& projections, Optional lifts, Optional limits) {
  cap_residual_(hidden, residual, Bank(axes, floors, lifts, limits), first_rows(slots, "slots", hidden),
                first_rows(projections, "projections", hidden));
}

void add_rms_norm_cap__op(const Tensor& hidden, const Tensor& residual, const Tensor& weight, double eps,
                          const Tensor& axes, const Tensor& floors, Optional slots, double weight_bias, Optional lifts,
                          Optional limits, Optional projections) {
  add_rms_norm_cap_(hidden, residual, weight, eps, Bank(axes, floors, lifts, limits), slots, weight_bias, projections);
}

void cap_layers__op(at::TensorList hiddens, const Tensor& axes, const Tensor& floors, Optional slots, Optional lifts,
                    Optional limits, Optional projections) {
  cap_layers_(hiddens, Bank(axes, floors, lifts, limits, true), slots, projections);
}

// CPU and CUDA dispatch to the same functions: the device is looked at where the kernel is launched.
void implement(torch::Library& m) {
  m.impl("cap_", cap__op);
  m.impl("cap", cap_op);
  m.impl("project", project);
  m.impl("cap_residual_", cap_residual__op);
  m.impl("cap_.buffers", cap__buffers);
  m.impl("cap_residual_.buffers", cap_residual__buffers);
  m.impl("add_rms_norm_cap_", add_rms_norm_cap__op);
  m.impl("cap_layers_", cap_layers__op);
  m.impl("accumulate_", accumulate_);
}

TORCH_LIBRARY_IMPL(axiscap, CPU, m) { implement(m); }
TORCH_LIBRARY_IMPL(axiscap, CUDA, m) { implement(m); }

}  // namespace
}  // namespace axiscap
