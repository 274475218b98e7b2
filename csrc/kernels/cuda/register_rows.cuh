// Aligned rows that fit the registers of their threads. While the threads work on a row, the next rows are prefetched
// into shared memory. A thread prefetches exactly the vectors that it uses, so no barrier is needed.
#pragma once

#include "kernels/cuda/rows.cuh"

namespace axiscap::cuda {

// With one direction the axis stays in registers until the slot changes. With kAnyDirections the axes are loaded from
// the caches for every row.
template <class T, Op kOp, bool kAnyDirections>
struct RegisterRows : Rows<T, kOp> {
  using Base = Rows<T, kOp>;
  using Base::direction;
  using Base::group;
  using Base::kNorm;
  using Base::kTwoStreams;
  using Base::kVecSize;
  using Base::layer;
  using Base::offset;
  using Base::p;
  using Base::row;
  using Base::size;
  using Base::step;
  using typename Base::Floats;
  using typename Base::Packed;

  static constexpr bool kOneDirection = !kAnyDirections;
  static constexpr int kVecs = kVecsPerThread, kSources = kTwoStreams ? 2 : 1;
  static constexpr int kSharedRows = kVecsAhead / (kVecs * kSources);  // rows in shared memory
  // With one direction the correction is computed where the row is written: x needs no registers after its projection.
  static constexpr bool kCorrectsLate = !kAnyDirections && !kNorm;

  template <int kLayers>
  __device__ explicit RegisterRows(const Call<kLayers>& call)
      : Base(call, call.layers[kLayers == 1 ? 0 : blockIdx.y]), vec_bytes_(blockDim.x * kVecBytes), shared_begin_([] {
          extern __shared__ uint4 dynamic_shared[];
          return ptx::shared_address(dynamic_shared + threadIdx.x);
        }()) {
#pragma unroll
    for (int i = 0; i < kSharedRows; ++i) {
      slots_[i] = Base::slot_of(row + i * step);
      prefetch(row + i * step, slots_[i]);
    }
  }

  __device__ static constexpr bool is_aligned() { return true; }
  __device__ bool is_active() const { return slots_[0] != kNoSlot; }
  __device__ int directions() const { return kAnyDirections ? int(p.directions) : 1; }

  // Waits for the current row and loads it. Reads the slot of the row that `next` will prefetch.
  __device__ void load() {
    next_slot_ = Base::slot_of(row + kSharedRows * step);
    if (!kAnyDirections) select(0);
    ptx::wait_copies<kSharedRows - 1>();
    restore();
  }

  // Loads the incoming row.
  __device__ void restore() {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) x_[i] = incoming(i);
  }

  // This thread's part of the sum of squares of the incoming row.
  __device__ float squares() const {
    float sum = 0;
#pragma unroll 1  // unrolled over x_, cap_residual in bfloat16 takes 127 registers (sm_90) instead of 109
    for (int i = 0; i < kVecs; ++i) {
      const Floats x = incoming(i);
      sum = dot(x, x, sum);
    }
    return sum;
  }

  // <x, axis of direction k>
  __device__ float project(int k) {
    if (kAnyDirections) select(k);
    float sums[kVecs];
#pragma unroll
    for (int i = 0; i < kVecs; ++i) sums[i] = dot(x_[i], axis(i), -0.f);  // -0 + a product is the product
    static_assert(kVecs == 4);
    return group.sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }

  // x += scale * lift
  __device__ void add(float scale) {
    scale_ = scale;
    if constexpr (!kCorrectsLate)
#pragma unroll
      for (int i = 0; i < kVecs; ++i) x_[i] = add_scaled(x_[i], lift(i), scale);
  }

