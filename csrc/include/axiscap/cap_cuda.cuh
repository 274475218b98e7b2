// The cap on a GPU: one row loop for every op. A row is read once, with 16-byte accesses, into the registers of the
// threads that share it; summed in float32 in an order that depends on H and dtype alone; corrected in registers; and
// stored only if it fired (the norm always stores).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "axiscap/params.h"
#include "axiscap/plan.h"

namespace axiscap::cuda {

// Layers of one launch: their streams differ, all else of `call` is shared. In one parameter block, which a launch
// copies: capturable, and nothing to allocate.
inline constexpr int kMaxLayers = 64;

struct Layer {
  const void* hidden;
  void* out;
  int64_t hidden_stride;
  int64_t out_stride;
  const float* axes;
  const float* floors;
  float* projections;
};

struct Call {
  CapParams shared;
  int32_t threads_per_row;
  float inverse_size;  // 1 / H
  Layer layers[kMaxLayers];
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

// Elements [at, at + kPer) of the row of `size` at base + offset; those behind its end are 0. Rows pass through: the
// first-level cache is left to the axis.
template <class T, bool kAligned>
__device__ inline Pack load(const void* base, int64_t offset, int at, int size) {
  const T* row = static_cast<const T*>(base) + offset;
  Pack pack{};
  if constexpr (kAligned) {
    if (at < size)
      asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(pack.words[0]), "=r"(pack.words[1]), "=r"(pack.words[2]), "=r"(pack.words[3])
                   : "l"(row + at)
                   : "memory");
  } else {
#pragma unroll
    for (int e = 0; e < kPer<T>; ++e)
      if (at + e < size) {
        if constexpr (sizeof(T) == 4)
          pack.words[e] = reinterpret_cast<const uint32_t*>(row)[at + e];
        else
          pack.words[e / 2] |= uint32_t(reinterpret_cast<const uint16_t*>(row)[at + e]) << 16 * (e % 2);
      }
  }
  return pack;
}

template <class T, bool kAligned>
__device__ inline void store(void* base, int64_t offset, int at, int size, const Pack& pack) {
  T* row = static_cast<T*>(base) + offset;
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
    if (threads < kWarp) {
      for (int offset = threads / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
      return value;
    }
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    if (threads == kWarp) return value;
    // Two sets of partial sums, by turns: whoever writes one again has passed the barrier behind its last reading.
    constexpr int kMaxWarps = kMaxThreads / kWarp;
    __shared__ float partial[2][kMaxWarps];
    turn ^= 1;
    if (lane % kWarp == 0) partial[turn][lane / kWarp] = value;
    __syncthreads();
    value = lane % kMaxWarps < threads / kWarp ? partial[turn][lane % kMaxWarps] : 0.f;
#pragma unroll
    for (int offset = kMaxWarps / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
  }
};

// What a row is, and where its correction goes.
enum class Op {
  kCap,          // x = hidden
  kCapResidual,  // x = hidden + residual; the correction goes into residual alone
  kNorm,         // x = hidden + residual, which residual becomes, capped or not; then the norm of it
};

__device__ inline void wait_for_the_kernel_before() {
#if __CUDA_ARCH__ >= 900
  // Programmatic dependent launch: this grid may start while the one before it drains, and lets the next do the same.
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// kMany: more than one direction. Their axes are read for each row; a single one is kept in registers from row to row.
template <class T, Op kOp, bool kMany, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads) cap_rows(const __grid_constant__ Call call) {
  constexpr int kN = kPer<T>, kVecs = kVecsPerThread;
  // A norm element by element needs the registers for itself.
  constexpr bool kKeepsAxis = !kMany && (kOp != Op::kNorm || kAligned);
  const CapParams& p = call.shared;
  const Layer& layer = call.layers[blockIdx.y];
  const int size = int(p.hidden_size), directions = kMany ? int(p.directions) : 1;
  const bool copies = layer.out && layer.out != (p.residual ? p.residual : layer.hidden);
  const Group group(call.threads_per_row);
  const int rows_at_once = blockDim.x / group.threads;
  const auto at = [&](int v) { return (v * group.threads + group.lane) * kN; };
  wait_for_the_kernel_before();

  float axis[kVecs][kN];
  int64_t held = -1;
  int turn = 0;  // of the block's partial sums
  for (int64_t first = int64_t(blockIdx.x) * rows_at_once; first < p.rows; first += int64_t(gridDim.x) * rows_at_once) {
    const int64_t index = first + group.index;
    const bool real = index < p.rows;
    const int32_t slot = !real ? kNoSlot : p.slots ? p.slots[index] : 0;
    const bool active = slot >= 0 && slot < p.num_slots;
    const float* floors = active && layer.floors ? layer.floors + slot * directions : nullptr;
    float* projections =
        real && group.lane == 0 && layer.projections ? layer.projections + index * directions : nullptr;
    uint8_t* fired_at = real && group.lane == 0 && p.fired ? p.fired + index * directions : nullptr;

    // This thread's part of the row as the axes see it: kVecs vectors, a group's width apart.
    float x[kVecs][kN];
    const auto hidden = [&](int v) {
      return load<T, kAligned>(layer.hidden, index * layer.hidden_stride, at(v), size);
    };
    const auto residual = [&](int v) { return load<T, kAligned>(p.residual, index * p.residual_stride, at(v), size); };
    const auto read_row = [&] {
#pragma unroll
      for (int v = 0; v < kVecs; ++v) {
        const Pack first = hidden(v), second = kOp == Op::kCap ? Pack{} : residual(v);
#pragma unroll
        for (int e = 0; e < kN; ++e) {
          x[v][e] = element<T>(first, e);
          if (kOp != Op::kCap) x[v][e] += element<T>(second, e);
        }
      }
    };
    const auto project_on = [&](int k) {
      const int64_t wanted = int64_t(slot) * directions + k;
      if (active && (!kKeepsAxis || wanted != held))
#pragma unroll
        for (int v = 0; v < kVecs; ++v) load_axis<kAligned>(layer.axes + wanted * size, at(v), size, axis[v]);
      held = wanted;
      float sum = 0;
#pragma unroll
      for (int v = 0; active && v < kVecs; ++v) {
        float part = 0;
#pragma unroll
        for (int e = 0; e < kN; ++e) part = fmaf(x[v][e], axis[v][e], part);
        sum += part;
      }
      return group.sum(sum, turn);
    };

    // The row as it came, on every axis.
    if (active || (real && kOp == Op::kNorm)) read_row();
    bool finite = active, below = false, fired = false;
    float projection, correction;
#pragma unroll 1
    for (int k = 0; k < directions; ++k) {
      projection = project_on(k);
      finite = finite && isfinite(projection);
      below = below || (floors && projection < floors[k]);
      if (projections) projections[k] = projection;
      if (fired_at) fired_at[k] = 0;
    }
    // The cap: direction after direction, each on what the ones before have left.
    if (__any_sync(0xffffffffu, below)) {
#pragma unroll 1
      for (int k = 0; k < directions; ++k) {
        if (kMany) projection = project_on(k);
        correction = floors ? floors[k] - projection : 0.f;
        const bool fires = correction > 0;
        if (active && (!isfinite(projection) || (fires && !isfinite(correction)))) finite = false;
        if (!fires || !finite) continue;
        if (fired_at) fired_at[k] = 1;
        if (kMany || kOp != Op::kCapResidual)
#pragma unroll
          for (int v = 0; v < kVecs; ++v)
#pragma unroll
            for (int e = 0; e < kN; ++e) x[v][e] = fmaf(axis[v][e], correction, x[v][e]);
        fired = true;
      }
    }
    if (!finite) {
      for (int k = 0; k < directions; ++k) {
        if (projections) projections[k] = NAN;
        if (fired_at) fired_at[k] = 0;
      }
      if (kOp == Op::kNorm && fired) read_row();
      fired = false;
    }

    if constexpr (kOp != Op::kNorm) {
      if (fired || (real && copies))
#pragma unroll
        for (int v = 0; v < kVecs; ++v) {
          float y[kN];
          // What a row was is read again from the caches where it is needed: it would take registers from all the rest.
          if constexpr (kOp == Op::kCapResidual) {
            const Pack first = kMany ? hidden(v) : Pack{}, second = residual(v);
#pragma unroll
            for (int e = 0; e < kN; ++e) {
              const float base = element<T>(second, e);
              y[e] = kMany ? base + (x[v][e] - (element<T>(first, e) + base)) : fmaf(axis[v][e], correction, base);
            }
          } else {
#pragma unroll
            for (int e = 0; e < kN; ++e) y[e] = x[v][e];
          }
          store<T, kAligned>(layer.out, index * layer.out_stride, at(v), size, fired ? rounded<T>(y) : hidden(v));
        }
    } else {
      float squares = 0;
      Pack sums[kVecs];
#pragma unroll
      for (int v = 0; v < kVecs; ++v) {
        sums[v] = rounded<T>(x[v]);
        if (real) store<T, kAligned>(layer.out, index * layer.out_stride, at(v), size, sums[v]);
#pragma unroll
        for (int e = 0; e < kN; ++e) squares = fmaf(element<T>(sums[v], e), element<T>(sums[v], e), squares);
      }
      const float scale = rsqrtf(fmaf(group.sum(squares, turn), call.inverse_size, p.eps));
#pragma unroll
      for (int v = 0; v < kVecs; ++v) {
        asm volatile("" ::: "memory");  // one vector's weights at a time: all of them would not fit the registers
        const Pack weight = load<T, kAligned>(p.weight, 0, at(v), size);
        float normed[kN];
#pragma unroll
        for (int e = 0; e < kN; ++e)
          normed[e] = element<T>(sums[v], e) * scale * (element<T>(weight, e) + p.weight_bias);
        if (real) store<T, kAligned>(p.normed, index * p.normed_stride, at(v), size, rounded<T>(normed));
      }
    }
  }
}

}  // namespace axiscap::cuda
