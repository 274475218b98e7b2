// Chooses a kernel and a plan for a call and starts it: no allocation, no synchronisation, nothing read back.
#include <algorithm>
#include <atomic>
#include <cstdint>

#include "kernels/cuda/stats.cuh"
#include "kernels/cuda/wide.cuh"
#include "launchers/accelerator.h"

namespace axiscap::cuda {
namespace {

constexpr int kMaxDevices = 16;

// A kernel, and what the devices said of it, asked once: it does not change, and asking costs more than a launch.
struct Compiled {
  const void* kernel;
  std::atomic<int> architecture[kMaxDevices] = {};
  std::atomic<int> blocks[kMaxDevices][kMaxSharedBytes / kSharedUnit + 1] = {};  // on a processor, by shared memory
};

template <class T, Op kOp, bool kMany, bool kAligned, int kLayers>
Compiled rows{reinterpret_cast<const void*>(cap_rows<T, kOp, kMany, kAligned, kLayers>)};
template <class T, Op kOp>
Compiled wide{reinterpret_cast<const void*>(cap_wide<T, kOp>)};

struct Shape {
  Op op;
  bool wide, many, aligned, layers;  // more than one of directions, of layers
};

template <class T, Op kOp, int kLayers>
Compiled& choose(const Shape& s) {
  if (s.many) return s.aligned ? rows<T, kOp, true, true, kLayers> : rows<T, kOp, true, false, kLayers>;
  return s.aligned ? rows<T, kOp, false, true, kLayers> : rows<T, kOp, false, false, kLayers>;
}

template <class T>
Compiled& choose(const Shape& s) {
  if (s.op == Op::kCapResidual) return s.wide ? wide<T, Op::kCapResidual> : choose<T, Op::kCapResidual, 1>(s);
  if (s.op == Op::kNorm) return s.wide ? wide<T, Op::kNorm> : choose<T, Op::kNorm, 1>(s);
  if (s.op == Op::kNormFp8) return s.wide ? wide<T, Op::kNormFp8> : choose<T, Op::kNormFp8, 1>(s);
  if (s.wide) return wide<T, Op::kCap>;
  return s.layers ? choose<T, Op::kCap, kMaxLayers>(s) : choose<T, Op::kCap, 1>(s);
}

Compiled& choose(DType dtype, const Shape& shape) {
  if (dtype == DType::kFloat32) return choose<float>(shape);
  if (dtype == DType::kBFloat16) return choose<__nv_bfloat16>(shape);
  return choose<__half>(shape);
}

bool on_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kVecBytes == 0; }

bool is_aligned(const CapParams& p) {
  const int64_t bytes = p.dtype == DType::kFloat32 ? 4 : 2;
  const auto rows = [&](const void* base, int64_t stride) {
    return !base || (on_16_bytes(base) && stride * bytes % kVecBytes == 0);
  };
  // In fp8 a vector's elements are a byte each.
  const bool normed = p.is_fp8() ? uintptr_t(p.normed) % elements_per_vec(p.dtype) == 0 &&
                                       p.normed_stride % elements_per_vec(p.dtype) == 0
                                 : rows(p.normed, p.normed_stride);
  return p.hidden_size % elements_per_vec(p.dtype) == 0 && rows(p.hidden, p.hidden_stride) &&
         rows(p.residual, p.residual_stride) && rows(p.out, p.out_stride) && normed && on_16_bytes(p.axes) &&
         on_16_bytes(p.lifts) && on_16_bytes(p.weight);
}

std::atomic<int> processors_of[kMaxDevices];

template <class Ask>
cudaError_t remember(std::atomic<int>& known, int& value, Ask ask) {
  value = known.load(std::memory_order_relaxed);
  if (value) return cudaSuccess;
  if (const cudaError_t error = ask(&value)) return error;
  known.store(value, std::memory_order_relaxed);
  return cudaSuccess;
}

template <int kLayers>
cudaError_t start(const CapParams* layers, int64_t count, cudaStream_t stream) {
  const CapParams& p = layers[0];
  bool aligned = true;
  for (int64_t i = 0; i < count; ++i) aligned = aligned && is_aligned(layers[i]);
  const Op op = p.weight ? p.is_fp8() ? Op::kNormFp8 : Op::kNorm : p.residual ? Op::kCapResidual : Op::kCap;
  const Plan shape = plan_for(p.dtype, p.hidden_size, 1, 1);  // all but the grid hangs on dtype and H alone
  Compiled& compiled = choose(p.dtype, {op, is_wide(p.dtype, p.hidden_size), p.directions > 1, aligned, kLayers > 1});

  int number, processors, architecture, blocks;
  if (const cudaError_t error = cudaGetDevice(&number)) return error;
  if (number >= kMaxDevices) return cudaErrorInvalidDevice;
  if (const cudaError_t error = remember(processors_of[number], processors, [&](int* value) {
        return cudaDeviceGetAttribute(value, cudaDevAttrMultiProcessorCount, number);
      }))
    return error;
  if (const cudaError_t error = remember(compiled.architecture[number], architecture, [&](int* value) {
        cudaFuncAttributes attributes;
        if (const cudaError_t error = cudaFuncGetAttributes(&attributes, compiled.kernel)) return error;
        *value = attributes.ptxVersion;  // what it was compiled for: the driver may run that on a newer device
        return cudaSuccess;
      }))
    return error;
  if (const cudaError_t error =
          remember(compiled.blocks[number][shape.shared_bytes / kSharedUnit], blocks, [&](int* value) {
            const auto set = [&](cudaFuncAttribute which, int to) {
              return cudaFuncSetAttribute(compiled.kernel, which, to);
            };
            if (const cudaError_t error = set(cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSharedBytes))
              return error;
            // The rows on their way are what keeps the memory busy, and need more than the driver would split off.
            if (const cudaError_t error =
                    set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared))
              return error;
            return cudaOccupancyMaxActiveBlocksPerMultiprocessor(value, compiled.kernel, shape.block,
                                                                 size_t(shape.shared_bytes));
          }))
    return error;
  const int64_t resident = std::max<int64_t>(1, kPasses * processors * blocks / count);
  const Plan plan = plan_for(p.dtype, p.hidden_size, p.rows, resident);

