// The functions with inline PTX.
#pragma once

#include <cstdint>

namespace axiscap::cuda::ptx {

// The first architecture whose kernels are compiled with programmatic dependent launch, in the unit of
// cudaFuncAttributes::ptxVersion.
#define AXISCAP_WAITING_ARCHITECTURE 90

// Waits until the grid before this one has ended, and lets the grid behind this one start.
__device__ inline void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 10 * AXISCAP_WAITING_ARCHITECTURE
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The 32-bit address of shared memory, for the functions below.
__device__ inline uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// Starts a copy of 16 bytes to shared memory. With bytes = 0 it writes 16 zeros and reads nothing.
__device__ inline void copy_async(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(shared), "l"(global), "r"(bytes) : "memory");
}

// Closes a group of copies.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending groups of this thread's copies are unfinished.
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}

__device__ inline uint4 load_shared(uint32_t address) {
  uint4 words;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(address)
               : "memory");
  return words;
}

__device__ inline void store_shared(uint32_t address, uint4 words) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "r"(address), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}

// nvcc splits a plain store of 16 bytes into smaller ones if the kernel also stores single elements.
__device__ inline void store_global(void* pointer, uint4 words) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(pointer), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}

}  // namespace axiscap::cuda::ptx
