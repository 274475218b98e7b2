// Selects a kernel and a plan for a call and launches it, without an allocation, a synchronisation or a copy to the
// host.
#include <algorithm>
#include <atomic>
#include <cstdint>

#include "kernels/cuda/cap.cuh"
#include "kernels/cuda/stats.cuh"
#include "launchers/accelerator.h"

namespace axiscap::cuda {
namespace {

constexpr int kMaxDevices = 16;  // devices that the caches below have entries for
constexpr int kSharedUnits = kMaxSharedBytes / kSharedUnit + 1;

// A cached property of a device, or of a kernel on a device; 0: not queried yet. It never changes, and a query costs
// more than a launch.
using Property = std::atomic<int>;

// A kernel with its cached properties.
struct Kernel {
  const void* function;
  Property architecture[kMaxDevices] = {};  // that the kernel was compiled for, such as 90 for sm_90
  // Blocks that a processor holds at once: by device, narrow or wide rows, and shared memory in kSharedUnit.
  Property blocks[kMaxDevices][2][kSharedUnits] = {};
};

template <class T, Op kOp, bool kAnyDirections, int kLayers>
Kernel register_rows{reinterpret_cast<const void*>(cap_register_rows<T, kOp, kAnyDirections, kLayers>)};
template <class T, Op kOp, int kLayers>
Kernel shared_rows{reinterpret_cast<const void*>(cap_shared_rows<T, kOp, kLayers>)};

// The properties of a call that select its kernel.
struct KernelKey {
  Op op;
  bool is_in_registers, has_one_direction, has_one_layer;
};

template <class T, Op kOp>
Kernel& kernel_for(const KernelKey& key) {
  if (!key.is_in_registers) return shared_rows<T, kOp, 1>;
  return key.has_one_direction ? register_rows<T, kOp, false, 1> : register_rows<T, kOp, true, 1>;
}

template <class T>
Kernel& kernel_for(const KernelKey& key) {
  if (key.op == Op::kNorm) return kernel_for<T, Op::kNorm>(key);
  if (key.op == Op::kCapResidual) return kernel_for<T, Op::kCapResidual>(key);
  if (key.has_one_layer) return kernel_for<T, Op::kCap>(key);
  return key.is_in_registers ? register_rows<T, Op::kCap, true, kMaxLayers> : shared_rows<T, Op::kCap, kMaxLayers>;
}

Kernel& kernel_for(DType dtype, const KernelKey& key) {
  if (dtype == DType::kFloat32) return kernel_for<float>(key);
  if (dtype == DType::kBFloat16) return kernel_for<__nv_bfloat16>(key);
  return kernel_for<__half>(key);
}

// Whether a vector may begin at the address.
bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kVecBytes == 0; }

// Whether the kernel can load and store every vector of the call with one access.
bool is_call_aligned(const CapParams& p) {
  const int64_t vec = elements_per_vec(p.dtype), bytes = kVecBytes / vec;
  const auto are_rows_aligned = [&](const void* base, int64_t stride) {
    return !base || (is_aligned(base) && stride * bytes % kVecBytes == 0);
  };
  // A vector in fp8 has one byte for each element.
  const bool is_norm_aligned = p.is_fp8() ? uintptr_t(p.normed) % uintptr_t(vec) == 0 && p.normed_stride % vec == 0
                                          : are_rows_aligned(p.normed, p.normed_stride);
  return p.hidden_size % vec == 0 && are_rows_aligned(p.hidden, p.hidden_stride) &&
         are_rows_aligned(p.residual, p.residual_stride) && are_rows_aligned(p.out, p.out_stride) && is_norm_aligned &&
         is_aligned(p.axes) && is_aligned(p.lifts) && is_aligned(p.weight);
}

Op op_of(const CapParams& p) { return p.weight ? Op::kNorm : p.residual ? Op::kCapResidual : Op::kCap; }

// Makes a device current for the scope of the guard. -1: the current device stays.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : error_(cudaGetDevice(&previous_)), device_(device < 0 ? previous_ : device) {
    if (error_ || device_ == previous_) return;
    error_ = cudaSetDevice(device_);
    switched_ = !error_;
  }
  ~DeviceGuard() {
    if (switched_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  int device() const { return device_; }
  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  cudaError_t error_;
  int device_;
  bool switched_ = false;
};

// Reads a property from its cache, or queries and caches it.
template <class Query>
cudaError_t look_up(Property& property, int& value, Query query) {
  value = property.load(std::memory_order_relaxed);
  if (value) return cudaSuccess;
  if (const cudaError_t error = query(&value)) return error;
  property.store(value, std::memory_order_relaxed);
  return cudaSuccess;
}

cudaError_t count_processors(int device, int& processors) {
  static Property counts[kMaxDevices];
  return look_up(counts[device], processors,
                 [&](int* value) { return cudaDeviceGetAttribute(value, cudaDevAttrMultiProcessorCount, device); });
}

// Finds the architecture that the kernel was compiled for. The device may be newer.
cudaError_t find_architecture(Kernel& kernel, int device, int& architecture) {
  return look_up(kernel.architecture[device], architecture, [&](int* value) {
    cudaFuncAttributes attributes;
    if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel.function)) return error;
    *value = attributes.ptxVersion;
    return cudaSuccess;
  });
}