  Call<kLayers> call{};
  call.shared = p;
  call.threads_per_row = plan.threads_per_row;
  call.inverse_size = 1.f / float(p.hidden_size);
  call.aligned = aligned;
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
  void* argument = &call;
  for (int64_t begin = 0; begin < count; begin += kLayers) {
    const int64_t some = std::min<int64_t>(count - begin, kLayers);
    for (int64_t i = 0; i < some; ++i) {
      const CapParams& l = layers[begin + i];
      call.layers[i] = {l.hidden, l.out,    l.hidden_stride, l.out_stride, l.axes,
                        l.lifts,  l.floors, l.limits,        l.projections};
    }
    config.gridDim = dim3(unsigned(plan.grid), unsigned(some));
    if (const cudaError_t error = cudaLaunchKernelExC(&config, compiled.kernel, &argument)) return error;
  }
  return cudaSuccess;
}

const char* text_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // a failed launch must not surface again in somebody else's call
  return cudaGetErrorString(error);
}

const char* cap(const CapParams* layers, int64_t count, void* stream) {
  static_assert(kMaxHiddenSize == 24576);
  if (layers[0].hidden_size > kMaxHiddenSize) return "H must be at most 24576 on a GPU";
  const bool one = count == 1 || is_wide(layers[0].dtype, layers[0].hidden_size);
  const auto to = static_cast<cudaStream_t>(stream);
  return text_of(one ? start<1>(layers, count, to) : start<kMaxLayers>(layers, count, to));
}

const char* accumulate(const StatsParams& params, void* stream) {
  const StatsPlan plan = stats_plan_for(params);
  const dim3 grid(unsigned(plan.grid), unsigned(params.layers));
  const auto kernel = plan.whole ? accumulate_rows<true> : accumulate_rows<false>;
  kernel<<<grid, plan.block, 0, static_cast<cudaStream_t>(stream)>>>(params);
  return text_of(cudaPeekAtLastError());
}

int driver() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

constexpr Accelerator kCuda = {"CUDA", cap, accumulate, kMaxHiddenSize, CUDART_VERSION, driver};
[[maybe_unused]] const bool registered = (accelerator = &kCuda, true);

}  // namespace
}  // namespace axiscap::cuda
