// The cap on a CPU: one row loop for every op. Included with AXISCAP_ISA defined (see simd.h).
//
// Bits depend on the row, H, dtype and slot alone. Element i of a dot product is always added to lane i % kLanes, in
// the order of i, and the lanes are folded in one fixed tree. So neither how many rows are taken at once, nor the
// thread, nor the vector width of the instruction set, can show in a result. (The x86-64 baseline alone has no fused
// multiply-add: its last bits differ from those of the other sets.)
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
// Squares have half of the lanes: with as many as a dot product, the sums of all rows would not fit the registers.
inline constexpr int kSquareVecs = kVecs / 2;
// Most rows that share one pass over the axis: the axis (4 bytes an element, from L1 or L2) costs more than a bfloat16
// row, and several rows at once keep more of memory's requests in flight. Bounded by the registers for their sums.
inline constexpr int kMaxRowsAtOnce = kWidth == 16 ? 8 : 4;
// The pass that reads asks for one in this many of the next block's lines, and leaves the rest to the pass that writes,
// which computes more: memory is then busy in both. (Asking costs: the wider the vectors, the shorter the loop.)
inline constexpr int kPrefetchShare = kWidth == 16 ? 4 : 2;

// Where a row comes from: one stream, or the sum of two. `base` is what a correction is added to.
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
  // Under a norm all of the sum goes on in the residual; else the correction alone joins it.
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

// What the directions so far have added to a row: x = row + sum_j delta_j u_j, in the order of j.
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
  // Lane j is added to lane j - half, for half = ..., 4, 2, 1: on four lanes at a time while there are four.
  typedef float Four __attribute__((vector_size(16)));
  constexpr int kFours = N * kWidth / 4;
  Four lanes[kFours];
  std::memcpy(lanes, acc, sizeof(lanes));
  for (int half = kFours / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  return (lanes[0][0] + lanes[0][2]) + (lanes[0][1] + lanes[0][3]);
}

inline void add_square(Vec& acc, Vec x) { acc = multiply_add(x, x, acc); }

// <row_r, axis> for R rows in one pass over the axis, and with kSquares <row_r, row_r>. `ahead`: how many elements
// further on the row lies that comes in row r's place after this block, or 0.
template <int R, bool kSquares, class Row, class T>
inline void dots(const Row* rows, const float* axis, int64_t size, int64_t ahead, float* out, float* squares) {
  Vec acc[R][kVecs] = {}, square_acc[R][kSquareVecs] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    // R rows at once are R short streams, which the hardware's prefetchers lose at every row's end.
    for (int r = 0; r < R; r += kPrefetchShare)
      __builtin_prefetch(rows[r + i / kLanes % std::min(R, kPrefetchShare)].base() + i + ahead, 0, 2);
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
    out[r] = fold(acc[r]);
    if constexpr (kSquares) squares[r] = fold(square_acc[r]);
  }
}

