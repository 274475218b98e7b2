// The torch.library door: schemas, and each op's one implementation for every device with kernels. Fake kernels are in
// axiscap/fake.py; autograd, and what it has to know of a tensor that was changed, in axiscap/ops.py.
#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "ops.h"

namespace axiscap {
namespace {

STABLE_TORCH_LIBRARY(axiscap, m) {
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
      "add_rms_norm_cap_fp8_(Tensor(a!) quantized, Tensor hidden, Tensor(b!) residual, Tensor weight, float eps, "
      "Tensor axes, Tensor floors, Tensor? slots=None, *, float weight_bias=0.0, Tensor? scale=None, "
      "Tensor(c!)? scales=None, Tensor? lifts=None, Tensor? limits=None, Tensor(d!)? projections=None) -> ()");
  m.def(
      "add_rms_norm_cap_fp8_.buffers(Tensor(a!) quantized, Tensor hidden, Tensor(b!) residual, Tensor weight, "
      "float eps, Tensor axes, Tensor floors, Tensor slots, Tensor(d!) projections, float weight_bias=0.0, "
      "Tensor? scale=None, Tensor(c!)? scales=None, Tensor? lifts=None, Tensor? limits=None) -> ()");
  m.def(
      "cap_layers_(Tensor(a!)[] hiddens, Tensor axes, Tensor floors, Tensor? slots=None, *, Tensor? lifts=None, "
      "Tensor? limits=None, Tensor(b!)? projections=None) -> ()");
  m.def("accumulate_(Tensor(a!) stats, Tensor projections, Tensor floors, Tensor? slots=None) -> ()");
}

using torch::stable::detail::from;
using torch::stable::detail::to;

// A tensor that the dispatcher hands over.
struct Owned {
  struct Delete {
    void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
  };
  std::unique_ptr<AtenTensorOpaque, Delete> handle;
  TensorView view;

  explicit Owned(AtenTensorHandle given) : handle(given), view(given) {}
};

// An argument as it comes from the dispatcher and as an op takes it.
template <class Argument>
struct Taken;

template <>
struct Taken<const TensorView&> {
  Owned tensor;

  explicit Taken(StableIValue value) : tensor(to<AtenTensorHandle>(value)) {}
  const TensorView& get() const { return tensor.view; }
};

template <>
struct Taken<Optional> {
  std::optional<Owned> tensor;

  explicit Taken(StableIValue value) {
    if (const auto handle = to<std::optional<AtenTensorHandle>>(value)) tensor.emplace(*handle);
  }
  Optional get() const { return tensor ? &tensor->view : nullptr; }
};

template <>
struct Taken<TensorList> {
  std::vector<torch::stable::Tensor> tensors;
  std::vector<TensorView> views;

  explicit Taken(StableIValue value) : tensors(to<std::vector<torch::stable::Tensor>>(value)) {
    for (const torch::stable::Tensor& tensor : tensors) views.emplace_back(tensor.get());
  }
  TensorList get() const { return views; }
};

template <>
struct Taken<double> {
  double value;

  explicit Taken(StableIValue given) : value(to<double>(given)) {}
  double get() const { return value; }
};

bool ask(const char* op, const TensorView& tensor, StableIValue* stack) {
  AtenTensorHandle copy = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensor.handle, &copy));
  stack[0] = torch::stable::detail::from(copy);
  return torch_call_dispatcher(op, "", stack, TORCH_ABI_VERSION) == TORCH_SUCCESS;
}

bool is(const char* op, const TensorView& tensor) {
  StableIValue answer;
  return ask(op, tensor, &answer) && to<bool>(answer);
}

// Tells autograd of a tensor that is changed. Where a gradient may be needed, by an op that works in place and, from a
// dimension to itself, changes nothing: it counts the tensor's version, and refuses a leaf that needs a gradient. (What
// is no leaf needs one.)
void announce_change(const TensorView& tensor, const char* name) {
  const bool grad_mode = aoti_torch_grad_mode_is_enabled();
  if (!grad_mode && count_change(tensor.handle)) return;
  bool refused = grad_mode && !is("aten::is_leaf", tensor);
  if (!refused) {
    std::array<StableIValue, 3> stack{0, from(int64_t{0}), from(int64_t{0})};
    const bool counted = ask("aten::transpose_", tensor, stack.data());
    if (counted) aoti_torch_delete_tensor_object(to<AtenTensorHandle>(stack[0]));
    refused = !counted && grad_mode && !is("aten::is_inference", tensor);
  }
  check_needs_no_gradient(refused, name);
}

void announce_change(TensorList tensors, const char* name) {
  for (const TensorView& tensor : tensors) announce_change(tensor, name);
}

template <size_t N>
struct Name {
  char text[N];
  constexpr Name(const char (&given)[N]) { std::copy_n(given, N, text); }
};

// An argument that an op changes: its place and name.
template <size_t at, Name called>
struct Changes {
  static constexpr size_t place = at;
  static constexpr const char* name = called.text;
};

template <class... Changing, class Result, class... Arguments, size_t... I>
void call(Result (*op)(Arguments...), StableIValue* stack, std::index_sequence<I...>) {
  const std::tuple<Taken<Arguments>...> taken{stack[I]...};
  (announce_change(std::get<Changing::place>(taken).get(), Changing::name), ...);
  if constexpr (std::is_void_v<Result>) {
    op(std::get<I>(taken).get()...);
  } else if constexpr (std::is_same_v<Result, NewTensor>) {
    stack[0] = from(op(std::get<I>(taken).get()...));
  } else {
    const Result results = op(std::get<I>(taken).get()...);
    std::apply(
        [stack](const auto&... result) {
          int64_t at = 0;
          ((stack[at++] = from(result)), ...);
        },
        results);
  }
}

// An op as the dispatcher calls it.
template <auto op, class... Changing>
void kernel(StableIValue* stack, uint64_t, uint64_t) {
  [stack]<class Result, class... Arguments>(Result (*function)(Arguments...)) {
    call<Changing...>(function, stack, std::index_sequence_for<Arguments...>());
  }(op);
}

// CPU and CUDA dispatch to the same functions: the device is looked at where the kernel is launched.
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("cap_", kernel<cap_, Changes<0, "hidden">>);
  m.impl("cap", kernel<cap>);
  m.impl("project", kernel<project>);
  m.impl("cap_residual_", kernel<cap_residual_, Changes<1, "residual">>);
  m.impl("cap_.buffers", kernel<cap__buffers, Changes<0, "hidden">>);
  m.impl("cap_residual_.buffers", kernel<cap_residual__buffers, Changes<1, "residual">>);
  m.impl("add_rms_norm_cap_", kernel<add_rms_norm_cap_, Changes<0, "hidden">, Changes<1, "residual">>);
  m.impl("add_rms_norm_cap_.buffers", kernel<add_rms_norm_cap__buffers, Changes<0, "hidden">, Changes<1, "residual">>);
  m.impl("add_rms_norm_cap_fp8_", kernel<add_rms_norm_cap_fp8_, Changes<0, "quantized">, Changes<2, "residual">>);
  m.impl("add_rms_norm_cap_fp8_.buffers",
         kernel<add_rms_norm_cap_fp8__buffers, Changes<0, "quantized">, Changes<2, "residual">>);
  m.impl("cap_layers_", kernel<cap_layers_, Changes<0, "hiddens">>);
  m.impl("accumulate_", kernel<accumulate_, Changes<0, "stats">>);
}

STABLE_TORCH_LIBRARY_IMPL(axiscap, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(axiscap, CUDA, m) { implement(m); }

}  // namespace
}  // namespace axiscap
