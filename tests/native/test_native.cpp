// Tests of the CPU kernels without torch, against a float64 oracle, for all lengths of a row's tail. Buffers are
// allocated to the byte, so that a sanitizer reports an access one element behind the end. Ranges of rows run on
// several threads.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "launchers/cpu.h"

using namespace axiscap;

namespace {

int failures = 0;

#define CHECK(condition, ...)            \
  do {                                   \
    if (!(condition)) {                  \
      std::printf("%s: ", #condition);   \
      std::printf(__VA_ARGS__);          \
      std::printf("\n");                 \
      if (++failures > 20) std::exit(1); \
    }                                    \
  } while (0)

float to_float(DType dtype, const char* element) {
  if (dtype == DType::kFloat32) {
    float x;
    std::memcpy(&x, element, sizeof(x));
    return x;
  }
  uint16_t half;
  std::memcpy(&half, element, sizeof(half));
  if (dtype == DType::kBFloat16) {
    const uint32_t bits = uint32_t(half) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
  }
  const int exponent = (half >> 10) & 31, fraction = half & 1023;
  const float sign = half & 0x8000 ? -1.f : 1.f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.f + fraction, exponent - 25) : std::ldexp(float(fraction), -24));
}

// Stores a number near x; it need not be the nearest one.
void store_near(DType dtype, float x, char* element) {
  if (dtype == DType::kFloat32) {
    std::memcpy(element, &x, sizeof(x));
    return;
  }
  uint16_t half;
  if (dtype == DType::kBFloat16) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    half = bits >> 16;
  } else {
    int exponent;
    const float fraction = std::frexp(std::fabs(x), &exponent);
    half = fraction == 0 || exponent < -13 ? 0 : uint16_t((exponent + 14) << 10) + (int(fraction * 2048) & 1023);
    if (x < 0) half |= 0x8000;
  }
  std::memcpy(element, &half, sizeof(half));
}

int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// The largest relative error of rounding to the dtype.
double rounding_error(DType dtype) {
  return dtype == DType::kFloat32 ? 0x1p-24 : dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-11;
}

struct Call {
  std::vector<char> hidden, residual, out;
  std::vector<float> axes, floors, targets, norm_limits, projections;
  std::vector<int32_t> slots;
  std::vector<uint8_t> fired;
  CapParams params;
};

Call make_call(DType dtype, int64_t rows, int64_t size, int64_t padding, int64_t directions, bool has_residual,
               bool in_place, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Call call;
  CapParams& p = call.params;
  const int64_t bytes = bytes_of(dtype);
  const int64_t stride = size + padding;
  const auto fill = [&](std::vector<char>& buffer) {
    // The last row has no padding, so that an access behind it leaves the allocation.
    buffer.resize(rows ? ((rows - 1) * stride + size) * bytes : 0);
    for (size_t i = 0; i < buffer.size(); i += bytes) store_near(dtype, normal(random), &buffer[i]);
  };
  p.dtype = dtype;
  p.rows = rows;
  p.hidden_size = size;
  p.num_slots = 2;
  p.directions = directions;
  fill(call.hidden);
  p.hidden_stride = stride;
  if (has_residual) {
    fill(call.residual);
    p.residual_stride = stride;
  }
  call.axes.resize(2 * directions * size);
  for (float& x : call.axes) x = normal(random);
  for (int64_t k = 0; k < 2 * directions; ++k) {
    double norm = 0;
    for (int64_t i = 0; i < size; ++i) norm += double(call.axes[k * size + i]) * call.axes[k * size + i];
    for (int64_t i = 0; i < size; ++i) call.axes[k * size + i] /= std::sqrt(norm);
  }
  call.floors.resize(2 * directions);
  for (float& x : call.floors) x = normal(random);
  if (seed % 2) {
    for (const float floor : call.floors) call.targets.push_back(floor + std::fabs(normal(random)));
    // About half of the rows of slot 0 are above its limit. Slot 1 has no limit.
    call.norm_limits = {std::sqrt(float(size) * (has_residual ? 2 : 1)), INFINITY};
  }
  call.slots.resize(rows);
  for (int32_t& slot : call.slots) slot = int32_t(random() % 8 ? random() % 2 : -1);
  call.projections.resize(rows * directions);
  call.fired.resize(rows * directions);
  if (!in_place) call.out.resize(rows * size * bytes);
  p.out_stride = in_place ? stride : size;
  return call;
}

