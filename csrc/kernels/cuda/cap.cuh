// The cap on a GPU: one row loop for every op. A row is read once, with 16-byte accesses, while the rows before it are
// worked on; summed in float32 in an order that depends on H and dtype alone; and stored only if it fired (the norm
// always stores).
#pragma once

#include <cfloat>
#include <type_traits>

#include "kernels/cuda/rows.cuh"

namespace axiscap::cuda {

// What a row is, and where its correction goes.
enum class Op {
  kCap,          // x = hidden
  kCapResidual,  // x = hidden + residual; the correction goes into residual alone
  kNorm,         // x = hidden + residual, which residual becomes, capped or not; then the norm of it
  kNormFp8,      // the same, and the norm in fp8
};

template <Op kOp>
inline constexpr bool is_norm = kOp == Op::kNorm || kOp == Op::kNormFp8;

template <class T>
using Part = float[kVecsPerThread][kPer<T>];  // a thread's part of a row

// From this architecture on a kernel is compiled with the wait below, as the runtime's attributes of a function state
// it.
#define AXISCAP_WAITING_ARCHITECTURE 90

__device__ inline void wait_for_the_kernel_before() {
#if __CUDA_ARCH__ >= 10 * AXISCAP_WAITING_ARCHITECTURE
  // Programmatic dependent launch: this grid may start while the one before it drains, and lets the next do the same.
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// This thread's part of one direction. kKeeps: in registers, from row to row while the slot stays the same; otherwise
// it is read from the caches, a vector at a time, wherever it is needed.
template <class T, bool kKeeps, bool kAligned>
struct Direction {
  float kept[kKeeps ? kVecsPerThread : 1][kPer<T>] = {};
  float floor = -INFINITY, limit = FLT_MAX;  // the limit is finite, so that it refuses infinity
  const float* axis = nullptr;
  const float* lift = nullptr;
  int until = 0;  // elements that the axis has: none before the first slot
  int32_t slot = kNoSlot;

  template <class Rows>
  __device__ void turn_to(const Rows& rows, int32_t wanted, int directions, int k) {
    if (wanted == kNoSlot || (kKeeps && wanted == slot)) return;
    slot = wanted;
    const int64_t at = int64_t(slot) * directions + k;
    floor = rows.layer.floors ? __ldg(rows.layer.floors + at) : -INFINITY;
    limit = rows.layer.limits ? fminf(__ldg(rows.layer.limits + at), FLT_MAX) : FLT_MAX;
    axis = rows.layer.axes + at * rows.size;
    lift = rows.layer.lifts ? rows.layer.lifts + at * rows.size : axis;
    until = rows.size;
    if constexpr (kKeeps)
#pragma unroll
      for (int v = 0; v < kVecsPerThread; ++v) load_axis<kAligned>(axis, rows.at(v), until, kept[v]);
  }

  template <class Rows>
  __device__ void get(const Rows& rows, int v, float (&out)[kPer<T>]) const {
    if constexpr (kKeeps) {
#pragma unroll
      for (int e = 0; e < kPer<T>; ++e) out[e] = kept[v][e];
    } else {
      asm volatile("" ::: "memory");
      load_axis<kAligned>(axis, rows.at(v), until, out);
    }
  }

  // What the row is corrected along: wanted only where it fired, and not kept; nor is it taken from what is kept of the
  // axis where v is no constant.
  template <bool kConstant = true, class Rows>
  __device__ void get_lift(const Rows& rows, int v, float (&out)[kPer<T>]) const {
    if (kKeeps && kConstant && lift == axis) return get(rows, v, out);
    asm volatile("" ::: "memory");
    load_axis<kAligned>(lift, rows.at(v), until, out);
  }

  // <x, axis>, this thread's part of it.
  template <class Rows>
  __device__ float dot(const Rows& rows, const Part<T>& x) const {
    float sum[kVecsPerThread], part[kPer<T>];
#pragma unroll
    for (int v = 0; v < kVecsPerThread; ++v) {
      get(rows, v, part);
      sum[v] = x[v][0] * part[0];
#pragma unroll
      for (int e = 1; e < kPer<T>; ++e) sum[v] = fmaf(x[v][e], part[e], sum[v]);
    }
    static_assert(kVecsPerThread == 4);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }

  // x += much * lift
  template <class Rows>
  __device__ void add(const Rows& rows, float much, Part<T>& x) const {
    float part[kPer<T>];
#pragma unroll
    for (int v = 0; v < kVecsPerThread; ++v) {
      get_lift(rows, v, part);
#pragma unroll
      for (int e = 0; e < kPer<T>; ++e) x[v][e] = fmaf(part[e], much, x[v][e]);
    }
  }
};

// What base becomes, a vector of what the correction goes into, in float32. A lone direction's correction is made here
// and now, so that the row takes no registers while it is summed over.
template <bool kMany, bool kConstant, bool kAligned, class T, int kSources, class Along>
__device__ inline void correct(const Rows<T, kSources, kAligned>& rows, const Pack& base, const Part<T>& x,
                               const Along& direction, float correction, int v, float (&y)[kPer<T>]) {
  const Pack other = kMany && kSources == 2 ? rows.get(0, v) : Pack{};
  if constexpr (!kMany) direction.template get_lift<kConstant>(rows, v, y);
#pragma unroll
  for (int e = 0; e < kPer<T>; ++e) {
    const float was = element<T>(base, e);
    y[e] = !kMany          ? fmaf(y[e], correction, was)
           : kSources == 1 ? x[v][e]
                           : was + (x[v][e] - (element<T>(other, e) + was));
  }
}

// The row at hand, corrected where it fired.
template <bool kMany, bool kAligned, class T, int kSources, class Along>
__device__ inline void store_capped(const Rows<T, kSources, kAligned>& rows, const Part<T>& x, const Along& direction,
                                    float correction, bool fired) {
  T* out = static_cast<T*>(rows.layer.out) + rows.index * rows.layer.out_stride;
#pragma unroll
  for (int v = 0; v < kVecsPerThread; ++v) {
    const Pack base = rows.get(kSources - 1, v);
    float y[kPer<T>];
    correct<kMany, true>(rows, base, x, direction, correction, v, y);
    store<T, kAligned>(out, rows.at(v), rows.size, fired ? rounded<T>(y) : base);
  }
}

// Whether a correction of so much may take an element of a finite row out of T's range.
template <class T>
__device__ inline bool may_overflow(float correction) {
  return std::is_same_v<T, __half> || correction > kLargeCorrection;
}

// Whether this thread's part of the row is finite once it is corrected and rounded to T. Element by element a vector at
// a time, read again, since a row's registers are few there.
template <Op kOp, bool kMany, class T, int kSources, bool kAligned, class Along>
__device__ inline bool fits(const Rows<T, kSources, kAligned>& rows, const Part<T>& x, const Along& direction,
                            float correction) {
  constexpr bool kInRegisters = kMany || kAligned || is_norm<kOp>;
  constexpr int kUnroll = kInRegisters ? kVecsPerThread : 1;
  bool finite = true;
#pragma unroll kUnroll
  for (int v = 0; v < kVecsPerThread; ++v) {
    if (!kInRegisters) asm volatile("" : "+r"(v));  // nothing of this is worth a register elsewhere
    float y[kPer<T>];
    Pack sum;
    if constexpr (is_norm<kOp>) {
      sum = rounded<T>(x[v]);
    } else {
      correct<kMany, kInRegisters>(rows, rows.get(kSources - 1, v), x, direction, correction, v, y);
      sum = rounded<T>(y);
    }
#pragma unroll
    for (int e = 0; e < kPer<T>; ++e) finite = finite && fabsf(element<T>(sum, e)) <= FLT_MAX;
  }
  return finite;
}

// What the norm is divided by before it is rounded to fp8, known to a row's threads once its largest element is.
__device__ inline float scale_of_row(const CapParams& p, int64_t row, float largest, bool tells) {
  if (p.scale) return __ldg(p.scale);
  const float scale = fmaxf(largest / kFp8Max, kFp8LeastScale);
  if (tells) p.scales[row] = scale;
  return scale;
}

// The row as it is now, and its norm.
template <bool kFp8, bool kAligned, class T, int kSources>
__device__ inline void store_normed(const Rows<T, kSources, kAligned>& rows, const Part<T>& x, float inverse_size,
                                    int& turn) {
  const CapParams& p = rows.p;
  T* out = static_cast<T*>(rows.layer.out) + rows.index * rows.layer.out_stride;
  const int64_t normed_at = rows.index * p.normed_stride;
  const int size = rows.real() ? rows.size : 0;
  float squares = 0, largest = 0;
  Pack sums[kVecsPerThread];
  constexpr int kUnroll =
      kFp8 && !kAligned ? 1 : kVecsPerThread;  // element by element, a vector takes registers enough
#pragma unroll
  for (int v = 0; v < kVecsPerThread; ++v) {
    sums[v] = rounded<T>(x[v]);
    store<T, kAligned>(out, rows.at(v), size, sums[v]);
    if (kFp8) rows.keep(0, v, sums[v]);  // what comes takes more registers
#pragma unroll
    for (int e = 0; e < kPer<T>; ++e) squares = fmaf(element<T>(sums[v], e), element<T>(sums[v], e), squares);
  }
  const float scale = rsqrtf(fmaf(rows.group.sum(squares, turn), inverse_size, p.eps));
#pragma unroll kUnroll
  for (int v = 0; v < kVecsPerThread; ++v) {
    asm volatile("" ::: "memory");  // one vector's weights at a time: all of them would not fit the registers
    const Pack weight = load_weight<T, kAligned>(static_cast<const T*>(p.weight), rows.at(v), rows.size);
    const Pack sum = kFp8 ? rows.get(0, v) : sums[v];
    float y[kPer<T>];
#pragma unroll
    for (int e = 0; e < kPer<T>; ++e) y[e] = element<T>(sum, e) * scale * (element<T>(weight, e) + p.weight_bias);
    const Pack normed = rounded<T>(y);
    if constexpr (kFp8) {
      rows.keep(0, v, normed);
#pragma unroll
      for (int e = 0; e < kPer<T>; ++e) largest = fmaxf(largest, fabsf(element<T>(normed, e)));
    } else {
      store<T, kAligned>(static_cast<T*>(p.normed) + normed_at, rows.at(v), size, normed);
    }
  }
  if constexpr (kFp8) {
    if (p.scales) largest = rows.group.largest(largest, turn);
    const float inverse = 1.f / scale_of_row(p, rows.index, largest, rows.real() && rows.group.lane == 0);
#pragma unroll kUnroll
    for (int v = 0; v < kVecsPerThread; ++v)
      store_fp8<T, kAligned>(static_cast<uint8_t*>(p.normed) + normed_at, rows.at(v), size, rows.get(0, v), inverse);
  }
}

// kMany: more than one direction. kLayers: those that the call has room for.
template <class T, Op kOp, bool kMany, bool kAligned, int kLayers>
__global__ void __launch_bounds__(kMaxThreads, 1) cap_rows(const __grid_constant__ Call<kLayers> call) {
  // Of several directions each is read in its turn; two streams element by element need the registers for themselves.
  constexpr bool kKeeps = !kMany && (kOp == Op::kCap || kAligned);
  const CapParams& p = call.shared;
  // By an index even where there is one layer: with its fields as constants, ptxas spills where rows are unaligned.
  const Layer& layer = call.layers[kLayers == 1 && kAligned ? 0 : blockIdx.y];
  const int directions = kMany ? int(p.directions) : 1;
  const bool copies = kOp == Op::kCap && layer.out && layer.out != layer.hidden;
  const Group group(call.threads_per_row);
  wait_for_the_kernel_before();

  Rows<T, kOp == Op::kCap ? 1 : 2, kAligned> rows(p, layer, group, is_norm<kOp> || copies);
  Direction<T, kKeeps, kAligned> direction;
  Part<T> x;
  int turn = 0;  // of the block's partial sums
  while (rows.any()) {
    const int32_t slot = rows.slot(), slot_to_come = rows.slot_of(rows.index + rows.kPlaces * rows.step);
    const bool active = slot != kNoSlot, tells = rows.real() && group.lane == 0;
    const auto project_on = [&](int k) {
      if (!kKeeps) direction.turn_to(rows, slot, directions, k);
      return group.sum(direction.dot(rows, x), turn);
    };
    const auto tell = [&](auto* all, int k, auto what) {
      if (tells && all) all[rows.index * directions + k] = what;
    };
    if (kKeeps) direction.turn_to(rows, slot, directions, 0);
    rows.wait();
    rows.read(x);

    // The row as it came, on every axis.
    bool finite = active, below = false, fired = false, large = false;
    float projection, correction = 0;
#pragma unroll 1
    for (int k = 0; k < directions; ++k) {
      projection = project_on(k);
      finite = finite && fabsf(projection) <= direction.limit;
      below = below || (active && projection < direction.floor);
      tell(layer.projections, k, projection);
      tell(p.fired, k, uint8_t(0));
    }
    if (is_norm<kOp> && !kAligned) rows.read(x);  // again: it would take registers from the sum
    // The cap: direction after direction, each on what the ones before have left.
    if (kMany ? __any_sync(0xffffffffu, below) : below) {
#pragma unroll 1
      for (int k = 0; k < directions; ++k) {
        if (kMany) projection = project_on(k);
        const float shortfall = direction.floor - projection;
        if (active && !isfinite(projection)) finite = false;  // an infinite shortfall does not fit, below
        if (!active || !finite || !(shortfall > 0)) continue;
        if (kMany || is_norm<kOp>) direction.add(rows, shortfall, x);
        correction = shortfall;
        large = large || may_overflow<T>(shortfall);
        fired = true;
        tell(p.fired, k, uint8_t(1));
      }
    }
    if (__any_sync(0xffffffffu, large)) {
      const bool over = fired && !fits<kOp, kMany>(rows, x, direction, correction);
      if (group.sum(over ? 1.f : 0.f, turn) > 0) finite = false;
    }
    if (!finite) {
      for (int k = 0; k < directions; ++k) {
        tell(layer.projections, k, NAN);
        tell(p.fired, k, uint8_t(0));
      }
      if ((kMany || is_norm<kOp>) && fired) rows.read(x);
      fired = false;
    }

    if constexpr (is_norm<kOp>)
      store_normed<kOp == Op::kNormFp8>(rows, x, call.inverse_size, turn);
    else if (fired || (copies && rows.real()))
      store_capped<kMany>(rows, x, direction, correction, fired);
    rows.next(slot_to_come);
  }
}

}  // namespace axiscap::cuda