// <x, axis> of a row that earlier directions have corrected; the same sum as `dots` over x.
template <class T, class Row>
inline float dot_corrected(const Row& row, const Corrections& corrections, const float* axis, int64_t size) {
  Vec acc[kVecs] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    for (int u = 0; u < kVecs; ++u) {
      const int64_t at = i + u * kWidth;
      acc[u] = multiply_add(corrections.apply(row.load_at(at), at), load(axis + at), acc[u]);
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

// base + corrections of a row's last n elements, n < 2 kWidth, and zeros behind them.
template <class T, class Row>
inline void corrected_tail(const Row& row, const Corrections& corrections, int64_t i, int64_t n, Vec (&x)[2]) {
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

// Whether a correction by delta may take an element of a finite row out of T's range.
template <class T>
inline bool may_overflow(float delta) {
  return std::is_same_v<T, float16> || delta > kLargeCorrection;
}

// Whether base + corrections is finite once it is rounded to T. The smallest float that is not: 65520 as a float16,
// halfway between the largest and what would follow it; the same as a bfloat16.
template <class T, class Row>
inline bool fits(const Row& row, const Corrections& corrections, int64_t size) {
  const float least = std::is_same_v<T, float16>    ? 65520.f
                      : std::is_same_v<T, bfloat16> ? bit_cast<float>(0x7f7f8000u)
                                                    : std::numeric_limits<float>::infinity();
  VecU32 within = ~VecU32{};
  const auto look = [&](Vec x) {
    within &= (VecU32)(bit_cast<Vec>(bit_cast<VecU32>(x) & 0x7fffffff) < broadcast(least));
  };
  int64_t i = 0;
  for (; i + 2 * kWidth <= size; i += 2 * kWidth)
    for (int u = 0; u < 2; ++u) look(corrections.apply(row.base_at(i + u * kWidth), i + u * kWidth));
  if (i < size) {
    Vec x[2];
    corrected_tail<T>(row, corrections, i, size - i, x);
    for (int u = 0; u < 2; ++u) look(x[u]);
  }
  uint32_t all = ~0u;
  for (int j = 0; j < kWidth; ++j) all &= within[j];
  return all;
}

// out = round(base + corrections): the one store of a row that fired. `ahead`: how many elements further on a row lies
// that will be wanted soon, or 0. The pass computes more than it moves, so that one can come in from memory meanwhile.
template <class T, class Row>
inline void store_corrected(const Row& row, const Corrections& corrections, T* out, int64_t size, int64_t ahead) {
  constexpr int kStep = 2 * kWidth;
  int64_t i = 0;
  if (corrections.count == 1) {
    // Held in locals: the stores could change anything behind a pointer, for all that the compiler knows.
    const Row local = row;
    const float* lift = corrections.lifts[0];
    const Vec delta = broadcast(corrections.delta[0]);
    for (; i + kStep <= size; i += kStep) {
      __builtin_prefetch(local.base() + i + ahead, 0, 2);
      store(out + i, multiply_add(load(lift + i), delta, local.base_at(i)),
            multiply_add(load(lift + i + kWidth), delta, local.base_at(i + kWidth)));
    }
  }
  for (; i + kStep <= size; i += kStep)
    store(out + i, corrections.apply(row.base_at(i), i), corrections.apply(row.base_at(i + kWidth), i + kWidth));
  if (i == size) return;
  Vec x[2];
  corrected_tail<T>(row, corrections, i, size - i, x);
  T rounded[kStep];
  store(rounded, x[0], x[1]);
  std::memcpy(out + i, rounded, (size - i) * sizeof(T));
}

// x / sqrt(mean(x^2) + eps) * (weight + weight_bias) of a row x as it was stored.
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

  // Hands over where, how many elements, and two vectors of them; behind the last element they are 0.
  template <class Take>
  void each(Take take) const {
    const Norm norm = *this;  // held in locals: the stores could change anything behind a pointer
    const auto hand = [&](const T* row, const T* by, int64_t i, int64_t n) {
      take(i, n, load(row) * norm.scale * (load(by) + norm.bias),
           load(row + kWidth) * norm.scale * (load(by + kWidth) + norm.bias));
    };
    int64_t i = 0;
    for (; i + kStep <= norm.size; i += kStep) hand(norm.x + i, norm.weight + i, i, kStep);
    if (i == norm.size) return;
    T row_tail[kStep] = {}, weight_tail[kStep] = {};
    std::memcpy(row_tail, norm.x + i, (norm.size - i) * sizeof(T));
    std::memcpy(weight_tail, norm.weight + i, (norm.size - i) * sizeof(T));
    hand(row_tail, weight_tail, i, norm.size - i);
  }
};

template <class T>
void norm_row(const CapParams& p, const T* x, T* normed) {
  Norm<T>(p, x).each([normed](int64_t i, int64_t n, Vec a, Vec b) {
    if (n == Norm<T>::kStep) return store(normed + i, a, b);
    T rounded[Norm<T>::kStep];
    store(rounded, a, b);
    std::memcpy(normed + i, rounded, n * sizeof(T));
  });
}

// In fp8: as above, and over a scale; `own_scale` is where the row's goes, or null.
template <class T>
void norm_row_in_fp8(const CapParams& p, const T* x, uint8_t* normed, float* own_scale) {
  constexpr int kStep = Norm<T>::kStep;
  const Norm<T> norm(p, x);
  float scale = own_scale ? 0 : *p.scale;
  if (own_scale) {
    Vec most = {};
    const auto look = [&most](Vec x) {
      const VecU32 is_more = (VecU32)(magnitude(x) > most);
      most = bit_cast<Vec>((bit_cast<VecU32>(magnitude(x)) & is_more) | (bit_cast<VecU32>(most) & ~is_more));
    };
    norm.each([&look](int64_t, int64_t, Vec a, Vec b) {
      T rounded[kStep];
      store(rounded, a, b);
      look(load(rounded));
      look(load(rounded + kWidth));
    });
    for (int j = 0; j < kWidth; ++j) scale = std::max(scale, most[j]);
    *own_scale = scale = std::max(scale / kFp8Max, kFp8MinScale);
  }
  const Vec inverse = broadcast(1.f / scale);
  norm.each([normed, inverse](int64_t i, int64_t n, Vec a, Vec b) {
    T rounded[kStep];
    uint8_t bytes[kStep];
    store(rounded, a, b);
    store_fp8(bytes, load(rounded) * inverse, load(rounded + kWidth) * inverse);
    std::memcpy(normed + i, bytes, n);
  });
}

// What becomes of a row, once its corrections are known.
template <class T, class Row>
void finish_row(const CapParams& p, int64_t index, const Row& row, const Corrections& corrections, int64_t ahead) {
  T* out = static_cast<T*>(p.out) + index * p.out_stride;
  if (corrections.count > 0 || p.weight)
    store_corrected(row, corrections, out, p.hidden_size, ahead);
  else if (out != row.base())
    std::memcpy(out, row.base(), p.hidden_size * sizeof(T));
  if (!p.weight) return;
  if (p.is_fp8())
    norm_row_in_fp8(p, out, static_cast<uint8_t*>(p.normed) + index * p.normed_stride,
                    p.scales ? p.scales + index : nullptr);
  else
    norm_row(p, out, static_cast<T*>(p.normed) + index * p.normed_stride);
}

// Applies a slot's directions in order to one row whose incoming projections are known and admitted. Returns false,
// with nothing written, where a projection, a correction or the corrected row is not finite.
template <class T, class Row>
bool correct(const CapParams& p, const Row& row, const Slot& slot, const float* projections, Corrections& corrections,
             uint8_t* fired) {
  bool large = false;
  for (int64_t k = 0; k < p.directions; ++k) {
    const float* axis = slot.axes + k * p.hidden_size;
    const float now = corrections.count == 0 ? projections[k] : dot_corrected<T>(row, corrections, axis, p.hidden_size);
    if (!std::isfinite(now)) return false;
    fired[k] = now < slot.floors[k];
    if (!fired[k]) continue;
    const float delta = slot.targets[k] - now;
    if (!std::isfinite(delta)) return false;
    corrections.add(slot.lifts + k * p.hidden_size, delta);
    large |= may_overflow<T>(delta);
  }
  return !large || fits<T>(row, corrections, p.hidden_size);
}

// Rows [row, row + R) of a range that ends at `end`; they share a slot.
template <int R, class T, class Row>
void cap_block(const CapParams& p, int64_t row, int64_t end, int32_t number) {
  const Slot slot(p, number);
  // Made in place without default constructors; R is a constant, so this is R rows side by side.
  alignas(Row) unsigned char storage[R * sizeof(Row)];
  Row* rows = reinterpret_cast<Row*>(storage);
  for (int r = 0; r < R; ++r) new (rows + r) Row(p, row + r);

  const int64_t ahead = row + 2 * R <= end ? R * Row::stride(p) : 0;
  float projections[R][kMaxDirections], squares[R] = {};
  for (int64_t k = 0; k < p.directions; ++k) {
    const float* axis = slot.axes + k * p.hidden_size;
    float column[R];
    if (k == 0 && slot.has_limit())
      dots<R, true, Row, T>(rows, axis, p.hidden_size, ahead, column, squares);
    else
      dots<R, false, Row, T>(rows, axis, p.hidden_size, ahead, column, nullptr);
    for (int r = 0; r < R; ++r) projections[r][k] = column[r];
  }

  for (int r = 0; r < R; ++r) {
    Corrections corrections;
    uint8_t fired[kMaxDirections] = {};
    bool admitted = !(squares[r] > slot.norm_limit * slot.norm_limit);
    for (int64_t k = 0; k < p.directions; ++k) admitted &= std::isfinite(projections[r][k]);
    if (p.out) {
      admitted = admitted && correct<T>(p, rows[r], slot, projections[r], corrections, fired);
      if (!admitted) corrections.count = 0;
      finish_row<T>(p, row + r, rows[r], corrections, ahead);
    }
    if (p.projections) {
      float* to = p.projections + (row + r) * p.directions;
      for (int64_t k = 0; k < p.directions; ++k)
        to[k] = admitted ? projections[r][k] : std::numeric_limits<float>::quiet_NaN();
    }
    if (p.fired)
      for (int64_t k = 0; k < p.directions; ++k) p.fired[(row + r) * p.directions + k] = admitted && fired[k];
  }
}

template <class T, class Row>
void skip_row(const CapParams& p, int64_t row) {
  if (p.out) finish_row<T>(p, row, Row(p, row), Corrections(), 0);
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
    const int64_t most = std::min<int64_t>(end - row, kMaxRowsAtOnce);
    int64_t alike = p.slots ? 1 : most;
    while (alike < most && p.slots[row + alike] == slot) ++alike;
    if (kMaxRowsAtOnce == 8 && alike == 8) {
      cap_block<8, T, Row>(p, row, end, slot);
    } else if (alike >= 4) {
      alike = 4;
      cap_block<4, T, Row>(p, row, end, slot);
    } else {
      alike = 1;
      cap_block<1, T, Row>(p, row, end, slot);
    }
    row += alike;
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
