// The cap on a CPU: one loop over the rows for every op. CMake defines AXISCAP_ISA (see simd.h).
//
// The bits of a result depend on the row, H, dtype and slot alone: element i of a dot product is always added to lane
// i % kLanes, in the order of i, and a fixed tree adds up the lanes. The number of rows in a block, the thread and the
// vector width of the instruction set do not matter. (Only the x86-64 baseline has no fused multiply-add: its last bits
// differ from those of the other instruction sets.)
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <type_traits>

#include "kernels/cpu/simd.h"
#include "kernels/params.h"

namespace axiscap::AXISCAP_ISA {

inline constexpr int kLanes = 32;
inline constexpr int kVecs = kLanes / kWidth;
// Sums of squares have half of the lanes. With kLanes the sums of all rows of a block would not fit the registers.
inline constexpr int kSquareVecs = kVecs / 2;
// The most rows that share one pass over the axis. An axis (4 bytes an element, from L1 or L2) takes longer to load
// than a bfloat16 row, and several rows keep more memory requests in flight. The registers for their sums limit the
// number.
inline constexpr int kMaxBlockRows = kWidth == 16 ? 8 : 4;
// project_rows prefetches every kPrefetchShare-th cache line of the next block, store_corrected the others, so that
// memory is busy in both. With wider vectors the loop is shorter, and a prefetch costs a larger part of it.
inline constexpr int kPrefetchShare = kWidth == 16 ? 4 : 2;

// The source of a row: one stream, or the sum of two. A correction is added to `base`. `tail` copies the last n
// elements of a row to a buffer with zeros behind them, so that whole vectors can be loaded.
template <class T>
struct OneStream {
  const T* hidden;
  OneStream(const CapParams& p, int64_t row) : hidden(static_cast<const T*>(p.hidden) + row * p.hidden_stride) {}
  Vec load_at(int64_t i) const { return load(hidden + i); }
  Vec base_at(int64_t i) const { return load(hidden + i); }
  const T* base() const { return hidden; }
  static int64_t stride(const CapParams& p) { return p.hidden_stride; }
  OneStream tail(int64_t i, int64_t n, T* buffer) const {
    OneStream copy = *this;
    std::memcpy(buffer, hidden + i, n * sizeof(T));
    copy.hidden = buffer;
    return copy;
  }
};

template <class T, bool kNorm>
struct TwoStreams {
  const T* hidden;
  const T* residual;
  TwoStreams(const CapParams& p, int64_t row)
      : hidden(static_cast<const T*>(p.hidden) + row * p.hidden_stride),
        residual(static_cast<const T*>(p.residual) + row * p.residual_stride) {}
  Vec load_at(int64_t i) const { return load(hidden + i) + load(residual + i); }
  // With a norm the residual becomes the sum; else only the correction is added to it.
  Vec base_at(int64_t i) const { return kNorm ? load_at(i) : load(residual + i); }
  const T* base() const { return residual; }
  static int64_t stride(const CapParams& p) { return p.residual_stride; }
  TwoStreams tail(int64_t i, int64_t n, T* buffer) const {
    TwoStreams copy = *this;
    std::memcpy(buffer, hidden + i, n * sizeof(T));
    std::memcpy(buffer + kLanes, residual + i, n * sizeof(T));
    copy.hidden = buffer;
    copy.residual = buffer + kLanes;
    return copy;
  }
};

// The directions of one slot.
struct Slot {
  const float* axes;
  const float* lifts;
  const float* floors;
  const float* targets;
  float norm_limit;

  Slot(const CapParams& p, int64_t slot)
      : axes(p.axes + slot * p.directions * p.hidden_size),
        lifts(p.lifts ? p.lifts + slot * p.directions * p.hidden_size : axes),
        floors(p.floors ? p.floors + slot * p.directions : nullptr),
        targets(p.targets ? p.targets + slot * p.directions : floors),
        norm_limit(p.norm_limits ? p.norm_limits[slot] : std::numeric_limits<float>::infinity()) {}

  bool has_limit() const { return norm_limit < std::numeric_limits<float>::infinity(); }
};

// The corrections of a row by its directions, in order: x = row + sum_j delta_j lift_j.
struct Corrections {
  const float* lifts[kMaxDirections];
  float delta[kMaxDirections];
  int count = 0;

