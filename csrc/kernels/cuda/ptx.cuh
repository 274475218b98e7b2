// Every instruction that is written in PTX, by name.
#pragma once

#include <cstdint>

namespace axiscap::cuda::ptx {

// From this architecture on a kernel is compiled with programmatic dependent launch. The runtime states a kernel's
// architecture in the same numbers.
#define AXISCAP_WAITING_ARCHITECTURE 90

// This grid may start while the one before it drains, and lets the next do the same.
__device__ inline void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 10 * AXISCAP_WAITING_ARCHITECTURE
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The address of shared memory as the instructions below take it.
__device__ inline uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// Starts to copy `bytes` (16 or 0) to shared memory and fills the rest of 16 with zeros.
__device__ inline void copy_async(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(shared), "l"(global), "r"(bytes) : "memory");
}

// Closes a group of copies.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until no more than kPending groups of this thread are under way.
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

// The compiler splits a plain store of 16 bytes that stands beside stores of elements.
__device__ inline void store_global(void* pointer, uint4 words) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(pointer), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}

}  // namespace axiscap::cuda::ptx
