// What one call asks for, in plain pointers: the contract between a framework's checks and the kernels.
#pragma once

#include <cstdint>

namespace axiscap {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

// Directions that one slot may hold. The kernels keep a row's projections in fixed storage of this size.
inline constexpr int64_t kMaxDirections = 64;

// No correction by less than this takes an element of a finite row out of the range of bfloat16 or float32: half of the
// last place of their largest numbers is 2^119 and 2^103, and beside that 64 corrections of 2^30 along lifts of
// elements up to 2^60 are nothing. The largest float16 is near what rows do hold, and always worth a look.
inline constexpr float kLargeCorrection = 0x1p30f;

// Slot of a row that is not capped.
inline constexpr int32_t kNoSlot = -1;

// Of fp8 (E4M3): the largest number, and the least scale of a row, as the engines have it.
inline constexpr float kFp8Max = 448.f, kFp8LeastScale = 1.f / (kFp8Max * 512.f);

// The row is x = hidden, or hidden + residual where residual is given. Strides are in elements; the last one is 1.
// The correction is added to residual where given, else to hidden, and the sum is rounded once, into out.
//   out == the corrected input: in place; a row in which nothing fires is not written.
//   out elsewhere: every row is written. out null: only the projections are wanted.
struct CapParams {
  const void* hidden = nullptr;
  const void* residual = nullptr;
  void* out = nullptr;
  int64_t hidden_stride = 0;
  int64_t residual_stride = 0;
  int64_t out_stride = 0;
  int64_t rows = 0;
  int64_t hidden_size = 0;

  const float* axes = nullptr;     // (slots, directions, hidden_size), contiguous, unit rows: what a row is read along
  const float* lifts = nullptr;    // like axes: what it is corrected along, <axis, lift> = 1; null: the axes
  const float* floors = nullptr;   // (slots, directions): a row below fires
  const float* targets = nullptr;  // like floors, and at least them: where such a row ends; null: the floors
  // (slots,) or null: a row is left alone if the sum of its squares is more than limit * limit, both in float32.
  const float* norm_limits = nullptr;
  const int32_t* slots = nullptr;  // (rows,), kNoSlot for a row to leave alone; null: every row uses slot 0
  int64_t num_slots = 0;
  int64_t directions = 0;

  float* projections = nullptr;  // (rows, directions) or null: <x, v_k> before the cap, NaN for a row left alone
  uint8_t* fired = nullptr;      // (rows, directions) or null: 1 where direction k changed the row

  // With a weight, the norm that the next block runs anyway: every row of out is x, capped or not, and
  // normed <- out / sqrt(mean(out^2) + eps) * (weight + weight_bias), of the rounded out. residual must be given.
  const void* weight = nullptr;  // (hidden_size,), of the rows' dtype
  void* normed = nullptr;
  int64_t normed_stride = 0;
  float eps = 0;
  float weight_bias = 0;

  // With one of these normed is in fp8: what the norm gives, rounded to the rows' dtype, over the scale; within the
  // range of fp8, rounded once more.
  const float* scale = nullptr;  // of all rows
  float* scales = nullptr;       // (rows,), written: a row's largest |element| / kFp8Max, but no less than the least
  bool is_fp8() const { return scale || scales; }

  DType dtype = DType::kFloat32;
};

// Running statistics: the fields of one entry of a (slots, directions, kStatFields) float64 array.
enum StatField : int64_t {
  kSeen,       // rows of this slot
  kFired,      // rows that this direction was the first to fire in: summed over directions, the rows fired
  kBelow,      // rows whose incoming projection was below this direction's floor
  kNonFinite,  // rows left alone: beyond the limit of the norm, or a projection or the corrected row is not finite
  kSum,        // of the projections, like the next two over the other rows
  kMin,
  kMax,
  kShortfall,  // sum of floor - projection over the rows below
  kStatFields
};

struct StatsParams {
  const float* projections = nullptr;  // (layers, rows, directions), of which each layer is contiguous
  const float* floors = nullptr;       // (layers, slots, directions)
  const int32_t* slots = nullptr;      // (rows,) or null, the same for all layers
  double* stats = nullptr;             // (layers, slots, directions, kStatFields)
  int64_t rows = 0;
  int64_t num_slots = 0;
  int64_t directions = 0;
  int64_t layers = 1;
  int64_t layer_stride = 0;  // of the projections, in elements
};

}  // namespace axiscap