  void add(const float* lift, float d) {
    lifts[count] = lift;
    delta[count++] = d;
  }
  Vec apply(Vec x, int64_t i) const {
    for (int j = 0; j < count; ++j) x = multiply_add(load(lifts[j] + i), broadcast(delta[j]), x);
    return x;
  }
};

template <int N>
inline float fold(const Vec (&acc)[N]) {
  // Lane j is added to lane j - half, for half = ..., 4, 2, 1; the steps down to half = 4 work on vectors of four
  // lanes.
  typedef float Four __attribute__((vector_size(16)));
  constexpr int kFours = N * kWidth / 4;
  Four lanes[kFours];
  std::memcpy(lanes, acc, sizeof(lanes));
  for (int half = kFours / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  return (lanes[0][0] + lanes[0][2]) + (lanes[0][1] + lanes[0][3]);
}

inline void add_square(Vec& acc, Vec x) { acc = multiply_add(x, x, acc); }

// projections[r] = <row_r, axis> for R rows in one pass over the axis, and with kSquares squares[r] = <row_r, row_r>.
// prefetch_offset: elements from a row of this block to the same row of the next block, or 0.
template <int R, bool kSquares, class Row, class T>
inline void project_rows(const Row* rows, const float* axis, int64_t size, int64_t prefetch_offset, float* projections,
                         float* squares) {
  Vec acc[R][kVecs] = {}, square_acc[R][kSquareVecs] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    // R rows are R short streams: the hardware prefetchers lose them at the end of every row.
    for (int r = 0; r < R; r += kPrefetchShare)
      __builtin_prefetch(rows[r + i / kLanes % std::min(R, kPrefetchShare)].base() + i + prefetch_offset, 0, 2);
    for (int u = 0; u < kVecs; ++u) {
      const Vec v = load(axis + i + u * kWidth);
      for (int r = 0; r < R; ++r) {
        const Vec x = rows[r].load_at(i + u * kWidth);
        acc[r][u] = multiply_add(x, v, acc[r][u]);
        if constexpr (kSquares) add_square(square_acc[r][u % kSquareVecs], x);
      }
    }
  }
  if (i < size) {
    float axis_tail[kLanes] = {};
    std::memcpy(axis_tail, axis + i, (size - i) * sizeof(float));
    for (int r = 0; r < R; ++r) {
      T row_tail[2 * kLanes] = {};
      const Row row = rows[r].tail(i, size - i, row_tail);
      for (int u = 0; u < kVecs; ++u) {
        const Vec x = row.load_at(u * kWidth);
        acc[r][u] = multiply_add(x, load(axis_tail + u * kWidth), acc[r][u]);
        if constexpr (kSquares) add_square(square_acc[r][u % kSquareVecs], x);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    projections[r] = fold(acc[r]);
    if constexpr (kSquares) squares[r] = fold(square_acc[r]);
  }
}

// <x, axis> of a row that earlier directions have corrected, with the same order of sums as project_rows.
template <class T, class Row>
inline float project_corrected(const Row& row, const Corrections& corrections, const float* axis, int64_t size) {
  Vec acc[kVecs] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    for (int u = 0; u < kVecs; ++u) {
      const int64_t offset = i + u * kWidth;
      acc[u] = multiply_add(corrections.apply(row.load_at(offset), offset), load(axis + offset), acc[u]);
    }
  if (i < size) {
    T row_tail[2 * kLanes] = {};
    const Row tail = row.tail(i, size - i, row_tail);
    float axis_tail[kLanes] = {};
    Vec x[kVecs];
    for (int u = 0; u < kVecs; ++u) x[u] = tail.load_at(u * kWidth);
    for (int j = 0; j < corrections.count; ++j) {
      std::memcpy(axis_tail, corrections.lifts[j] + i, (size - i) * sizeof(float));
      for (int u = 0; u < kVecs; ++u)
        x[u] = multiply_add(load(axis_tail + u * kWidth), broadcast(corrections.delta[j]), x[u]);
    }
    std::memcpy(axis_tail, axis + i, (size - i) * sizeof(float));
    for (int u = 0; u < kVecs; ++u) acc[u] = multiply_add(x[u], load(axis_tail + u * kWidth), acc[u]);
  }
  return fold(acc);
}

// Sets x to base + corrections of a row's last n < 2 kWidth elements, and to zeros behind them.
template <class T, class Row>
inline void correct_tail(const Row& row, const Corrections& corrections, int64_t i, int64_t n, Vec (&x)[2]) {
  T row_tail[2 * kLanes] = {};
  const Row tail = row.tail(i, n, row_tail);
  for (int u = 0; u < 2; ++u) x[u] = tail.base_at(u * kWidth);
  for (int j = 0; j < corrections.count; ++j) {
    float lift_tail[2 * kWidth] = {};
    std::memcpy(lift_tail, corrections.lifts[j] + i, n * sizeof(float));
    for (int u = 0; u < 2; ++u)
      x[u] = multiply_add(load(lift_tail + u * kWidth), broadcast(corrections.delta[j]), x[u]);
  }
}

// Whether a correction by delta may make an element of a finite row overflow T.
template <class T>
inline bool may_overflow(float delta) {
  return std::is_same_v<T, float16> || delta > kLargeCorrection;
}

// Whether base + corrections is finite when it is rounded to T. The smallest float that rounds to infinity lies halfway
// between the largest finite T and the next power of two: 65520 for float16, 0x7f7f8000 for bfloat16.
template <class T, class Row>
inline bool is_in_range(const Row& row, const Corrections& corrections, int64_t size) {
  const float overflow = std::is_same_v<T, float16>    ? 65520.f
                         : std::is_same_v<T, bfloat16> ? bit_cast<float>(0x7f7f8000u)
                                                       : std::numeric_limits<float>::infinity();
  VecU32 in_range = ~VecU32{};
  const auto check = [&](Vec x) {
    in_range &= (VecU32)(bit_cast<Vec>(bit_cast<VecU32>(x) & 0x7fffffff) < broadcast(overflow));
  };
  int64_t i = 0;
  for (; i + 2 * kWidth <= size; i += 2 * kWidth)
    for (int u = 0; u < 2; ++u) check(corrections.apply(row.base_at(i + u * kWidth), i + u * kWidth));
  if (i < size) {
    Vec x[2];
    correct_tail<T>(row, corrections, i, size - i, x);
    for (int u = 0; u < 2; ++u) check(x[u]);
  }
  uint32_t all_lanes = ~0u;
  for (int j = 0; j < kWidth; ++j) all_lanes &= in_range[j];
  return all_lanes;
}

// out = round(base + corrections): the only store of a row that fired. It prefetches the row that lies prefetch_offset
// elements behind this one (0: itself), because the loop computes more than it loads.
template <class T, class Row>
inline void store_corrected(const Row& row, const Corrections& corrections, T* out, int64_t size,
                            int64_t prefetch_offset) {
  constexpr int kStep = 2 * kWidth;
  int64_t i = 0;
  if (corrections.count == 1) {
    // Local copies, because the compiler must assume that a store changes anything behind a pointer.
    const Row local = row;
    const float* lift = corrections.lifts[0];
    const Vec delta = broadcast(corrections.delta[0]);
    for (; i + kStep <= size; i += kStep) {
      __builtin_prefetch(local.base() + i + prefetch_offset, 0, 2);
      store(out + i, multiply_add(load(lift + i), delta, local.base_at(i)),
            multiply_add(load(lift + i + kWidth), delta, local.base_at(i + kWidth)));
    }
  }
  for (; i + kStep <= size; i += kStep)
    store(out + i, corrections.apply(row.base_at(i), i), corrections.apply(row.base_at(i + kWidth), i + kWidth));
  if (i == size) return;
  Vec x[2];
  correct_tail<T>(row, corrections, i, size - i, x);
  T rounded[kStep];
  store(rounded, x[0], x[1]);
  std::memcpy(out + i, rounded, (size - i) * sizeof(T));
}

// The RMS norm x / sqrt(mean(x^2) + eps) * (weight + weight_bias) of a stored row x.
template <class T>
struct Norm {
  static constexpr int kStep = 2 * kWidth;

  const T* x;
  const T* weight;
  int64_t size;
  Vec scale, bias;

  Norm(const CapParams& p, const T* x)
      : x(x), weight(static_cast<const T*>(p.weight)), size(p.hidden_size), bias(broadcast(p.weight_bias)) {
    Vec acc[kVecs] = {};
    T tail[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes)
      for (int u = 0; u < kVecs; ++u) {
        const Vec v = load(x + i + u * kWidth);
        acc[u] = multiply_add(v, v, acc[u]);
      }
    std::memcpy(tail, x + i, (size - i) * sizeof(T));
    for (int u = 0; u < kVecs; ++u) {
      const Vec v = load(tail + u * kWidth);
      acc[u] = multiply_add(v, v, acc[u]);
    }
    scale = broadcast(1.f / std::sqrt(fold(acc) / float(size) + p.eps));
  }

  // Calls function(i, n, a, b) with two vectors of the norm: elements [i, i + n), and zeros behind the last element.
  template <class Function>
  void for_each_step(Function function) const {
    const Norm norm = *this;  // a local copy, because the compiler must assume that a store changes *this
    const auto step = [&](const T* row, const T* row_weight, int64_t i, int64_t n) {
      function(i, n, load(row) * norm.scale * (load(row_weight) + norm.bias),
               load(row + kWidth) * norm.scale * (load(row_weight + kWidth) + norm.bias));
    };
    int64_t i = 0;
    for (; i + kStep <= norm.size; i += kStep) step(norm.x + i, norm.weight + i, i, kStep);
    if (i == norm.size) return;
    T row_tail[kStep] = {}, weight_tail[kStep] = {};
    std::memcpy(row_tail, norm.x + i, (norm.size - i) * sizeof(T));
    std::memcpy(weight_tail, norm.weight + i, (norm.size - i) * sizeof(T));
    step(row_tail, weight_tail, i, norm.size - i);
  }
};

template <class T>
void write_norm(const CapParams& p, const T* x, T* normed) {
  Norm<T>(p, x).for_each_step([normed](int64_t i, int64_t n, Vec a, Vec b) {
    if (n == Norm<T>::kStep) return store(normed + i, a, b);
    T rounded[Norm<T>::kStep];
    store(rounded, a, b);
    std::memcpy(normed + i, rounded, n * sizeof(T));
  });
}

// The largest |element| of the norm, rounded to T.
template <class T>
float largest_element(const Norm<T>& norm) {
  Vec largest = {};
  const auto include = [&largest](Vec x) {
    const VecU32 is_larger = (VecU32)(magnitude(x) > largest);
    largest = bit_cast<Vec>((bit_cast<VecU32>(magnitude(x)) & is_larger) | (bit_cast<VecU32>(largest) & ~is_larger));
  };
  norm.for_each_step([&include](int64_t, int64_t, Vec a, Vec b) {
    T rounded[Norm<T>::kStep];
    store(rounded, a, b);
    include(load(rounded));
    include(load(rounded + kWidth));
  });
  float element = 0;
  for (int j = 0; j < kWidth; ++j) element = std::max(element, largest[j]);
  return element;
}

// Writes the norm in fp8, with the scale p.scale of all rows or with the row's own scale, which is written to
// row_scale.
template <class T>
void write_norm_in_fp8(const CapParams& p, const T* x, uint8_t* normed, float* row_scale) {
  constexpr int kStep = Norm<T>::kStep;
  const Norm<T> norm(p, x);
  if (row_scale) *row_scale = std::max(largest_element(norm) / kFp8Max, kFp8MinScale);
  const float scale = row_scale ? *row_scale : *p.scale;
  const Vec inverse = broadcast(1.f / scale);
  norm.for_each_step([normed, inverse](int64_t i, int64_t n, Vec a, Vec b) {
    T rounded[kStep];
    uint8_t bytes[kStep];
    store(rounded, a, b);
    store_fp8(bytes, load(rounded) * inverse, load(rounded + kWidth) * inverse);
    std::memcpy(normed + i, bytes, n);
  });
}

// Writes row number `index` with its corrections, and its norm.
template <class T, class Row>
void write_row(const CapParams& p, int64_t index, const Row& row, const Corrections& corrections,
               int64_t prefetch_offset) {
  T* out = static_cast<T*>(p.out) + index * p.out_stride;
  if (corrections.count > 0 || p.weight)
    store_corrected(row, corrections, out, p.hidden_size, prefetch_offset);
  else if (out != row.base())
    std::memcpy(out, row.base(), p.hidden_size * sizeof(T));
  if (!p.weight) return;
  if (p.is_fp8())
    write_norm_in_fp8(p, out, static_cast<uint8_t*>(p.normed) + index * p.normed_stride,
                      p.scales ? p.scales + index : nullptr);
  else
    write_norm(p, out, static_cast<T*>(p.normed) + index * p.normed_stride);
}

// Computes the corrections of one row, direction by direction, from the finite projections of the incoming row. Returns
// false if a projection, a correction or the corrected row is not finite.
template <class T, class Row>
bool correct(const CapParams& p, const Row& row, const Slot& slot, const float* projections, Corrections& corrections,
             uint8_t* fired) {
  bool large = false;
  for (int64_t k = 0; k < p.directions; ++k) {
    const float* axis = slot.axes + k * p.hidden_size;
    const float projection =
        corrections.count == 0 ? projections[k] : project_corrected<T>(row, corrections, axis, p.hidden_size);
    if (!std::isfinite(projection)) return false;
    fired[k] = projection < slot.floors[k];
    if (!fired[k]) continue;
    const float delta = slot.targets[k] - projection;
    if (!std::isfinite(delta)) return false;
    corrections.add(slot.lifts + k * p.hidden_size, delta);
    large |= may_overflow<T>(delta);
  }
  return !large || is_in_range<T>(row, corrections, p.hidden_size);
}

// Reports the projections of row number `index` and what fired; NaN and nothing if the row is left alone.
inline void report_row(const CapParams& p, int64_t index, bool admitted, const float* projections,
                       const uint8_t* fired) {
  if (p.projections) {
    float* row_projections = p.projections + index * p.directions;
    for (int64_t k = 0; k < p.directions; ++k)
      row_projections[k] = admitted ? projections[k] : std::numeric_limits<float>::quiet_NaN();
  }
  if (p.fired)
    for (int64_t k = 0; k < p.directions; ++k) p.fired[index * p.directions + k] = admitted && fired[k];
}

// Decides on row number `index` from its projections and its sum of squares, writes it and reports it.
template <class T, class Row>
inline void finish_row(const CapParams& p, int64_t index, const Row& row, const Slot& slot, const float* projections,
                       float squares, int64_t prefetch_offset) {
  Corrections corrections;
  uint8_t fired[kMaxDirections] = {};
  bool admitted = !(squares > slot.norm_limit * slot.norm_limit);
  for (int64_t k = 0; k < p.directions; ++k) admitted &= std::isfinite(projections[k]);
  if (p.out) {
    admitted = admitted && correct<T>(p, row, slot, projections, corrections, fired);
    if (!admitted) corrections.count = 0;
    write_row<T>(p, index, row, corrections, prefetch_offset);
  }
  report_row(p, index, admitted, projections, fired);
}

// Caps rows [begin, begin + R), which have one slot. `end` is the end of the call's rows on this thread.
template <int R, class T, class Row>
void cap_block(const CapParams& p, int64_t begin, int64_t end, int32_t slot_index) {
  const Slot slot(p, slot_index);
  // Row has no default constructor: the rows are constructed in place.
  alignas(Row) unsigned char storage[R * sizeof(Row)];
  Row* rows = reinterpret_cast<Row*>(storage);
  for (int r = 0; r < R; ++r) new (rows + r) Row(p, begin + r);

  const int64_t prefetch_offset = begin + 2 * R <= end ? R * Row::stride(p) : 0;
  float projections[R][kMaxDirections], squares[R] = {};
  for (int64_t k = 0; k < p.directions; ++k) {
    const float* axis = slot.axes + k * p.hidden_size;
    float column[R];
    if (k == 0 && slot.has_limit())
      project_rows<R, true, Row, T>(rows, axis, p.hidden_size, prefetch_offset, column, squares);
    else
      project_rows<R, false, Row, T>(rows, axis, p.hidden_size, prefetch_offset, column, nullptr);
    for (int r = 0; r < R; ++r) projections[r][k] = column[r];
  }
  for (int r = 0; r < R; ++r) finish_row<T>(p, begin + r, rows[r], slot, projections[r], squares[r], prefetch_offset);
}

// Writes and reports a row without a slot.
template <class T, class Row>
void skip_row(const CapParams& p, int64_t row) {
  if (p.out) write_row<T>(p, row, Row(p, row), Corrections(), 0);
  for (int64_t k = 0; k < p.directions; ++k) {
    if (p.projections) p.projections[row * p.directions + k] = std::numeric_limits<float>::quiet_NaN();
    if (p.fired) p.fired[row * p.directions + k] = 0;
  }
}

template <class T, class Row>
void cap_rows(const CapParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end;) {
    const int32_t slot = p.slots ? p.slots[row] : 0;
    if (slot == kNoSlot) {
      skip_row<T, Row>(p, row++);
      continue;
    }
    // A block has 8, 4 or 1 rows of one slot.
    const int64_t max_rows = std::min<int64_t>(end - row, kMaxBlockRows);
    int64_t block_rows = p.slots ? 1 : max_rows;
    while (block_rows < max_rows && p.slots[row + block_rows] == slot) ++block_rows;
    if (kMaxBlockRows == 8 && block_rows == 8) {
      cap_block<8, T, Row>(p, row, end, slot);
    } else if (block_rows >= 4) {
      block_rows = 4;
      cap_block<4, T, Row>(p, row, end, slot);
    } else {
      block_rows = 1;
      cap_block<1, T, Row>(p, row, end, slot);
    }
    row += block_rows;
  }
}

template <class T>
void cap_rows(const CapParams& p, int64_t begin, int64_t end) {
  if (p.weight)
    cap_rows<T, TwoStreams<T, true>>(p, begin, end);
  else if (p.residual)
    cap_rows<T, TwoStreams<T, false>>(p, begin, end);
  else
    cap_rows<T, OneStream<T>>(p, begin, end);
}

}  // namespace axiscap::AXISCAP_ISA
