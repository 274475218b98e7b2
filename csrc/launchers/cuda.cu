// Chooses a kernel and a plan for a call and launches it: no allocation, no synchronisation, nothing read back.
#include <algorithm>
#include <atomic>
#include <cstdint>

#include "kernels/cuda/cap.cuh"
#include "kernels/cuda/stats.cuh"
#include "launchers/accelerator.h"

namespace axiscap::cuda {
namespace {

constexpr int kMaxDevices = 16;
constexpr int kSharedUnits = kMaxSharedBytes / kSharedUnit + 1;

// A fact about a device or a kernel on it. It never changes, and asking costs more than a launch.
using Fact = std::atomic<int>;

// A kernel, and what the devices said of it.
struct Kernel {
  const void* function;
  Fact architecture[kMaxDevices] = {};             // compiled for, as 90 for sm_90
  Fact blocks[kMaxDevices][2][kSharedUnits] = {};  // on a processor, for narrow and wide rows, by shared memory
};

template <class T, Op kOp, bool kAnyDirections, int kLayers>
Kernel register_rows{reinterpret_cast<const void*>(cap_register_rows<T, kOp, kAnyDirections, kLayers>)};
template <class T, Op kOp, int kLayers>
Kernel shared_rows{reinterpret_cast<const void*>(cap_shared_rows<T, kOp, kLayers>)};

// What decides which kernel a call needs.
struct Shape {
  Op op;
  bool in_registers, one_direction, one_layer;
};

template <class T, Op kOp>
Kernel& kernel_for(const Shape& shape) {
  if (!shape.in_registers) return shared_rows<T, kOp, 1>;
  return shape.one_direction ? register_rows<T, kOp, false, 1> : register_rows<T, kOp, true, 1>;
}

template <class T>
Kernel& kernel_for(const Shape& shape) {
  if (shape.op == Op::kNorm) return kernel_for<T, Op::kNorm>(shape);
  if (shape.op == Op::kCapResidual) return kernel_for<T, Op::kCapResidual>(shape);
  if (shape.one_layer) return kernel_for<T, Op::kCap>(shape);
  return shape.in_registers ? register_rows<T, Op::kCap, true, kMaxLayers> : shared_rows<T, Op::kCap, kMaxLayers>;
}

Kernel& kernel_for(DType dtype, const Shape& shape) {
  if (dtype == DType::kFloat32) return kernel_for<float>(shape);
  if (dtype == DType::kBFloat16) return kernel_for<__nv_bfloat16>(shape);
  return kernel_for<__half>(shape);
}

bool is_on_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kVecBytes == 0; }

// Whether every vector of every stream is one access.
bool is_aligned(const CapParams& p) {
  const int64_t vec = elements_per_vec(p.dtype), bytes = kVecBytes / vec;
  const auto rows = [&](const void* base, int64_t stride) {
    return !base || (is_on_16_bytes(base) && stride * bytes % kVecBytes == 0);
  };
  // In fp8 the elements of a vector are a byte each.
  const bool normed = p.is_fp8() ? uintptr_t(p.normed) % uintptr_t(vec) == 0 && p.normed_stride % vec == 0
                                 : rows(p.normed, p.normed_stride);
  return p.hidden_size % vec == 0 && rows(p.hidden, p.hidden_stride) && rows(p.residual, p.residual_stride) &&
         rows(p.out, p.out_stride) && normed && is_on_16_bytes(p.axes) && is_on_16_bytes(p.lifts) &&
         is_on_16_bytes(p.weight);
}

bool are_aligned(const CapParams* layers, int64_t count) { return std::all_of(layers, layers + count, is_aligned); }

Op op_of(const CapParams& p) { return p.weight ? Op::kNorm : p.residual ? Op::kCapResidual : Op::kCap; }

// Makes a device current, and the one before again at the end of its scope. -1: the current one.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : error_(cudaGetDevice(&previous_)), device_(device < 0 ? previous_ : device) {
    if (error_ || device_ == previous_) return;
    error_ = cudaSetDevice(device_);
    changed_ = !error_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  int device() const { return device_; }
  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  cudaError_t error_;
  int device_;
  bool changed_ = false;
};

// Answers with what is known, or asks once.
template <class Ask>
cudaError_t look_up(Fact& fact, int& value, Ask ask) {
  value = fact.load(std::memory_order_relaxed);
  if (value) return cudaSuccess;
  if (const cudaError_t error = ask(&value)) return error;
  fact.store(value, std::memory_order_relaxed);
  return cudaSuccess;
}

cudaError_t count_processors(int device, int& processors) {
  static Fact facts[kMaxDevices];
  return look_up(facts[device], processors,
                 [&](int* value) { return cudaDeviceGetAttribute(value, cudaDevAttrMultiProcessorCount, device); });
}

// What the kernel was compiled for: the driver may run that on a newer device.
cudaError_t find_architecture(Kernel& kernel, int device, int& architecture) {
  return look_up(kernel.architecture[device], architecture, [&](int* value) {
    cudaFuncAttributes attributes;
    if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel.function)) return error;
    *value = attributes.ptxVersion;
    return cudaSuccess;
  });
}