// Sets the pointers of the parameters. A copy of a call has other vectors.
void set_pointers(Call& call) {
  CapParams& p = call.params;
  p.hidden = call.hidden.data();
  p.residual = call.residual.empty() ? nullptr : call.residual.data();
  char* corrected = call.residual.empty() ? call.hidden.data() : call.residual.data();
  p.out = call.out.empty() ? corrected : call.out.data();
  p.axes = call.axes.data();
  p.floors = call.floors.data();
  p.targets = call.targets.empty() ? nullptr : call.targets.data();
  p.norm_limits = call.norm_limits.empty() ? nullptr : call.norm_limits.data();
  p.slots = call.slots.data();
  p.projections = call.projections.data();
  p.fired = call.fired.data();
}

void check_against_oracle(const Call& before, const Call& after, const char* name) {
  const CapParams& p = before.params;
  const int64_t bytes = bytes_of(p.dtype);
  const std::vector<char>& base = before.residual.empty() ? before.hidden : before.residual;
  const std::vector<char>& result = !after.out.empty()       ? after.out
                                    : after.residual.empty() ? after.hidden
                                                             : after.residual;
  std::vector<double> x(p.hidden_size);
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t in_offset = row * p.hidden_stride * bytes, out_offset = row * p.out_stride * bytes;
    double magnitude = 1, correction = 0, squares = 0;
    for (int64_t i = 0; i < p.hidden_size; ++i) {
      x[i] = to_float(p.dtype, &before.hidden[in_offset + i * bytes]);
      if (!before.residual.empty()) x[i] += to_float(p.dtype, &before.residual[in_offset + i * bytes]);
      magnitude += std::fabs(x[i]);
      squares += x[i] * x[i];
    }
    const int32_t slot = before.slots[row];
    const double limit = slot < 0 || before.norm_limits.empty() ? INFINITY : before.norm_limits[slot];
    if (std::fabs(std::sqrt(squares) - limit) < 1e-5 * limit) continue;  // the rounding of float32 decides
    const bool is_capped = slot >= 0 && std::sqrt(squares) < limit;
    CHECK(is_capped != bool(std::isnan(after.projections[row * p.directions])), "%s, row %ld of norm %g, limit %g",
          name, long(row), std::sqrt(squares), limit);
    const std::vector<double> incoming = x;
    for (int64_t k = 0; is_capped && k < p.directions; ++k) {
      const int64_t entry = slot * p.directions + k;
      const float* axis = &before.axes[entry * p.hidden_size];
      double projection = 0;
      for (int64_t i = 0; i < p.hidden_size; ++i) projection += x[i] * axis[i];
      if (projection >= before.floors[entry]) continue;
      const double delta = (before.targets.empty() ? before.floors : before.targets)[entry] - projection;
      correction += delta;
      for (int64_t i = 0; i < p.hidden_size; ++i) x[i] += delta * axis[i];
    }
    for (int64_t i = 0; i < p.hidden_size; ++i) {
      const double expected = to_float(p.dtype, &base[in_offset + i * bytes]) + (x[i] - incoming[i]);
      const double element = to_float(p.dtype, &result[out_offset + i * bytes]);
      const double tolerance =
          rounding_error(p.dtype) * std::fabs(expected) + 0x1p-24 + 0x1p-20 * (magnitude + correction);
      CHECK(std::fabs(element - expected) <= tolerance, "%s, row %ld, element %ld of %ld: %g for %g", name, long(row),
            long(i), long(p.hidden_size), element, expected);
    }
    bool fired = false;
    for (int64_t k = 0; k < p.directions; ++k) fired |= after.fired[row * p.directions + k] != 0;
    if (!fired)
      CHECK(!std::memcmp(&result[out_offset], &base[in_offset], p.hidden_size * bytes), "%s, row %ld changed", name,
            long(row));
  }
}

void run(Call& call) {
  set_pointers(call);
  cpu::cap(call.params, 0, call.params.rows);
}