  template <class Function>
  __device__ static void for_each_vec(Function function) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) function(i);
  }

  // Replaces x by the corrected residual if the op writes the residual and not the sum.
  __device__ void finish_correction() {
    if constexpr (kOp == Op::kCapResidual && !kCorrectsLate)
#pragma unroll
      for (int i = 0; i < kVecs; ++i) x_[i] = add_difference(base(i).floats(), x_[i], load_source(0, i).floats());
  }

  // Vector i of the stream that the correction is added to: as it came, and corrected.
  __device__ Packed base(int i) const { return load_source(kSources - 1, i); }
  __device__ Packed corrected(int i) const {
    if constexpr (kCorrectsLate) return Packed::round(add_scaled(base(i).floats(), lift(i), scale_));
    return Packed::round(x_[i]);
  }

  // Keeps vector i of a result for a later step. It overwrites the incoming row in shared memory.
  __device__ void stash(int i, const Packed& vec) const { vec.store_shared(address(0, i)); }
  __device__ Packed stashed(int i) const { return load_source(0, i); }

  // Prefetches a later row into the current row's place in shared memory, and goes on to the next row.
  __device__ void next() {
    prefetch(row + kSharedRows * step, next_slot_);
#pragma unroll
    for (int i = 1; i < kSharedRows; ++i) slots_[i - 1] = slots_[i];
    slots_[kSharedRows - 1] = next_slot_;
    row += step;
  }

 private:
  const uint32_t vec_bytes_;     // distance between a thread's vectors in shared memory
  const uint32_t shared_begin_;  // shared address of this thread's first vector
  uint32_t row_offset_ = 0;      // bytes from shared_begin_ to the current row
  int32_t slots_[kSharedRows], next_slot_ = kNoSlot, axis_slot_ = kNoSlot;
  float scale_ = 0;
  Floats axis_[kAnyDirections ? 1 : kVecs] = {};
  Floats x_[kVecs];

  __device__ uint32_t address(int source, int i) const {
    return shared_begin_ + row_offset_ + vec_bytes_ * uint32_t(source * kVecs + i);
  }
  __device__ Packed load_source(int source, int i) const { return Packed::load_shared(address(source, i)); }

  // Vector i of the incoming row.
  __device__ Floats incoming(int i) const {
    if constexpr (kTwoStreams) return load_source(0, i).floats() + load_source(1, i).floats();
    return load_source(0, i).floats();
  }

  // Starts to copy a row. Vectors behind the end of the row, and rows that are not needed, become zeros.
  __device__ void prefetch(int64_t row, int32_t slot) {
    const int end = Base::is_read(row, slot) ? size : 0;
#pragma unroll
    for (int s = 0; s < kSources; ++s) {
      const T* from = s ? Base::residual(row) : Base::hidden(row);
#pragma unroll
      for (int i = 0; i < kVecs; ++i) ptx::copy_async(address(s, i), from + offset(i), offset(i) < end ? kVecBytes : 0);
    }
    ptx::commit_copies();
    if constexpr (kSharedRows > 1) row_offset_ = vec_bytes_ * kVecs * kSources - row_offset_;
  }

  // Selects direction k of the current row's slot. With one direction it also loads the axis, if the slot is another.
  __device__ void select(int k) {
    if (!is_active() || (!kAnyDirections && slots_[0] == axis_slot_)) return;
    axis_slot_ = slots_[0];
    direction.select(layer, axis_slot_, k, directions(), size);
    if constexpr (!kAnyDirections)
#pragma unroll
      for (int i = 0; i < kVecs; ++i) axis_[i] = load_from_bank(direction.axis, i);
  }

  __device__ Floats axis(int i) const {
    if constexpr (!kAnyDirections) return axis_[i];
    return load_from_bank(direction.axis, i);
  }

  __device__ Floats lift(int i) const {
    if (!kAnyDirections && direction.lift == direction.axis) return axis_[kAnyDirections ? 0 : i];
    return load_from_bank(direction.lift, i);
  }

  __device__ Floats load_from_bank(const float* from, int i) const {
    return Floats::template load<Memory::kCached>(from, offset(i), direction.size, is_aligned());
  }
};

}  // namespace axiscap::cuda
