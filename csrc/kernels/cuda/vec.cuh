// The vector type of the kernels: N elements in registers, in the format that they have in memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <type_traits>

#include "kernels/cuda/plan.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/params.h"

namespace axiscap::cuda {

using Fp8 = __nv_fp8_e4m3;

// Conversions between a word of elements and float32.

__device__ inline float low_half(uint32_t word, __nv_bfloat16) { return __uint_as_float(word << 16); }
__device__ inline float high_half(uint32_t word, __nv_bfloat16) { return __uint_as_float(word & 0xffff0000u); }
__device__ inline float low_half(uint32_t word, __half) { return __half2float(__ushort_as_half(uint16_t(word))); }
__device__ inline float high_half(uint32_t word, __half) {
  return __half2float(__ushort_as_half(uint16_t(word >> 16)));
}

__device__ inline uint32_t round_pair(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ inline uint32_t round_pair(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// A number outside the range of fp8 becomes the largest fp8 number. GPUs before sm_89 have no instruction for it.
__device__ inline uint32_t round_pair(float low, float high, Fp8) {
#if __CUDA_ARCH__ >= 890
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
#else
  const auto round = [](float x) {
    const float magnitude = fabsf(x), clamped = fminf(magnitude, kFp8Max);
    const uint32_t bits = __float_as_uint(clamped);
    // Below 2^-6 fp8 numbers are subnormal with steps of 2^-9. These are also the steps of float32 above 2^14, so
    // adding 2^14 rounds to them. From 2^-6 on, the last 20 bits of the mantissa are rounded off, and the exponent's
    // bias changes from 127 to 7.
    const uint32_t code = clamped < 0x1p-6f ? __float_as_uint(clamped + 0x1p14f) - 0x46800000u
                                            : ((bits + 0x7ffffu + (bits >> 20 & 1)) >> 20) - (120u << 3);
    return (__float_as_uint(x) >> 24 & 0x80u) | (magnitude == magnitude ? code : 0x7fu);
  };
  return round(low) | round(high) << 8;
#endif
}

// How a vector is loaded. kCached uses the read-only cache: for axes, lifts and weights, which no kernel writes.
enum class Memory { kGlobal, kCached };

// N elements of T. A load sets the elements behind the end of a row to zero; a store leaves them out.
template <class T, int N>
struct Vec {
  static constexpr bool kFloat = std::is_same_v<T, float>;
  static constexpr int kPerWord = 4 / int(sizeof(T)), kWords = N / kPerWord;
  using Word = std::conditional_t<kFloat, float, uint32_t>;
  using Floats = Vec<float, N>;

  Word words[kWords];

  __device__ static Vec fill(Word word) {
    Vec vec;
#pragma unroll
    for (int w = 0; w < kWords; ++w) vec.words[w] = word;
    return vec;
  }

  // Rounds to the nearest T.
  __device__ static Vec round(const Floats& x) {
    if constexpr (kFloat) {
      return x;
    } else {
      Vec vec;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const int e = w * kPerWord;
        vec.words[w] = round_pair(x[e], x[e + 1], T());
        if constexpr (kPerWord == 4) vec.words[w] |= round_pair(x[e + 2], x[e + 3], T()) << 16;
      }
      return vec;
    }
  }

  __device__ Floats floats() const {
    if constexpr (kFloat) {
      return *this;
    } else {
      Floats x;
#pragma unroll
      for (int e = 0; e < N; ++e) x[e] = (*this)[e];
      return x;
    }
  }

  // Element e in float32.
  __device__ float operator[](int e) const {
    if constexpr (kFloat)
      return words[e];
    else
      return e % 2 ? high_half(words[e / 2], T()) : low_half(words[e / 2], T());
  }

  template <class U = T, class = std::enable_if_t<std::is_same_v<U, float>>>
  __device__ float& operator[](int e) {
    return words[e];
  }

  // Loads elements [offset, offset + N) of a row of `size` elements. In an aligned row all elements of a vector are
  // inside of the row, or all are outside.
  template <Memory kMemory = Memory::kGlobal>
  __device__ static Vec load(const T* row, int offset, int size, bool aligned) {
    Vec vec = fill(0);
    if (aligned) {
      if (offset < size)
#pragma unroll
        for (int w = 0; w < kWords; w += 4)
          vec.set_words(w, load_words<kMemory>(reinterpret_cast<const uint4*>(row + offset) + w / 4));
    } else {
#pragma unroll
      for (int e = 0; e < N; ++e)
        if (offset + e < size) vec.set_bits(e, load_element<kMemory>(row + offset + e));
    }
    return vec;
  }

  __device__ void store(T* row, int offset, int size, bool aligned) const {
    if (aligned) {
      if (offset < size) store_words(row + offset);
    } else {
#pragma unroll
      for (int e = 0; e < N; ++e)
        if (offset + e < size) reinterpret_cast<Bits*>(row)[offset + e] = bits_of(e);
    }
  }

  __device__ static Vec load_shared(uint32_t address) {
    Vec vec;
#pragma unroll
    for (int w = 0; w < kWords; w += 4) vec.set_words(w, ptx::load_shared(address + 4 * w));
    return vec;
  }

  __device__ void store_shared(uint32_t address) const {
#pragma unroll
    for (int w = 0; w < kWords; w += 4) ptx::store_shared(address + 4 * w, get_words(w));
  }

 private:
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, std::conditional_t<sizeof(T) == 2, uint16_t, uint8_t>>;

  template <Memory kMemory>
  __device__ static uint4 load_words(const uint4* from) {
    return kMemory == Memory::kCached ? __ldg(from) : *from;
  }

  template <Memory kMemory>
  __device__ static uint32_t load_element(const T* from) {
    const Bits* bits = reinterpret_cast<const Bits*>(from);
    return kMemory == Memory::kCached ? __ldg(bits) : *bits;
  }

  __device__ void store_words(T* to) const {
    if constexpr (kWords == 1)
      *reinterpret_cast<uint32_t*>(to) = word_bits(0);
    else if constexpr (kWords == 2)
      *reinterpret_cast<uint2*>(to) = make_uint2(word_bits(0), word_bits(1));
    else
      ptx::store_global(to, get_words(0));
  }

  __device__ uint32_t word_bits(int w) const {
    if constexpr (kFloat)
      return __float_as_uint(words[w]);
    else
      return words[w];
  }

  __device__ Bits bits_of(int e) const { return Bits(word_bits(e / kPerWord) >> 8 * int(sizeof(T)) * (e % kPerWord)); }

  __device__ void set_bits(int e, uint32_t bits) {
    if constexpr (kFloat)
      words[e] = __uint_as_float(bits);
    else
      words[e / kPerWord] |= bits << 8 * int(sizeof(T)) * (e % kPerWord);
  }

  __device__ uint4 get_words(int w) const {
    return make_uint4(word_bits(w), word_bits(w + 1), word_bits(w + 2), word_bits(w + 3));
  }

  __device__ void set_words(int w, uint4 four) {
    const uint32_t bits[] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if constexpr (kFloat)
        words[w + i] = __uint_as_float(bits[i]);
      else
        words[w + i] = bits[i];
  }
};

}  // namespace axiscap::cuda