void test_rows_match_the_oracle_for_every_tail() {
  unsigned seed = 0;
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
    for (int64_t size : {1, 2, 7, 8, 15, 16, 31, 32, 33, 63, 64, 65, 97, 576})
      for (int64_t rows : {0, 1, 3, 4, 5, 8, 13})
        for (int64_t directions : {1, 3})
          for (bool has_residual : {false, true})
            for (bool in_place : {false, true}) {
              const Call before = make_call(dtype, rows, size, seed % 3, directions, has_residual, in_place, seed);
              ++seed;
              Call after = before;
              run(after);
              check_against_oracle(before, after, has_residual ? "sum" : in_place ? "in place" : "copy");
            }
}

float from_fp8(uint8_t code) {
  const int exponent = code >> 3 & 15, fraction = code & 7;
  const float magnitude = exponent ? std::ldexp(8.f + fraction, exponent - 10) : std::ldexp(float(fraction), -9);
  return code & 0x80 ? -magnitude : magnitude;
}

enum class NormFormat { kRowDType, kFp8WithOneScale, kFp8WithRowScales };

// Checks the norm of one row. residual: the stored row; normed: its norm, in fp8 divided by `scale`.
void check_norm(DType dtype, NormFormat format, int64_t size, const char* residual, const char* weight,
                const char* normed, double scale) {
  const int64_t bytes = bytes_of(dtype);
  const bool is_fp8 = format != NormFormat::kRowDType;
  double squares = 0, largest = 0;
  for (int64_t i = 0; i < size; ++i) squares += std::pow(double(to_float(dtype, residual + i * bytes)), 2);
  const double root = std::sqrt(squares / double(size) + 1e-6);
  const auto norm = [&](int64_t i) {
    return to_float(dtype, residual + i * bytes) / root * to_float(dtype, weight + i * bytes);
  };
  for (int64_t i = 0; i < size; ++i) largest = std::max(largest, std::fabs(norm(i)));
  if (format == NormFormat::kFp8WithRowScales)
    CHECK(std::fabs(scale * 448 / largest - 1) < 0.01, "a scale of %g", scale);
  for (int64_t i = 0; i < size; ++i) {
    const double element = is_fp8 ? from_fp8(uint8_t(normed[i])) * scale : to_float(dtype, normed + i * bytes);
    const double expected = std::clamp(norm(i), -448 * scale, 448 * scale);
    const double tolerance = is_fp8 ? 0.07 * std::fabs(expected) + 0x1p-10 * scale + 1e-6
                                    : rounding_error(dtype) * std::fabs(expected) + 1e-6;
    CHECK(std::fabs(element - expected) <= tolerance + 1e-5 * std::fabs(expected), "format %d, element %ld: %g for %g",
          int(format), long(i), element, expected);
  }
}

void test_the_norm_matches_the_oracle_for_every_tail() {
  constexpr int64_t kRows = 5;
  unsigned seed = 0;
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
    for (int64_t size : {1, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 576})
      for (NormFormat format : {NormFormat::kRowDType, NormFormat::kFp8WithOneScale, NormFormat::kFp8WithRowScales}) {
        Call call = make_call(dtype, kRows, size, seed % 3, 1, true, true, seed);
        ++seed;
        const int64_t bytes = bytes_of(dtype), normed_bytes = format == NormFormat::kRowDType ? bytes : 1;
        std::vector<char> weight(size * bytes), normed(kRows * size * normed_bytes);
        std::vector<float> scales(kRows, 1.f);
        const float scale = 0.02f;
        for (int64_t i = 0; i < size; ++i) store_near(dtype, 0.5f + float(i % 5), &weight[i * bytes]);
        CapParams& p = call.params;
        p.weight = weight.data();
        p.eps = 1e-6f;
        p.normed = normed.data();
        p.normed_stride = size;
        if (format == NormFormat::kFp8WithOneScale) p.scale = &scale;
        if (format == NormFormat::kFp8WithRowScales) p.scales = scales.data();
        run(call);
        for (int64_t row = 0; row < kRows; ++row)
          check_norm(dtype, format, size, &call.residual[row * p.residual_stride * bytes], weight.data(),
                     &normed[row * size * normed_bytes], p.scale ? scale : scales[row]);
      }
}

