// Rows on a GPU: how the threads that share one hold it, read it ahead of its turn, sum over it and write it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "kernels/cuda/plan.h"
#include "kernels/params.h"

namespace axiscap::cuda {

// Layers of one launch: their streams differ, all else of `call` is shared. In one parameter block, which a launch
// copies: capturable, and nothing to allocate. One layer has a block for itself, since a decoding step copies little
// else.
inline constexpr int kMaxLayers = 48;

struct Layer {
  const void* hidden;
  void* out;
  int64_t hidden_stride;
  int64_t out_stride;
  const float* axes;
  const float* lifts;
  const float* floors;
  const float* limits;
  float* projections;
};

template <int kLayers>
struct Call {
  CapParams shared;
  int32_t threads_per_row;
  float inverse_size;  // 1 / H
  bool aligned;        // all rows and vectors, to kVecBytes
  Layer layers[kLayers];
};

// Sixteen bytes of a row, and their elements as float32.
struct Pack {
  uint32_t words[4];
};

template <class T>
inline constexpr int kPer = kVecBytes / sizeof(T);

__device__ inline float lower(uint32_t word, __nv_bfloat16) { return __uint_as_float(word << 16); }
__device__ inline float upper(uint32_t word, __nv_bfloat16) { return __uint_as_float(word & 0xffff0000u); }
__device__ inline float lower(uint32_t word, __half) { return __half2float(__ushort_as_half(uint16_t(word))); }
__device__ inline float upper(uint32_t word, __half) { return __half2float(__ushort_as_half(uint16_t(word >> 16))); }
__device__ inline uint32_t round_pair(float a, float b, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ inline uint32_t round_pair(float a, float b, __half) {
  const __half2 pair = __floats2half2_rn(a, b);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <class T>
__device__ inline float element(const Pack& pack, int e) {
  if constexpr (sizeof(T) == 4)
    return __uint_as_float(pack.words[e]);
  else
    return e % 2 ? upper(pack.words[e / 2], T()) : lower(pack.words[e / 2], T());
}

template <class T>
__device__ inline Pack rounded(const float (&x)[kPer<T>]) {
  Pack pack;
#pragma unroll
  for (int w = 0; w < 4; ++w)
    if constexpr (sizeof(T) == 4)
      pack.words[w] = __float_as_uint(x[w]);
    else
      pack.words[w] = round_pair(x[2 * w], x[2 * w + 1], T());
  return pack;
}

// Elements [at, at + kPer) of the row of `size` elements at `row`, element by element; those behind its end are 0.
template <class T>
__device__ inline Pack gather(const T* row, int at, int size) {
  Pack pack{};
#pragma unroll
  for (int e = 0; e < kPer<T>; ++e)
    if (at + e < size) {
      if constexpr (sizeof(T) == 4)
        pack.words[e] = reinterpret_cast<const uint32_t*>(row)[at + e];
      else
        pack.words[e / 2] |= uint32_t(reinterpret_cast<const uint16_t*>(row)[at + e]) << 16 * (e % 2);
    }
  return pack;
}

template <class T, bool kAligned>
__device__ inline void store(T* row, int at, int size, const Pack& pack) {
  if constexpr (kAligned) {
    if (at < size)
      *reinterpret_cast<uint4*>(row + at) = make_uint4(pack.words[0], pack.words[1], pack.words[2], pack.words[3]);
  } else {
#pragma unroll
    for (int e = 0; e < kPer<T>; ++e)
      if (at + e < size) {
        if constexpr (sizeof(T) == 4)
          reinterpret_cast<uint32_t*>(row)[at + e] = pack.words[e];
        else
          reinterpret_cast<uint16_t*>(row)[at + e] = uint16_t(pack.words[e / 2] >> 16 * (e % 2));
      }
  }
}

// Two numbers in fp8, those beyond its range as its largest.
__device__ inline uint32_t in_fp8(float low, float high) {
#if __CUDA_ARCH__ >= 890
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
#else
  // The processor has no such instruction.
  const auto one = [](float x) {
    const float size = fabsf(x), within = fminf(size, kFp8Max);
    const uint32_t bits = __float_as_uint(within);
    // Below the least normal number, 2^-6, steps are of 2^-9: those of float32 from 2^14 on. Else the last 20 bits of
    // the mantissa go, to the nearest, and the exponent counts from 2^-7.
    const uint32_t code = within < 0x1p-6f ? __float_as_uint(within + 0x1p14f) - 0x46800000u
                                           : ((bits + 0x7ffffu + (bits >> 20 & 1)) >> 20) - (120u << 3);
    return (__float_as_uint(x) >> 24 & 0x80u) | (size == size ? code : 0x7fu);
  };
  return one(low) | one(high) << 8;
#endif
}

// A vector's elements times `much`, in fp8: a byte each.
template <class T, bool kAligned>
__device__ inline void store_fp8(uint8_t* row, int at, int size, const Pack& pack, float much) {
  uint32_t words[2] = {};
#pragma unroll
  for (int e = 0; e < kPer<T>; e += 2) {
    const uint32_t two = in_fp8(element<T>(pack, e) * much, element<T>(pack, e + 1) * much);
    if constexpr (kAligned) {
      words[e / 4] |= two << 8 * (e % 4);
    } else {
      if (at + e < size) row[at + e] = uint8_t(two);
      if (at + e + 1 < size) row[at + e + 1] = uint8_t(two >> 8);
    }
  }
  if (!kAligned || at >= size) return;
  if constexpr (kPer<T> == 8)
    *reinterpret_cast<uint2*>(row + at) = make_uint2(words[0], words[1]);
  else
    *reinterpret_cast<uint32_t*>(row + at) = words[0];
}

// The norm's weights: like an axis, they stay in the caches.
template <class T, bool kAligned>
__device__ inline Pack load_weight(const T* weight, int at, int size) {
  if constexpr (!kAligned) return gather(weight, at, size);
  uint4 four = make_uint4(0, 0, 0, 0);
  if (at < size) four = __ldg(reinterpret_cast<const uint4*>(weight + at));
  return {{four.x, four.y, four.z, four.w}};
}

// kCount elements of an axis, which is read again and again: it stays in the caches.
template <bool kAligned, int kCount>
__device__ inline void load_axis(const float* axis, int at, int size, float (&out)[kCount]) {
  if constexpr (kAligned) {
#pragma unroll
    for (int e = 0; e < kCount; e += 4) {
      float4 four = make_float4(0, 0, 0, 0);
      if (at < size) four = __ldg(reinterpret_cast<const float4*>(axis + at + e));
      out[e] = four.x, out[e + 1] = four.y, out[e + 2] = four.z, out[e + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e) out[e] = at + e < size ? __ldg(axis + at + e) : 0.f;
  }
}

// The threads that share a row: a part of a warp, a warp, or all warps of the block.
struct Group {
  int threads, lane, index;

  __device__ explicit Group(int threads_per_row)
      : threads(threads_per_row), lane(threadIdx.x % threads_per_row), index(threadIdx.x / threads_per_row) {}

  // Every thread gets the sum over its group, added in one fixed order. All threads of the block call it.
  __device__ float sum(float value, int& turn) const {
    return join(value, turn, [](float a, float b) { return a + b; });
  }

  // The same with the largest, of what is not negative.
  __device__ float largest(float value, int& turn) const {
    return join(value, turn, [](float a, float b) { return fmaxf(a, b); });
  }

 private:
  static constexpr int kMaxWarps = kMaxThreads / kWarp;

  // Two sets of the warps' parts, by turns: whoever writes one again has passed the barrier behind its last reading.
  __device__ static float (&parts(int turn)) [kMaxWarps] {
    __shared__ float partial[2][kMaxWarps];
    return partial[turn];
  }

  template <class Join>
  __device__ float join(float value, int& turn, Join with) const {
    const auto over = [&](int lanes) {
#pragma unroll
      for (int offset = kWarp / 2; offset > 0; offset /= 2)
        if (offset < lanes) value = with(value, __shfl_xor_sync(0xffffffffu, value, offset));
    };
    if (threads < kWarp) {
      for (int offset = threads / 2; offset > 0; offset /= 2)
        value = with(value, __shfl_xor_sync(0xffffffffu, value, offset));
      return value;
    }
    over(kWarp);
    if (threads == kWarp) return value;
    turn ^= 1;
    if (lane % kWarp == 0) parts(turn)[lane / kWarp] = value;
    __syncthreads();
    value = lane % kMaxWarps < threads / kWarp ? parts(turn)[lane % kMaxWarps] : 0.f;
    over(kMaxWarps);
    return value;
  }
};

// The slot of a row, if it has one that is in the bank.
__device__ inline int32_t slot_of(const CapParams& p, int64_t row) {
  const int32_t slot = row >= p.rows ? kNoSlot : p.slots ? p.slots[row] : 0;
  return uint32_t(slot) < uint64_t(p.num_slots) ? slot : kNoSlot;
}

// The rows of a group, one after the other. Those that follow are on their way into shared memory while one is worked
// on; a thread copies the vectors that it will use and no others, so that nothing has to wait for the block.
// kSources: 1, the row is hidden; 2, it is hidden + residual.
template <class T, int kSources, bool kAligned>
struct Rows {
  static constexpr int kVecs = kVecsPerThread, kPlaces = kPacksAhead / (kVecs * kSources);  // rows in shared memory

  const CapParams& p;
  const Layer& layer;
  const Group& group;
  const int size;
  const bool all;               // of the rows are read, with a slot or without
  const uint32_t apart, begin;  // bytes in shared memory: between vectors, and to this thread's first
  uint32_t place = 0;           // bytes from there to the row at hand
  int64_t index, step;
  int32_t slots[kPlaces];

  __device__ Rows(const CapParams& p, const Layer& layer, const Group& group, bool all)
      : p(p), layer(layer), group(group), size(int(p.hidden_size)), all(all), apart(blockDim.x * kVecBytes), begin([] {
          extern __shared__ uint4 ring[];
          return uint32_t(__cvta_generic_to_shared(ring + threadIdx.x));
        }()) {
    const int at_once = blockDim.x / group.threads;
    index = int64_t(blockIdx.x) * at_once + group.index;
    step = int64_t(gridDim.x) * at_once;
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      slots[i] = slot_of(index + i * step);
      send_for(index + i * step, slots[i]);
    }
  }

  // Whether any row of the block is left: its threads leave together.
  __device__ bool any() const { return index - group.index < p.rows; }
  __device__ bool real() const { return index < p.rows; }
  __device__ int32_t slot() const { return slots[0]; }
  __device__ int at(int v) const { return (v * group.threads + group.lane) * kPer<T>; }

  __device__ int32_t slot_of(int64_t row) const { return cuda::slot_of(p, row); }

  // Until the row at hand is here.
  __device__ void wait() const {
    if constexpr (kAligned) asm volatile("cp.async.wait_group %0;" : : "n"(kPlaces - 1) : "memory");
  }

  __device__ Pack get(int source, int v) const {
    Pack pack;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(pack.words[0]), "=r"(pack.words[1]), "=r"(pack.words[2]), "=r"(pack.words[3])
                 : "r"(place_of(source, v))
                 : "memory");
    return pack;
  }

  // Keeps what was made of the row at hand in place of it, for this thread to get again.
  __device__ void keep(int source, int v, const Pack& pack) const {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
                 :
                 : "r"(place_of(source, v)), "r"(pack.words[0]), "r"(pack.words[1]), "r"(pack.words[2]),
                   "r"(pack.words[3])
                 : "memory");
  }

  // The row at hand, in float32.
  __device__ void read(float (&x)[kVecs][kPer<T>]) const {
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      const Pack hidden = get(0, v), residual = kSources == 2 ? get(1, v) : Pack{};
#pragma unroll
      for (int e = 0; e < kPer<T>; ++e) {
        x[v][e] = element<T>(hidden, e);
        if (kSources == 2) x[v][e] += element<T>(residual, e);
      }
    }
  }