// Counts the blocks of this plan that a processor holds at once. The query also configures the kernel on the device.
cudaError_t count_blocks(Kernel& kernel, int device, const Plan& plan, bool is_wide, int& blocks) {
  return look_up(kernel.blocks[device][is_wide][plan.shared_bytes / kSharedUnit], blocks, [&](int* value) {
    const auto set_attribute = [&](cudaFuncAttribute attribute, int setting) {
      return cudaFuncSetAttribute(kernel.function, attribute, setting);
    };
    if (const cudaError_t error = set_attribute(cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSharedBytes))
      return error;
    // Prefetched rows need more shared memory than the driver reserves by default.
    if (const cudaError_t error =
            set_attribute(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared))
      return error;
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(value, kernel.function, plan.block, size_t(plan.shared_bytes));
  });
}

// Plans a launch of `layers` layers that fills the device.
cudaError_t make_plan(Kernel& kernel, int device, const CapParams& p, int64_t layers, Plan& plan) {
  const Plan block_plan = plan_for(p.dtype, p.hidden_size, 1, 1);  // only the grid depends on the number of rows
  int processors, blocks;
  if (const cudaError_t error = count_processors(device, processors)) return error;
  if (const cudaError_t error = count_blocks(kernel, device, block_plan, is_wide(p.dtype, p.hidden_size), blocks))
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

// Launches the call. starts_early: the kernel may start before the previous kernel has ended, and waits by itself.
template <int kLayers>
cudaError_t launch_call(const Kernel& kernel, const Plan& plan, Call<kLayers>& call, int64_t layers, bool starts_early,
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
  config.numAttrs = starts_early ? 1 : 0;
  void* argument = &call;
  return cudaLaunchKernelExC(&config, kernel.function, &argument);
}

// Caps all layers, with up to kLayers of them in each launch.
template <int kLayers>
cudaError_t launch_cap(const CapParams* layers, int64_t count, int device, cudaStream_t stream) {
  if (device >= kMaxDevices) return cudaErrorInvalidDevice;
  const CapParams& p = layers[0];
  const bool aligned = std::all_of(layers, layers + count, is_call_aligned);
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
  const bool starts_early = architecture >= AXISCAP_WAITING_ARCHITECTURE;
  for (int64_t begin = 0; begin < count; begin += kLayers) {
    const int64_t launch_layers = std::min<int64_t>(count - begin, kLayers);
    fill_layers(call, layers + begin, launch_layers);
    if (const cudaError_t error = launch_call(kernel, plan, call, launch_layers, starts_early, stream)) return error;
  }
  return cudaSuccess;
}

const char* message_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // clears the error, or an unrelated later call would return it again
  return cudaGetErrorString(error);
}

const char* cap(const CapParams* layers, int64_t count, int device, void* stream) {
  static_assert(kMaxHiddenSize == 24576);
  if (layers[0].hidden_size > kMaxHiddenSize) return "H must be at most 24576 on a GPU";
  const DeviceGuard guard(device);
  if (guard.error()) return message_of(guard.error());
  const bool is_launched_by_layer = count == 1 || is_wide(layers[0].dtype, layers[0].hidden_size);
  const auto launch = is_launched_by_layer ? launch_cap<1> : launch_cap<kMaxLayers>;
  return message_of(launch(layers, count, guard.device(), static_cast<cudaStream_t>(stream)));
}

const char* accumulate(const StatsParams& params, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error()) return message_of(guard.error());
  const StatsPlan plan = stats_plan_for(params);
  const dim3 grid(unsigned(plan.grid), unsigned(params.layers));
  const auto kernel = plan.block_per_slot ? accumulate_rows<true> : accumulate_rows<false>;
  kernel<<<grid, plan.block, 0, static_cast<cudaStream_t>(stream)>>>(params);
  return message_of(cudaPeekAtLastError());
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

constexpr Accelerator kCuda = {"CUDA", cap, accumulate, kMaxHiddenSize, CUDART_VERSION, driver_version};
[[maybe_unused]] const bool registered = (accelerator = &kCuda, true);

}  // namespace
}  // namespace axiscap::cuda
