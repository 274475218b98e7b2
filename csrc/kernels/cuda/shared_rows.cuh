// All other rows: too wide for registers, or not aligned to 16 bytes. The row that the threads work on is in shared
// memory, in float32. Each thread reads and writes its own vectors alone, so no barrier is needed. Rows are not
// prefetched. If only the correction is added to residual, a row that fires is loaded from memory a second time.
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
        shared_begin_([&] {
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

  // Loads the incoming row. The norm needs rows without a slot, too, and zeros behind the last row.
  __device__ void restore() {
    if (!is_active() && !Base::kNorm) return;
    const int end = Base::is_read(row, slot_) ? size : 0;
    for_each_vec([&](int i) {
      Floats x = load_row(Base::hidden(row), i, end).floats();
      if constexpr (kTwoStreams) x = x + load_row(Base::residual(row), i, end).floats();
      store_x(i, x);
    });
  }

  // This thread's part of the sum of squares of the incoming row.
  __device__ float squares() const {
    float sum = 0;
    if (is_active())
      for_each_vec([&](int i) {
        const Floats x = load_x(i);
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
      const Floats x = corrects_residual() ? base(i).floats() : load_x(i);
      store_x(i, add_scaled(x, load_from_bank(direction.lift, i), scale));
    });
  }

  template <class Function>
  __device__ void for_each_vec(Function function) const {
#pragma unroll 1  // with unrolling ptxas takes a third longer, and the kernels have as many registers
    for (int i = 0; i < vecs_; ++i) function(i);
  }

  // Replaces x by the corrected residual if the op writes the residual and not the sum.
  __device__ void finish_correction() {
    if (kOp != Op::kCapResidual || corrects_residual()) return;
    for_each_vec([&](int i) {
      store_x(i, add_difference(base(i).floats(), load_x(i), load_row(Base::hidden(row), i, size).floats()));
    });
  }

  // Vector i of the stream that the correction is added to: as it came, and corrected.
  __device__ Packed base(int i) const {
    return load_row(kTwoStreams ? Base::residual(row) : Base::hidden(row), i, size);
  }
  __device__ Packed corrected(int i) const { return Packed::round(load_x(i)); }

  // Keeps vector i of a result for a later step.
  __device__ void stash(int i, const Packed& vec) { store_x(i, vec.floats()); }
  __device__ Packed stashed(int i) const { return Packed::round(load_x(i)); }

  __device__ void next() { row += step; }

 private:
  const bool is_aligned_, is_wide_;
  const int vecs_;               // vectors of this thread
  const uint32_t shared_begin_;  // shared address of the row
  int32_t slot_ = kNoSlot;

  // This thread's part of <x, axis>. A wide row has one running sum. Other rows are summed like RegisterRows, to have
  // the same bits: one sum for each vector, added pairwise.
  __device__ float dot_with_axis() const {
    float sum = 0, pairs = -0.f;
    for_each_vec([&](int i) {
      const float before = sum;
      sum = dot(load_x(i), load_from_bank(direction.axis, i), is_wide_ ? before : -0.f);
      if (i % 2) pairs += before + sum;
    });
    return is_wide_ ? sum : pairs;
  }

  // Whether the correction is added to residual directly and not to the sum, as in RegisterRows with one direction.
  __device__ bool corrects_residual() const { return kOp == Op::kCapResidual && !is_wide_ && directions() == 1; }

  __device__ Floats load_x(int i) const {
    return Floats::load_shared(shared_begin_ + offset(i) * uint32_t(sizeof(float)));
  }
  __device__ void store_x(int i, const Floats& x) const {
    x.store_shared(shared_begin_ + offset(i) * uint32_t(sizeof(float)));
  }
  __device__ Packed load_row(const T* from, int i, int end) const {
    return Packed::load(from, offset(i), end, is_aligned_);
  }
  __device__ Floats load_from_bank(const float* from, int i) const {
    return Floats::template load<Memory::kCached>(from, offset(i), direction.size, is_aligned_);
  }
};

}  // namespace axiscap::cuda