  // Done with the row at hand: its place is for the last of those to come.
  __device__ void next(int32_t slot_to_come) {
    send_for(index + kPlaces * step, slot_to_come);
#pragma unroll
    for (int i = 1; i < kPlaces; ++i) slots[i - 1] = slots[i];
    slots[kPlaces - 1] = slot_to_come;
    index += step;
  }

 private:
  __device__ uint32_t place_of(int source, int v) const { return begin + place + apart * uint32_t(source * kVecs + v); }

  // A row that is not wanted is not read: it is all zeros, like what lies behind the end of one.
  __device__ void send_for(int64_t row, int32_t slot) {
    const int until = (all ? row < p.rows : slot != kNoSlot) ? size : 0;
    constexpr int kUnroll = kAligned ? kVecs : 1;  // element by element, one vector takes registers enough
#pragma unroll
    for (int s = 0; s < kSources; ++s) {
      const T* from =
          static_cast<const T*>(s ? p.residual : layer.hidden) + row * (s ? p.residual_stride : layer.hidden_stride);
#pragma unroll kUnroll
      for (int v = 0; v < kVecs; ++v) {
        if constexpr (kAligned) {
          asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                       :
                       : "r"(place_of(s, v)), "l"(from + at(v)), "r"(at(v) < until ? kVecBytes : 0)
                       : "memory");
        } else {
          keep(s, v, gather(from, at(v), until));
        }
      }
    }
    if constexpr (kAligned) asm volatile("cp.async.commit_group;" ::: "memory");
    if constexpr (kPlaces > 1) place = apart * kVecs * kSources - place;
  }
};

}  // namespace axiscap::cuda
