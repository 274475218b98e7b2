// Chooses a kernel and a plan for a call and starts it: no allocation, no synchronisation, nothing read back.
#include <algorithm>
#include <atomic>
#include <cstdint>

#include "axiscap/accelerator.h"
#include "axiscap/cap_cuda.cuh"
#include "axiscap/stats_cuda.cuh"

namespace axiscap::cuda {
namespace {

using Kernel = void (*)(Call);

template <class T, Op kOp>
Kernel choose(bool many, bool aligned) {
  if (many) return aligned ? cap_rows<T, kOp, true, true> : cap_rows<T, kOp, true, false>;
  return aligned ? cap_rows<T, kOp, false, true> : cap_rows<T, kOp, false, false>;
}

template <class T>
Kernel choose(Op op, bool many, bool aligned) {
  if (op == Op::kCap) return choose<T, Op::kCap>(many, aligned);
  if (op == Op::kCapResidual) return choose<T, Op::kCapResidual>(many, aligned);
  return choose<T, Op::kNorm>(many, aligned);
}

Kernel choose(DType dtype, Op op, bool many, bool aligned) {
  if (dtype == DType::kFloat32) return choose<float>(op, many, aligned);
  if (dtype == DType::kBFloat16) return choose<__nv_bfloat16>(op, many, aligned);
  return choose<__half>(op, many, aligned);
}

bool on_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kVecBytes == 0; }

bool is_aligned(const CapParams& p) {
  const int64_t bytes = p.dtype == DType::kFloat32 ? 4 : 2;
  const auto rows = [&](const void* base, int64_t stride) {
    return !base || (on_16_bytes(base) && stride * bytes % kVecBytes == 0);
  };
  return p.hidden_size % elements_per_vec(p.dtype) == 0 && rows(p.hidden, p.hidden_stride) &&
         rows(p.residual, p.residual_stride) && rows(p.out, p.out_stride) && rows(p.normed, p.normed_stride) &&
         on_16_bytes(p.axes) && on_16_bytes(p.lifts) && on_16_bytes(p.weight);
}

// What a device is and how many blocks of a kernel one of its processors holds, asked once: it does not change, and
// asking costs more than a launch.
struct Device {
  std::atomic<int> processors{0};
  std::atomic<int> architectures[3][3][2][2] = {};
  std::atomic<int> blocks[3][3][2][2][kMaxThreads / kWarp + 1] = {};
};
constexpr int kMaxDevices = 16;
Device devices[kMaxDevices];

template <class Ask>
cudaError_t remember(std::atomic<int>& known, int& value, Ask ask) {
  value = known.load(std::memory_order_relaxed);
  if (value) return cudaSuccess;
  if (const cudaError_t error = ask(&value)) return error;
  known.store(value, std::memory_order_relaxed);
  return cudaSuccess;
}

cudaError_t start(const CapParams* layers, int64_t count, cudaStream_t stream) {
  const CapParams& p = layers[0];
  bool aligned = true;
  for (int64_t i = 0; i < count; ++i) aligned = aligned && is_aligned(layers[i]);
  const Op op = p.weight ? Op::kNorm : p.residual ? Op::kCapResidual : Op::kCap;
  const bool many = p.directions > 1;
  const Plan shape = plan_for(p.dtype, p.hidden_size, 1, 1);  // all but the grid hangs on dtype and H alone
  const Kernel kernel = choose(p.dtype, op, many, aligned);

  int number, processors, architecture, blocks;
  if (const cudaError_t error = cudaGetDevice(&number)) return error;
  if (number >= kMaxDevices) return cudaErrorInvalidDevice;
  Device& device = devices[number];
  const auto attribute = [&](cudaDeviceAttr wanted) {
    return [=](int* value) { return cudaDeviceGetAttribute(value, wanted, number); };
  };
  if (const cudaError_t error = remember(device.processors, processors, attribute(cudaDevAttrMultiProcessorCount)))
    return error;
  const void* function = reinterpret_cast<const void*>(kernel);
  if (const cudaError_t error =
          remember(device.architectures[int(p.dtype)][int(op)][many][aligned], architecture, [&](int* value) {
            cudaFuncAttributes attributes;
            if (const cudaError_t error = cudaFuncGetAttributes(&attributes, function)) return error;
            *value = attributes.ptxVersion;  // what it was compiled for: the driver may run that on a newer device
            return cudaSuccess;
          }))
    return error;
  if (const cudaError_t error =
          remember(device.blocks[int(p.dtype)][int(op)][many][aligned][shape.block / kWarp], blocks, [&](int* value) {
            const auto set = [&](cudaFuncAttribute which, int to) { return cudaFuncSetAttribute(function, which, to); };
            if (const cudaError_t error = set(cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSharedBytes))
              return error;
            // The rows on their way are what keeps the memory busy, and need more than the driver would split off.
            if (const cudaError_t error =
                    set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared))
              return error;
            return cudaOccupancyMaxActiveBlocksPerMultiprocessor(value, kernel, shape.block, shape.shared_bytes);
          }))
    return error;
  const int64_t resident = std::max<int64_t>(1, kPasses * processors * blocks / count);
  const Plan plan = plan_for(p.dtype, p.hidden_size, p.rows, resident);

  Call call{};
  call.shared = p;
  call.threads_per_row = plan.threads_per_row;
  call.inverse_size = 1.f / float(p.hidden_size);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(unsigned(plan.block));
  config.dynamicSmemBytes = size_t(plan.shared_bytes);
  config.stream = stream;
  config.attrs = &early;
  // Only a kernel that was compiled with the wait may start before the one ahead of it has written its rows.
  config.numAttrs = architecture >= AXISCAP_WAITING_ARCHITECTURE ? 1 : 0;
  for (int64_t begin = 0; begin < count; begin += kMaxLayers) {
    const int64_t some = std::min<int64_t>(count - begin, kMaxLayers);
    for (int64_t i = 0; i < some; ++i) {
      const CapParams& l = layers[begin + i];
      call.layers[i] = {l.hidden, l.out,    l.hidden_stride, l.out_stride, l.axes,
                        l.lifts,  l.floors, l.limits,        l.projections};
    }
    config.gridDim = dim3(unsigned(plan.grid), unsigned(some));
    if (const cudaError_t error = cudaLaunchKernelEx(&config, kernel, call)) return error;
  }
  return cudaSuccess;
}

const char* text_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // a failed launch must not surface again in somebody else's call
  return cudaGetErrorString(error);
}

const char* cap(const CapParams* layers, int64_t count, void* stream) {
  if (layers[0].hidden_size > max_hidden_size(layers[0].dtype))
    return layers[0].dtype == DType::kFloat32 ? "H must be at most 8192 for float32 rows on a GPU"
                                              : "H must be at most 16384 for 16-bit rows on a GPU";
  return text_of(start(layers, count, static_cast<cudaStream_t>(stream)));
}

const char* accumulate(const StatsParams& params, void* stream) {
  const dim3 grid(unsigned(params.num_slots * params.directions), unsigned(params.layers));
  accumulate_rows<<<grid, kStatsThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
  return text_of(cudaPeekAtLastError());
}

int driver() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

constexpr Accelerator kCuda = {"CUDA", cap, accumulate, CUDART_VERSION, driver};
[[maybe_unused]] const bool registered = (accelerator = &kCuda, true);

}  // namespace
}  // namespace axiscap::cuda
