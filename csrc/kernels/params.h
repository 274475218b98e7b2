// The parameters of a call, in plain pointers. The framework's binding checks and fills them; the kernels trust them.
#pragma once

#include <cstdint>

namespace axiscap {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

// The most directions of a slot. The CPU kernels have arrays of this size for the projections of a row.
inline constexpr int64_t kMaxDirections = 64;

// A correction of at most this size leaves a finite row of bfloat16 or float32 finite: 64 corrections of 2^30 along
// lifts with elements up to 2^60 add at most 2^96, and half of the last place of the largest bfloat16 and float32 is
// 2^119 and 2^103. Rows of float16 come close to the largest float16, 65504, so their range is always checked.
inline constexpr float kLargeCorrection = 0x1p30f;

// The slot of a row that is not capped.
inline constexpr int32_t kNoSlot = -1;

// The largest number of fp8 (E4M3), and the smallest scale of a row, as in vLLM.
inline constexpr float kFp8Max = 448.f, kFp8MinScale = 1.f / (kFp8Max * 512.f);

// A row is x = hidden, or x = hidden + residual if residual is not null. The correction is added to residual if it is
// not null, else to hidden. The sum is rounded once, into out. Strides are in elements; the elements of a row are
// contiguous.
//   out is the corrected stream: the cap is in place, and a row that does not fire is not written.
//   out is another buffer: every row is written.
//   out is null: the call computes the projections alone.
struct CapParams {
  const void* hidden = nullptr;
  const void* residual = nullptr;
  void* out = nullptr;
  int64_t hidden_stride = 0;
  int64_t residual_stride = 0;
  int64_t out_stride = 0;
  int64_t rows = 0;
  int64_t hidden_size = 0;

  const float* axes = nullptr;    // (slots, directions, hidden_size), contiguous, unit rows: rows are projected on them
  const float* lifts = nullptr;   // like axes, <axis, lift> = 1: rows are corrected along them; null: the axes
  const float* floors = nullptr;  // (slots, directions): a row fires if its projection is below
  const float* targets = nullptr;  // like floors, at least the floors: a corrected projection; null: the floors
  // (slots,) or null: a row is left alone if the sum of its squares is above limit * limit, both in float32.
  const float* norm_limits = nullptr;
  const int32_t* slots = nullptr;  // (rows,), kNoSlot: the row is left alone; null: every row uses slot 0
  int64_t num_slots = 0;
  int64_t directions = 0;

  float* projections = nullptr;  // (rows, directions) or null: <x, v_k> before the cap, NaN for a row left alone
  uint8_t* fired = nullptr;      // (rows, directions) or null: 1 if direction k changed the row

  // A weight adds the RMS norm that the next block starts with. Then residual is not null, every row of out becomes x,
  // capped or not, and normed <- out / sqrt(mean(out^2) + eps) * (weight + weight_bias), computed from the rounded out.
  const void* weight = nullptr;  // (hidden_size,), of the rows' dtype
  void* normed = nullptr;
  int64_t normed_stride = 0;
  float eps = 0;
  float weight_bias = 0;

  // If one of these is not null, normed is in fp8: the norm is rounded to the rows' dtype, divided by the scale,
  // limited to the range of fp8, and rounded again.
  const float* scale = nullptr;  // one scale for all rows
  float* scales = nullptr;       // (rows,), written: max(largest |element| of the row / kFp8Max, kFp8MinScale)
  bool is_fp8() const { return scale || scales; }

  DType dtype = DType::kFloat32;
};

// Running statistics: the fields of one entry of a (slots, directions, kStatFields) float64 array.
enum StatField : int64_t {
  kSeen,       // rows of this slot
  kFired,      // rows in which this direction fired first; the sum over the directions counts the rows that fired
  kBelow,      // rows whose incoming projection was below this direction's floor
  kNonFinite,  // rows left alone: the norm is above its limit, or a projection or the corrected row is not finite
  kSum,        // sum of the projections of the other rows
  kMin,        // smallest projection of the other rows
  kMax,        // largest projection of the other rows
  kShortfall,  // sum of floor - projection over the rows below the floor
  kStatFields
};

struct StatsParams {
  const float* projections = nullptr;  // (layers, rows, directions), each layer contiguous
  const float* floors = nullptr;       // (layers, slots, directions)
  const int32_t* slots = nullptr;      // (rows,) or null, the same for all layers
  double* stats = nullptr;             // (layers, slots, directions, kStatFields)
  int64_t rows = 0;
  int64_t num_slots = 0;
  int64_t directions = 0;
  int64_t layers = 1;
  int64_t layer_stride = 0;  // between the layers of projections, in elements
};

}  // namespace axiscap