void test_a_row_that_is_not_finite_is_left_alone() {
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    Call call = make_call(dtype, 9, 70, 0, 1, false, true, 0);
    std::fill(call.slots.begin(), call.slots.end(), 0);
    call.floors = {100, 100};
    const uint16_t infinity16 = dtype == DType::kBFloat16 ? 0x7f80 : 0x7c00;
    const float infinity32 = INFINITY;
    char* element = &call.hidden[(4 * 70 + 69) * bytes_of(dtype)];
    if (dtype == DType::kFloat32)
      std::memcpy(element, &infinity32, 4);
    else
      std::memcpy(element, &infinity16, 2);
    const std::vector<char> before = call.hidden;
    run(call);
    const size_t row = before.size() / 9;
    CHECK(!std::memcmp(&before[4 * row], &call.hidden[4 * row], row), "the row was changed");
    CHECK(std::isnan(call.projections[4]) && !std::isnan(call.projections[5]), "reported as %g", call.projections[4]);
    CHECK(call.fired[5] && !call.fired[4], "fired");
  }
}

void test_several_threads_give_the_bits_of_one() {
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const Call before = make_call(dtype, 203, 100, 1, 2, true, true, 7);
    Call one = before, several = before;
    run(one);
    set_pointers(several);
    std::vector<std::thread> threads;
    for (int64_t begin = 0; begin < 203; begin += 29)
      threads.emplace_back([&several, begin] { cpu::cap(several.params, begin, std::min<int64_t>(begin + 29, 203)); });
    for (std::thread& thread : threads) thread.join();
    CHECK(one.residual == several.residual, "rows differ");
    CHECK(!std::memcmp(one.projections.data(), several.projections.data(), one.projections.size() * 4),
          "projections differ");
    CHECK(one.fired == several.fired, "what fired differs");
  }
}

void test_statistics_are_added_to_their_slot() {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  // Two layers of five rows in a buffer for six rows. The second layer does not fire.
  const std::vector<float> projections = {1, -1, nan, 3, 9, 7, 1, 2, 3, 4, 5}, floors = {0, 5, 0, 0};
  const std::vector<int32_t> slots = {0, 0, 0, 1, -1};
  std::vector<double> stats(4 * kStatFields);
  for (int entry = 0; entry < 4; ++entry) {
    stats[entry * kStatFields + kMin] = INFINITY;
    stats[entry * kStatFields + kMax] = -INFINITY;
  }
  StatsParams p;
  p.projections = projections.data();
  p.floors = floors.data();
  p.slots = slots.data();
  p.stats = stats.data();
  p.rows = 5;
  p.num_slots = 2;
  p.directions = 1;
  p.layers = 2;
  p.layer_stride = 6;
  cpu::accumulate(p);
  const std::vector<double> expected = {3, 1, 1, 1, 0, -1, 1, 1, 1, 1, 1, 0, 3, 3, 3, 2,
                                        3, 0, 0, 0, 6, 1,  3, 0, 1, 0, 0, 0, 4, 4, 4, 0};
  CHECK(stats == expected, "statistics");
}

void test_two_passes_restore_the_bytes() {
  for (int64_t bytes : {0, 1, 63, 64, 65, 511, 512, 4097}) {
    std::vector<char> data(bytes, 3);
    cpu::read_pass(data.data(), bytes);
    cpu::read_modify_write_pass(data.data(), bytes);
    cpu::read_modify_write_pass(data.data(), bytes);
    CHECK(data == std::vector<char>(bytes, 3), "two passes of %ld bytes", long(bytes));
  }
}

}  // namespace

int main() {
  const char* requested_isa = std::getenv("AXISCAP_ISA");
  if (requested_isa && std::strcmp(requested_isa, cpu::isa())) {
    std::printf("this machine has no %s\n", requested_isa);
    return 77;  // SKIP_RETURN_CODE in CMakeLists.txt
  }
  test_rows_match_the_oracle_for_every_tail();
  test_the_norm_matches_the_oracle_for_every_tail();
  test_a_row_that_is_not_finite_is_left_alone();
  test_several_threads_give_the_bits_of_one();
  test_statistics_are_added_to_their_slot();
  test_two_passes_restore_the_bytes();
  std::printf("%s: %s\n", cpu::isa(), failures ? "failed" : "passed");
  return failures != 0;
}
