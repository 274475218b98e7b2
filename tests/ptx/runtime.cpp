// The part of the CUDA runtime that csrc/launchers/cuda.cu calls, for a machine without a GPU: it says what the
// arguments of the program say of the device and of the kernels, and prints how each kernel is launched.
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
// The devices that there are, the current one, and how often it was set.
constexpr int kDevices = 20;
int current = 0, switches = 0;
std::vector<axiscap::CapParams> layers;
bool aligned;  // what the launcher is to find

int64_t launched = 0;  // layers of this call so far

// Whether the launch's layer i has the lifts, targets and limits of its own. The layers stand behind the 16 bytes of
// the call itself, in ten words each (test_ptx.py has the sizes).
bool has_its_bank(const void* argument, int64_t i) {
  const void* words[10];
  const char* begin = static_cast<const char*>(argument) + sizeof(axiscap::CapParams) + 16;
  std::memcpy(words, begin + sizeof words * i, sizeof words);
  const axiscap::CapParams& p = layers[launched + i];
  return p.lifts && words[5] == p.lifts && words[7] == p.targets && words[8] == p.norm_limits;
}

// Whether the call's own parameters, which stand behind those of the caller, are those of its plan.
bool is_launched_as_planned(const void* argument) {
  const axiscap::CapParams& p = layers[0];
  struct {
    int32_t threads_per_row;
    float inverse_size;
    bool aligned;
  } found;
  std::memcpy(&found, static_cast<const char*>(argument) + sizeof p, sizeof found);
  return found.threads_per_row == axiscap::cuda::plan_for(p.dtype, p.hidden_size, p.rows, 1).threads_per_row &&
         found.inverse_size == 1.f / float(p.hidden_size) && found.aligned == aligned;
}

// Of the kernels, which are registered before main.
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> all;
  return all;
}
}  // namespace

extern "C" {
cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  ++switches;
  if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
  return current = device, cudaSuccess;
}
// Device 0 has four processors of two blocks, device 5 nine of three; a block of 288 threads stands alone on one.
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
  return *blocks = threads == 288 ? 1 : 2 + current % 2, cudaSuccess;
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
              config->gridDim.y, config->dynamicSmemBytes, carveout, names().at(kernel).c_str());
  int banks = 0;
  for (unsigned i = 0; i < config->gridDim.y; ++i) banks += has_its_bank(arguments[0], i);
  launched += config->gridDim.y;
  if (banks) std::printf(", %d banks", banks);
  if (!is_launched_as_planned(arguments[0])) std::printf(", not as planned");
  std::printf(current ? ", on device %d\n" : "\n", current);
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  std::printf("statistics, on device %d\n", current);
  return cudaSuccess;
}
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
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3 grid, dim3 block, void** arguments, size_t bytes,
                               cudaStream_t stream) {
  return cudaLaunchKernel(nullptr, grid, block, arguments, bytes, stream);
}
}

namespace {
// The numbers of a list with commas.
std::vector<int> numbers(const char* text) {
  std::vector<int> all;
  std::stringstream list(text);
  for (std::string one; std::getline(list, one, ',');) all.push_back(std::stoi(one));
  return all;
}

// Fills `layers` with a call: the layers' number, rows and H, the op, a pointer or stride of the last layer that no
// vector divides ("-": all are aligned; "directions": there are two), and whether layers have lifts, targets and
// limits.
void make_call(int count, int rows, int size, const std::string& op, const std::string& odd, bool bank) {
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
  for (size_t i = 0; i < layers.size() && bank; ++i) {
    layers[i].lifts = reinterpret_cast<float*>(memory + 512 + 16 * i);
    layers[i].targets = layers[i].lifts + 1, layers[i].norm_limits = layers[i].lifts + 2;
  }
  axiscap::CapParams& last = layers.back();
  const auto shift = [](auto& pointer) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(uintptr_t(pointer) + 4);
  };
  if (odd == "hidden") shift(last.hidden);
  if (odd == "residual") shift(last.residual);
  if (odd == "out") shift(last.out);
  if (odd == "axes") shift(last.axes);
  if (odd == "lifts") shift(last.lifts);
  if (odd == "weight") shift(last.weight);
  if (odd == "normed") last.normed = memory + 257;
  if (odd == "hidden_stride") last.hidden_stride += 1;
  if (odd == "residual_stride") last.residual_stride += 1;
  if (odd == "out_stride") last.out_stride += 1;
  if (odd == "normed_stride") last.normed_stride += 1;
  if (odd == "directions")
    for (axiscap::CapParams& layer : layers) layer.directions = 2;
  aligned = odd == "-" || odd == "directions";
  launched = 0;
}
}  // namespace

// The arguments are what the kernels were compiled for, the device's major version, and the call: rows, H, layers, the
// op ("statistics" is one of them), what is not aligned, whether layers have lifts, targets and limits, the device to
// launch on, and the current one. H and device may be lists: a call for each. Returns 1 behind the text of an error,
// and 2 where another device is current in the end, or was set for nothing.
int main(int, char** given) {
  ptx_version = std::atoi(given[1]), major = std::atoi(given[2]);
  const std::string op = given[6];
  const int before = std::atoi(given[10]);
  current = before;
  int status = 0;
  for (int call = 0; call < 2; ++call)  // what is remembered is as right as what is asked
    for (int size : numbers(given[4]))
      for (int device : numbers(given[9])) {
        make_call(std::atoi(given[5]), std::atoi(given[3]), size, op, given[7], std::atoi(given[8]));
        const int switched = switches;
        const char* error = op == "statistics"
                                ? axiscap::accelerator->accumulate({}, device, nullptr)
                                : axiscap::accelerator->cap(layers.data(), int64_t(layers.size()), device, nullptr);
        if (error) std::puts(error), status = 1;
        const bool stays = device < 0 || device == before;
        if (current != before || (stays && switches != switched)) return 2;
      }
  return status;
}
