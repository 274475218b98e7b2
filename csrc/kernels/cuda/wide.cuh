// Rows that are too wide for the registers of a block: one lies in shared memory, in float32, while all of the block's
// threads work on it, each on vectors of its own. A block asks for a row when it is done with the one before, and reads
// again what it stores beside: a model of such a width has much else to do.
#pragma once

#include "kernels/cuda/cap.cuh"

namespace axiscap::cuda {

template <class T>
__device__ inline Pack load(const T* row, int at, int size, bool aligned) {
  if (!aligned) return gather(row, at, size);
  const uint4 four = *reinterpret_cast<const uint4*>(row + at);
  return {{four.x, four.y, four.z, four.w}};
}

template <class T>
__device__ inline void put(T* row, int at, int size, const Pack& pack, bool aligned) {
  if (!aligned) return store<T, false>(row, at, size, pack);
  // In so many words: the compiler takes the vector apart where it stands beside single elements.
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(row + at), "r"(pack.words[0]), "r"(pack.words[1]), "r"(pack.words[2]), "r"(pack.words[3])
               : "memory");
}

// Of an axis or a lift.
template <int kCount>
__device__ inline void load_vector(const float* axis, int at, int size, bool aligned, float (&out)[kCount]) {
  if (aligned)
    load_axis<true>(axis, at, size, out);
  else
    load_axis<false>(axis, at, size, out);
}

// A vector of the row that lies in shared memory. What is behind the row's end is 0, and has its place there.
template <class T>
struct Held {
  float* x;

  __device__ void get(int at, float (&out)[kPer<T>]) const {
#pragma unroll
    for (int e = 0; e < kPer<T>; e += 4) {
      const float4 four = *reinterpret_cast<const float4*>(x + at + e);
      out[e] = four.x, out[e + 1] = four.y, out[e + 2] = four.z, out[e + 3] = four.w;
    }
  }

  __device__ void set(int at, const float (&in)[kPer<T>]) const {
#pragma unroll
    for (int e = 0; e < kPer<T>; e += 4)
      *reinterpret_cast<float4*>(x + at + e) = make_float4(in[e], in[e + 1], in[e + 2], in[e + 3]);
  }
};

