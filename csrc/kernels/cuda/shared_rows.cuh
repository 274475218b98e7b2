// All other rows: too wide for registers, or not on 16 bytes. A row lies in shared memory, in float32, while its
// threads work on it, each on vectors of its own. The threads load a row when they are done with the one before. They
// load hidden and residual again where a correction goes into residual.
#pragma once

#include "kernels/cuda/rows.cuh"

namespace axiscap::cuda {

template <class T, Op kOp>
struct SharedRows : Rows<T, kOp> {
  using Base = Rows<T, kOp>;
  using Base::direction;
  using Base::group;
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

  static constexpr bool kOneDirection = false;
  static_assert(kVecsPerThread * kVecSize * sizeof(float) <= kVecsAhead * kVecBytes, "a row that is not wide fits");

  template <int kLayers>
  __device__ explicit SharedRows(const Call<kLayers>& call)
      : Base(call, call.layers[kLayers == 1 ? 0 : blockIdx.y]),
        is_aligned_(call.aligned),
        is_wide_(size > kVecsPerThread * kVecSize * group.threads),
        vecs_(is_wide_ ? (size - offset(0) + kMaxThreads * kVecSize - 1) / (kMaxThreads * kVecSize) : kVecsPerThread),
        first_([&] {
          extern __shared__ uint4 dynamic_shared[];
          return ptx::shared_address(dynamic_shared) +
                 uint32_t(group.index * group.threads * kVecsPerThread * kVecSize * sizeof(float));
        }()) {}

  __device__ bool is_aligned() const { return is_aligned_; }
  __device__ bool is_active() const { return slot_ != kNoSlot; }
  __device__ int directions() const { return int(p.directions); }

  __device__ void load() {
    slot_ = Base::slot_of(row);
    restore();
  }

  // Loads the row as it came. The norm takes all rows of a block, and those behind the last one are zeros.
  __device__ void restore() {
    if (!is_active() && !Base::kNorm) return;
    const int end = Base::is_read(row, slot_) ? size : 0;
    for_each_vec([&](int i) {
      Floats x = load_row(Base::hidden(row), i, end).floats();
      if constexpr (kTwoStreams) x = x + load_row(Base::residual(row), i, end).floats();
      set(i, x);
    });
  }

  // This thread's part of the sum of the squares of the row as it came.
  __device__ float squares() const {
    float sum = 0;
    if (is_active())
      for_each_vec([&](int i) {
        const Floats x = get(i);
        sum = dot(x, x, sum);
      });
    return sum;
  }

  // <x, axis of direction k>
  __device__ float project(int k) {
    float sum = 0;
    if (is_active()) {
      direction.select(layer, slot_, k, directions(), size);
      sum = dot_with_axis();
    }
    return group.sum(sum);
  }

  // x += scale * lift
  __device__ void add(float scale) {
    for_each_vec([&](int i) {
      const Floats x = corrects_residual() ? base(i).floats() : get(i);
      set(i, add_scaled(x, load_from_bank(direction.lift, i), scale));
    });
  }

  template <class Function>
  __device__ void for_each_vec(Function function) const {
#pragma unroll 1  // unrolled, the kernels take ptxas a third longer, in as many registers
    for (int i = 0; i < vecs_; ++i) function(i);
  }

  // Turns x into the corrected residual, where only that is written.
  __device__ void finish_correction() {
    if (kOp != Op::kCapResidual || corrects_residual()) return;
    for_each_vec([&](int i) {
      set(i, add_difference(base(i).floats(), get(i), load_row(Base::hidden(row), i, size).floats()));
    });
  }

  // Vector i of what the correction goes into, as it came, and corrected.
  __device__ Packed base(int i) const {
    return load_row(kTwoStreams ? Base::residual(row) : Base::hidden(row), i, size);
  }
  __device__ Packed corrected(int i) const { return Packed::round(get(i)); }

  // Holds vector i of a step's result for the next step.
  __device__ void stash(int i, const Packed& vec) { set(i, vec.floats()); }
  __device__ Packed stashed(int i) const { return Packed::round(get(i)); }

  __device__ void next() { row += step; }

 private:
  const bool is_aligned_, is_wide_;
  const int vecs_;        // that this thread works on
  const uint32_t first_;  // address of the row in shared memory
  int32_t slot_ = kNoSlot;

  // This thread's part of <x, axis>. A wide row has one sum. Other rows have the sums of RegisterRows: one for each
  // vector, added pairwise.
  __device__ float dot_with_axis() const {
    float sum = 0, pairs = -0.f;
    for_each_vec([&](int i) {
      const float before = sum;
      sum = dot(get(i), load_from_bank(direction.axis, i), is_wide_ ? before : -0.f);
      if (i % 2) pairs += before + sum;
    });
    return is_wide_ ? sum : pairs;
  }

  // Whether a correction is added to residual itself and not to the sum, as RegisterRows of one direction do.
  __device__ bool corrects_residual() const { return kOp == Op::kCapResidual && !is_wide_ && directions() == 1; }

  __device__ Floats get(int i) const { return Floats::load_shared(first_ + offset(i) * uint32_t(sizeof(float))); }
  __device__ void set(int i, const Floats& x) const { x.store_shared(first_ + offset(i) * uint32_t(sizeof(float))); }
  __device__ Packed load_row(const T* from, int i, int end) const {
    return Packed::load(from, offset(i), end, is_aligned_);
  }
  __device__ Floats load_from_bank(const float* from, int i) const {
    return Floats::template load<Memory::kCached>(from, offset(i), direction.size, is_aligned_);
  }
};

}  // namespace axiscap::cuda