// Blocks of this plan that a processor holds at once.
cudaError_t count_blocks(Kernel& kernel, int device, const Plan& plan, bool wide, int& blocks) {
  return look_up(kernel.blocks[device][wide][plan.shared_bytes / kSharedUnit], blocks, [&](int* value) {
    const auto set = [&](cudaFuncAttribute attribute, int to) {
      return cudaFuncSetAttribute(kernel.function, attribute, to);
    };
    if (const cudaError_t error = set(cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSharedBytes)) return error;
    // The rows on their way keep the memory busy, and need more shared memory than the driver would set aside.
    if (const cudaError_t error = set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared))
      return error;
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(value, kernel.function, plan.block, size_t(plan.shared_bytes));
  });
}

// Plans a launch that fills the device, with `layers` layers side by side.
cudaError_t make_plan(Kernel& kernel, int device, const CapParams& p, int64_t layers, Plan& plan) {
  const Plan shape = plan_for(p.dtype, p.hidden_size, 1, 1);  // all but the grid depends on dtype and H alone
  int processors, blocks;
  if (const cudaError_t error = count_processors(device, processors)) return error;
  if (const cudaError_t error = count_blocks(kernel, device, shape, is_wide(p.dtype, p.hidden_size), blocks))
    return error;
  plan = plan_for(p.dtype, p.hidden_size, p.rows, std::max<int64_t>(1, kPasses * processors * blocks / layers));
  return cudaSuccess;
}

template <int kLayers>
void fill_layers(Call<kLayers>& call, const CapParams* layers, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const CapParams& p = layers[i];
    call.layers[i] = {p.hidden, p.out,    p.hidden_stride, p.out_stride,  p.axes,
                      p.lifts,  p.floors, p.targets,       p.norm_limits, p.projections};
  }
}

// Launches the call. early: the kernel may start before the one ahead of it has written its rows.
template <int kLayers>
cudaError_t launch_call(const Kernel& kernel, const Plan& plan, Call<kLayers>& call, int64_t layers, bool early,
                        cudaStream_t stream) {
  cudaLaunchAttribute serialization{};
  serialization.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  serialization.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(plan.grid), unsigned(layers));
  config.blockDim = dim3(unsigned(plan.block));
  config.dynamicSmemBytes = size_t(plan.shared_bytes);
  config.stream = stream;
  config.attrs = &serialization;
  config.numAttrs = early ? 1 : 0;
  void* argument = &call;
  return cudaLaunchKernelExC(&config, kernel.function, &argument);
}

// Caps all layers, kLayers in each launch.
template <int kLayers>
cudaError_t launch_cap(const CapParams* layers, int64_t count, int device, cudaStream_t stream) {
  if (device >= kMaxDevices) return cudaErrorInvalidDevice;
  const CapParams& p = layers[0];
  const bool aligned = are_aligned(layers, count);
  Kernel& kernel =
      kernel_for(p.dtype, {op_of(p), aligned && !is_wide(p.dtype, p.hidden_size), p.directions == 1, kLayers == 1});
  Plan plan;
  if (const cudaError_t error = make_plan(kernel, device, p, count, plan)) return error;
  int architecture;
  if (const cudaError_t error = find_architecture(kernel, device, architecture)) return error;

  Call<kLayers> call{};
  call.shared = p;
  call.threads_per_row = plan.threads_per_row;
  call.inverse_size = 1.f / float(p.hidden_size);
  call.aligned = aligned;
  const bool early = architecture >= AXISCAP_WAITING_ARCHITECTURE;  // only there the kernel waits by itself
  for (int64_t begin = 0; begin < count; begin += kLayers) {
    const int64_t launched = std::min<int64_t>(count - begin, kLayers);
    fill_layers(call, layers + begin, launched);
    if (const cudaError_t error = launch_call(kernel, plan, call, launched, early, stream)) return error;
  }
  return cudaSuccess;
}

const char* message_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // a failed launch must not surface again in somebody else's call
  return cudaGetErrorString(error);
}

const char* cap(const CapParams* layers, int64_t count, int device, void* stream) {
  static_assert(kMaxHiddenSize == 24576);
  if (layers[0].hidden_size > kMaxHiddenSize) return "H must be at most 24576 on a GPU";
  const DeviceGuard guard(device);
  if (guard.error()) return message_of(guard.error());
  const bool one_by_one = count == 1 || is_wide(layers[0].dtype, layers[0].hidden_size);
  const auto launch = one_by_one ? launch_cap<1> : launch_cap<kMaxLayers>;
  return message_of(launch(layers, count, guard.device(), static_cast<cudaStream_t>(stream)));
}

const char* accumulate(const StatsParams& params, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error()) return message_of(guard.error());
  const StatsPlan plan = stats_plan_for(params);
  const dim3 grid(unsigned(plan.grid), unsigned(params.layers));
  const auto kernel = plan.whole ? accumulate_rows<true> : accumulate_rows<false>;
  kernel<<<grid, plan.block, 0, static_cast<cudaStream_t>(stream)>>>(params);
  return message_of(cudaPeekAtLastError());
}

int driver() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

constexpr Accelerator kCuda = {"CUDA", cap, accumulate, kMaxHiddenSize, CUDART_VERSION, driver};
[[maybe_unused]] const bool registered = (accelerator = &kCuda, true);

}  // namespace
}  // namespace axiscap::cuda