template <class T, Op kOp>
__global__ void __launch_bounds__(kMaxThreads, 1) cap_wide(const __grid_constant__ Call<1> call) {
  constexpr bool kSum = kOp != Op::kCap;
  const CapParams& p = call.shared;
  const Layer& layer = call.layers[0];
  const int size = int(p.hidden_size), directions = int(p.directions);
  const bool aligned = call.aligned;
  const bool copies = kOp == Op::kCap && layer.out && layer.out != layer.hidden;
  const Group group(kMaxThreads);
  extern __shared__ float4 row_in_shared_memory[];
  const Held<T> held{reinterpret_cast<float*>(row_in_shared_memory)};
  // This thread's vectors.
  const auto each = [&](auto what) {
    for (int at = threadIdx.x * kPer<T>; at < size; at += kMaxThreads * kPer<T>) what(at);
  };
  wait_for_the_kernel_before();

  int turn = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const int32_t slot = slot_of(p, row);
    const bool active = slot != kNoSlot;
    const T* hidden = static_cast<const T*>(layer.hidden) + row * layer.hidden_stride;
    const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
    T* out = static_cast<T*>(layer.out) + row * layer.out_stride;
    const T* base = kSum ? residual : hidden;  // what the correction goes into
    const auto read = [&](int at) {
      const Pack one = load(hidden, at, size, aligned), other = kSum ? load(residual, at, size, aligned) : Pack{};
      float x[kPer<T>];
#pragma unroll
      for (int e = 0; e < kPer<T>; ++e) x[e] = element<T>(one, e) + (kSum ? element<T>(other, e) : 0.f);
      held.set(at, x);
    };
    const auto tell = [&](auto* all, int k, auto what) {
      if (group.lane == 0 && all) all[row * directions + k] = what;
    };
    const auto of_slot = [&](int k) { return int64_t(slot) * directions + k; };
    const auto floor_of = [&](int k) { return layer.floors ? __ldg(layer.floors + of_slot(k)) : -INFINITY; };
    const auto project_on = [&](int k) {
      const float* axis = layer.axes + of_slot(k) * size;
      float sum = 0;
      each([&](int at) {
        float x[kPer<T>], part[kPer<T>];
        held.get(at, x);
        load_vector(axis, at, size, aligned, part);
#pragma unroll
        for (int e = 0; e < kPer<T>; ++e) sum = fmaf(x[e], part[e], sum);
      });
      return group.sum(sum, turn);
    };

    // The row as it came, on every axis.
    bool finite = active, below = false, fired = false, large = false;
    if (active || is_norm<kOp>) each(read);
    for (int k = 0; k < directions && active; ++k) {
      const float projection = project_on(k);
      const float limit = layer.limits ? fminf(__ldg(layer.limits + of_slot(k)), FLT_MAX) : FLT_MAX;
      finite = finite && fabsf(projection) <= limit;
      below = below || projection < floor_of(k);
      tell(layer.projections, k, projection);
      tell(p.fired, k, uint8_t(0));
    }
    // The cap: direction after direction, each on what the ones before have left.
    for (int k = 0; k < directions && below && finite; ++k) {
      const float projection = project_on(k), shortfall = floor_of(k) - projection;
      if (!isfinite(projection)) finite = false;
      if (!finite || !(shortfall > 0)) continue;
      const float* lift = (layer.lifts ? layer.lifts : layer.axes) + of_slot(k) * size;
      each([&](int at) {
        float x[kPer<T>], part[kPer<T>];
        held.get(at, x);
        load_vector(lift, at, size, aligned, part);
#pragma unroll
        for (int e = 0; e < kPer<T>; ++e) x[e] = fmaf(part[e], shortfall, x[e]);
        held.set(at, x);
      });
      large = large || may_overflow<T>(shortfall);
      fired = true;
      tell(p.fired, k, uint8_t(1));
    }
    // What base becomes.
    const auto corrected = [&](int at) {
      float y[kPer<T>];
      held.get(at, y);
      if (kOp == Op::kCapResidual) {
        const Pack was = load(residual, at, size, aligned), other = load(hidden, at, size, aligned);
#pragma unroll
        for (int e = 0; e < kPer<T>; ++e)
          y[e] = element<T>(was, e) + (y[e] - (element<T>(other, e) + element<T>(was, e)));
      }
      return rounded<T>(y);
    };
    if (large) {
      bool over = false;
      each([&](int at) {
        const Pack pack = corrected(at);
#pragma unroll
        for (int e = 0; e < kPer<T>; ++e) over = over || !(fabsf(element<T>(pack, e)) <= FLT_MAX);
      });
      if (group.sum(over ? 1.f : 0.f, turn) > 0) finite = false;
    }
    if (!finite) {
      for (int k = 0; k < directions; ++k) {
        tell(layer.projections, k, NAN);
        tell(p.fired, k, uint8_t(0));
      }
      if (is_norm<kOp> && fired) each(read);
      fired = false;
    }

    if constexpr (is_norm<kOp>) {
      const int64_t normed_at = row * p.normed_stride;
      float squares = 0, largest = 0;
      each([&](int at) {
        const Pack pack = corrected(at);
        put(out, at, size, pack, aligned);
        float x[kPer<T>];
#pragma unroll
        for (int e = 0; e < kPer<T>; ++e) {
          x[e] = element<T>(pack, e);
          squares = fmaf(x[e], x[e], squares);
        }
        held.set(at, x);
      });
      const float scale = rsqrtf(fmaf(group.sum(squares, turn), call.inverse_size, p.eps));
      each([&](int at) {
        const Pack weight = load(static_cast<const T*>(p.weight), at, size, aligned);
        float y[kPer<T>];
        held.get(at, y);
#pragma unroll
        for (int e = 0; e < kPer<T>; ++e) y[e] = y[e] * scale * (element<T>(weight, e) + p.weight_bias);
        const Pack normed = rounded<T>(y);
        if constexpr (kOp == Op::kNorm) {
          put(static_cast<T*>(p.normed) + normed_at, at, size, normed, aligned);
        } else {
#pragma unroll
          for (int e = 0; e < kPer<T>; ++e) largest = fmaxf(largest, fabsf(y[e] = element<T>(normed, e)));
          held.set(at, y);
        }
      });
      if constexpr (kOp == Op::kNormFp8) {
        if (p.scales) largest = group.largest(largest, turn);
        const float inverse = 1.f / scale_of_row(p, row, largest, group.lane == 0);
        each([&](int at) {
          float y[kPer<T>];
          held.get(at, y);
          uint8_t* normed = static_cast<uint8_t*>(p.normed) + normed_at;
          const Pack pack = rounded<T>(y);
          if (aligned)
            store_fp8<T, true>(normed, at, size, pack, inverse);
          else
            store_fp8<T, false>(normed, at, size, pack, inverse);
        });
      }
    } else if (fired || copies) {
      each([&](int at) { put(out, at, size, fired ? corrected(at) : load(base, at, size, aligned), aligned); });
    }
  }
}

}  // namespace axiscap::cuda
