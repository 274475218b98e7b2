// The part of the CUDA runtime that csrc/cuda/launch.cu calls, for a machine without a GPU: it says what the arguments
// of the program say of the device and of the kernels, and prints how each kernel is launched.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "axiscap/accelerator.h"

namespace {
int ptx_version, major, carveout = -1;

// Of the kernels, which are registered before main.
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> all;
  return all;
}
}  // namespace

extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? major : 4;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return *version = 12040, cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) carveout = value;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->ptxVersion = ptx_version;
  attributes->binaryVersion = 10 * major;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  return *blocks = 2, cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  return *blocks = 2, cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  bool early = false;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    early = early || (config->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization &&
                      config->attrs[i].val.programmaticStreamSerializationAllowed);
  std::printf("%s, %u x %u blocks, %zu bytes, %d %% shared, %s\n", early ? "early" : "in order", config->gridDim.x,
              config->gridDim.y, config->dynamicSmemBytes, carveout, names().at(kernel).c_str());
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error"; }

// What nvcc's own part of the object calls.
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  names()[host] = name;
}
char __cudaInitModule(void**) { return 0; }
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaSuccess; }
}

// What the kernels were compiled for, the device's major version, and the call: rows, H, layers.
int main(int, char** given) {
  ptx_version = std::atoi(given[1]), major = std::atoi(given[2]);
  alignas(16) static char rows[16];
  alignas(16) static float axes[64], floors[1];
  axiscap::CapParams p;
  p.hidden = p.out = rows, p.rows = std::atoi(given[3]);
  p.hidden_stride = p.out_stride = p.hidden_size = std::atoi(given[4]);
  p.axes = axes, p.floors = floors, p.num_slots = p.directions = 1;
  const std::vector<axiscap::CapParams> layers(std::atoi(given[5]), p);
  for (int call = 0; call < 2; ++call)  // what is remembered is as right as what is asked
    if (const char* error = axiscap::accelerator->cap(layers.data(), int64_t(layers.size()), nullptr))
      return std::puts(error), 1;
}
