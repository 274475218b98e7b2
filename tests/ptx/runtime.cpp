// Replaces the functions of the CUDA runtime that csrc/launchers/cuda.cu calls, for a machine without a GPU. The
// program describes the device and the call in its arguments, and prints each launch.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/cuda/plan.h"
#include "launchers/accelerator.h"

namespace {
int ptx_version, major, carveout = -1;
constexpr int kDevices = 20;
int current_device = 0, device_switches = 0;
std::vector<axiscap::CapParams> layers;
bool is_aligned;              // whether the call is aligned
int64_t launched_layers = 0;  // layers of this call in earlier launches

// Whether layer i of the launch has its own lifts, targets and limits. The layers are behind the 16 bytes of the call's
// own members, in ten words each (Layer in csrc/kernels/cuda/rows.cuh).
bool has_its_bank(const void* argument, int64_t i) {
  const void* words[10];
  const char* begin = static_cast<const char*>(argument) + sizeof(axiscap::CapParams) + 16;
  std::memcpy(words, begin + sizeof words * i, sizeof words);
  const axiscap::CapParams& p = layers[launched_layers + i];
  return p.lifts && words[5] == p.lifts && words[7] == p.targets && words[8] == p.norm_limits;
}

// Whether the members of Call behind its CapParams are those of the plan.
bool is_launched_as_planned(const void* argument) {
  const axiscap::CapParams& p = layers[0];
  struct {
    int32_t threads_per_row;
    float inverse_size;
    bool aligned;
  } call;
  std::memcpy(&call, static_cast<const char*>(argument) + sizeof p, sizeof call);
  return call.threads_per_row == axiscap::cuda::plan_for(p.dtype, p.hidden_size, p.rows, 1).threads_per_row &&
         call.inverse_size == 1.f / float(p.hidden_size) && call.aligned == is_aligned;
}

// The names of the kernels by their host functions. They are registered before main.
std::map<const void*, std::string>& kernel_names() {
  static std::map<const void*, std::string> names;
  return names;
}
}  // namespace

extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  ++device_switches;
  if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
  return current_device = device, cudaSuccess;
}
// Device 0 has four processors for two blocks each, device 5 has nine for three. A processor holds one block of 288
// threads.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? major : 4 + device;
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
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads, size_t) {
  return *blocks = threads == 288 ? 1 : 2 + current_device % 2, cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* kernel, int threads,
                                                                   size_t bytes, unsigned) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, bytes);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  bool early = false;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    early = early || (config->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization &&
                      config->attrs[i].val.programmaticStreamSerializationAllowed);
  std::printf("%s, %u x %u blocks, %zu bytes, %d %% shared, %s", early ? "early" : "in order", config->gridDim.x,
              config->gridDim.y, config->dynamicSmemBytes, carveout, kernel_names().at(kernel).c_str());
  int banks = 0;  // layers with their own bank
  for (unsigned i = 0; i < config->gridDim.y; ++i) banks += has_its_bank(arguments[0], i);
  launched_layers += config->gridDim.y;
  if (banks) std::printf(", %d banks", banks);
  if (!is_launched_as_planned(arguments[0])) std::printf(", not as planned");
  std::printf(current_device ? ", on device %d\n" : "\n", current_device);
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  std::printf("statistics, on device %d\n", current_device);
  return cudaSuccess;
}
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error"; }

// The functions that nvcc's generated code calls.
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernel_names()[host] = name;
}
char __cudaInitModule(void**) { return 0; }
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3 grid, dim3 block, void** arguments, size_t bytes,
                               cudaStream_t stream) {
  return cudaLaunchKernel(nullptr, grid, block, arguments, bytes, stream);
}
}

namespace {
std::vector<int> parse_list(const char* text) {
  std::vector<int> numbers;
  std::stringstream list(text);
  for (std::string number; std::getline(list, number, ',');) numbers.push_back(std::stoi(number));
  return numbers;
}

// Fills `layers` with a call on `count` layers. odd: the pointer or stride of the last layer that is not aligned; "-":
// all are aligned; "directions": all are aligned, with two directions. has_bank: layers have lifts, targets and limits.
void make_call(int count, int rows, int size, const std::string& op, const std::string& odd, bool has_bank) {
  alignas(16) static char memory[4096];
  alignas(16) static float floors[1], scale[1];
  axiscap::CapParams p;
  p.hidden = memory, p.out = op == "cap" ? memory : memory + 64, p.rows = rows;
  p.hidden_stride = p.residual_stride = p.out_stride = p.normed_stride = p.hidden_size = size;
  p.axes = reinterpret_cast<float*>(memory + 128), p.floors = floors, p.num_slots = p.directions = 1;
  if (op != "cap") p.residual = memory + 64;
  if (op == "norm" || op == "norm_fp8") p.weight = memory + 192, p.normed = memory + 256;
  if (op == "norm_fp8") p.scale = scale;
  layers.assign(count, p);
  for (size_t i = 0; i < layers.size() && has_bank; ++i) {
    layers[i].lifts = reinterpret_cast<float*>(memory + 512 + 16 * i);
    layers[i].targets = layers[i].lifts + 1, layers[i].norm_limits = layers[i].lifts + 2;
  }
  axiscap::CapParams& last = layers.back();
  const auto misalign = [](auto& pointer) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(uintptr_t(pointer) + 4);
  };
  if (odd == "hidden") misalign(last.hidden);
  if (odd == "residual") misalign(last.residual);
  if (odd == "out") misalign(last.out);
  if (odd == "axes") misalign(last.axes);
  if (odd == "lifts") misalign(last.lifts);
  if (odd == "weight") misalign(last.weight);
  if (odd == "normed") last.normed = memory + 257;
  if (odd == "hidden_stride") last.hidden_stride += 1;
  if (odd == "residual_stride") last.residual_stride += 1;
  if (odd == "out_stride") last.out_stride += 1;
  if (odd == "normed_stride") last.normed_stride += 1;
  if (odd == "directions")
    for (axiscap::CapParams& layer : layers) layer.directions = 2;
  is_aligned = odd == "-" || odd == "directions";
  launched_layers = 0;
}
}  // namespace

// The arguments: the architecture of the kernels, the major version of the device, and the call: rows, H, layers, op
// (or "statistics"), odd and has_bank of make_call, the device to launch on, and the current device. H and device may
// be lists with commas: a call for each. Prints errors and returns 1. Returns 2 if another device is current at the
// end, or if the device was set without need.
int main(int, char** arguments) {
  ptx_version = std::atoi(arguments[1]), major = std::atoi(arguments[2]);
  const std::string op = arguments[6];
  const int initial_device = std::atoi(arguments[10]);
  current_device = initial_device;
  int status = 0;
  for (int call = 0; call < 2; ++call)  // the second call reads the caches of the launcher
    for (int size : parse_list(arguments[4]))
      for (int device : parse_list(arguments[9])) {
        make_call(std::atoi(arguments[5]), std::atoi(arguments[3]), size, op, arguments[7], std::atoi(arguments[8]));
        const int initial_switches = device_switches;
        const char* error = op == "statistics"
                                ? axiscap::accelerator->accumulate({}, device, nullptr)
                                : axiscap::accelerator->cap(layers.data(), int64_t(layers.size()), device, nullptr);
        if (error) std::puts(error), status = 1;
        const bool is_current = device < 0 || device == initial_device;
        if (current_device != initial_device || (is_current && device_switches != initial_switches)) return 2;
      }
  return status;
}
