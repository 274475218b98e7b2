// The kernels without torch: against a float64 oracle, over every place where a row, a tail or a bank can end. Buffers
// are allocated to the byte, so that a sanitizer sees one element too far; ranges of rows run on threads of their own.
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

float to_float(DType dtype, const char* at) {
  if (dtype == DType::kFloat32) {
    float x;
    std::memcpy(&x, at, sizeof(x));
    return x;
  }
  uint16_t half;
  std::memcpy(&half, at, sizeof(half));
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

// Any number near x that the dtype has will do as an input.
void from_float(DType dtype, float x, char* at) {
  if (dtype == DType::kFloat32) {
    std::memcpy(at, &x, sizeof(x));
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
  std::memcpy(at, &half, sizeof(half));
}

double rounding(DType dtype) {
  return dtype == DType::kFloat32 ? 0x1p-24 : dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-11;
}

struct Call {
  std::vector<char> hidden, residual, out;
  std::vector<float> axes, floors, targets, norm_limits, projections;
  std::vector<int32_t> slots;
  std::vector<uint8_t> fired;
  CapParams params;
};

Call make(DType dtype, int64_t rows, int64_t size, int64_t padding, int64_t directions, bool sum, bool in_place,
          unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Call call;
  CapParams& p = call.params;
  const int64_t bytes = dtype == DType::kFloat32 ? 4 : 2;
  const int64_t stride = size + padding;
  const auto fill = [&](std::vector<char>& buffer) {
    // The last row has no padding behind it: reading on would leave the allocation.
    buffer.resize(rows ? ((rows - 1) * stride + size) * bytes : 0);
    for (size_t i = 0; i < buffer.size(); i += bytes) from_float(dtype, normal(random), &buffer[i]);
  };
  p.dtype = dtype;
  p.rows = rows;
  p.hidden_size = size;
  p.num_slots = 2;
  p.directions = directions;
  fill(call.hidden);
  p.hidden_stride = stride;
  if (sum) {
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
    // About half of the rows of slot 0 are beyond its limit, and none of slot 1.
    call.norm_limits = {std::sqrt(float(size) * (sum ? 2 : 1)), INFINITY};
  }
  call.slots.resize(rows);
  for (int32_t& slot : call.slots) slot = int32_t(random() % 8 ? random() % 2 : -1);
  call.projections.resize(rows * directions);
  call.fired.resize(rows * directions);
  if (!in_place) call.out.resize(rows * size * bytes);
  p.out_stride = in_place ? stride : size;
  return call;
}

// The vectors may have moved since `make`.
void point(Call& call) {
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
  const int64_t bytes = p.dtype == DType::kFloat32 ? 4 : 2;
  const std::vector<char>& base = before.residual.empty() ? before.hidden : before.residual;
  const std::vector<char>& result = !after.out.empty()       ? after.out
                                    : after.residual.empty() ? after.hidden
                                                             : after.residual;
  std::vector<double> x(p.hidden_size);
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t from = row * p.hidden_stride * bytes, to = row * p.out_stride * bytes;
    double largest = 1, correction = 0, squares = 0;
    for (int64_t i = 0; i < p.hidden_size; ++i) {
      x[i] = to_float(p.dtype, &before.hidden[from + i * bytes]);
      if (!before.residual.empty()) x[i] += to_float(p.dtype, &before.residual[from + i * bytes]);
      largest += std::fabs(x[i]);
      squares += x[i] * x[i];
    }
    const int32_t slot = before.slots[row];
    const double limit = slot < 0 || before.norm_limits.empty() ? INFINITY : before.norm_limits[slot];
    if (std::fabs(std::sqrt(squares) - limit) < 1e-5 * limit) continue;  // rounding decides
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
      const double wanted = to_float(p.dtype, &base[from + i * bytes]) + (x[i] - incoming[i]);
      const double found = to_float(p.dtype, &result[to + i * bytes]);
      const double allowed = rounding(p.dtype) * std::fabs(wanted) + 0x1p-24 + 0x1p-20 * (largest + correction);
      CHECK(std::fabs(found - wanted) <= allowed, "%s, row %ld, element %ld of %ld: %g for %g", name, long(row),
            long(i), long(p.hidden_size), found, wanted);
    }
    bool any = false;
    for (int64_t k = 0; k < p.directions; ++k) any |= after.fired[row * p.directions + k] != 0;
    if (!any)
      CHECK(!std::memcmp(&result[to], &base[from], p.hidden_size * bytes), "%s, row %ld changed", name, long(row));
  }
}

void run(Call& call) {
  point(call);
  cpu::cap(call.params, 0, call.params.rows);
}

void test_every_tail() {
  unsigned seed = 0;
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
    for (int64_t size : {1, 2, 7, 8, 15, 16, 31, 32, 33, 63, 64, 65, 97, 576})
      for (int64_t rows : {0, 1, 3, 4, 5, 8, 13})
        for (int64_t directions : {1, 3})
          for (bool sum : {false, true})
            for (bool in_place : {false, true}) {
              const Call before = make(dtype, rows, size, seed % 3, directions, sum, in_place, seed);
              ++seed;
              Call after = before;
              run(after);
              check_against_oracle(before, after, sum ? "sum" : in_place ? "in place" : "copy");
            }
}

float from_fp8(uint8_t code) {
  const int exponent = code >> 3 & 15, fraction = code & 7;
  const float size = exponent ? std::ldexp(8.f + fraction, exponent - 10) : std::ldexp(float(fraction), -9);
  return code & 0x80 ? -size : size;
}

// The norm of the stored row, and that in fp8 with a scale for all rows and with each row's own.
void test_the_norm_of_every_tail() {
  unsigned seed = 0;
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
    for (int64_t size : {1, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 576})
      for (int kind : {0, 1, 2}) {
        constexpr int64_t kRows = 5;
        Call call = make(dtype, kRows, size, seed % 3, 1, true, true, seed);
        ++seed;
        const int64_t bytes = dtype == DType::kFloat32 ? 4 : 2, item = kind ? 1 : bytes;
        std::vector<char> weight(size * bytes), normed(kRows * size * item);
        std::vector<float> scales(kRows);
        const float scale = 0.02f;
        for (int64_t i = 0; i < size; ++i) from_float(dtype, 0.5f + float(i % 5), &weight[i * bytes]);
        CapParams& p = call.params;
        p.weight = weight.data();
        p.eps = 1e-6f;
        p.normed = normed.data();
        p.normed_stride = size;
        if (kind == 1) p.scale = &scale;
        if (kind == 2) p.scales = scales.data();
        run(call);
        for (int64_t row = 0; row < kRows; ++row) {
          const char* stored = &call.residual[row * p.residual_stride * bytes];
          double squares = 0, largest = 0;
          for (int64_t i = 0; i < size; ++i) squares += std::pow(double(to_float(dtype, stored + i * bytes)), 2);
          const double root = std::sqrt(squares / double(size) + 1e-6);
          const auto norm = [&](int64_t i) {
            return to_float(dtype, stored + i * bytes) / root * to_float(dtype, &weight[i * bytes]);
          };
          for (int64_t i = 0; i < size; ++i) largest = std::max(largest, std::fabs(norm(i)));
          const double over = kind == 0 ? 1 : kind == 1 ? scale : double(scales[row]);
          if (kind == 2) CHECK(std::fabs(over * 448 / largest - 1) < 0.01, "a scale of %g", over);
          for (int64_t i = 0; i < size; ++i) {
            const char* at = &normed[(row * size + i) * item];
            const double found = kind ? from_fp8(uint8_t(*at)) * over : to_float(dtype, at);
            const double wanted = std::clamp(norm(i), -448 * over, 448 * over);
            const double allowed = kind == 0 ? rounding(dtype) * std::fabs(wanted) + 1e-6
                                             : 0.07 * std::fabs(wanted) + 0x1p-10 * over + 1e-6;
            CHECK(std::fabs(found - wanted) <= allowed + 1e-5 * std::fabs(wanted), "kind %d, element %ld: %g for %g",
                  kind, long(i), found, wanted);
          }
        }
      }
}

void test_rows_that_are_not_finite() {
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    Call call = make(dtype, 9, 70, 0, 1, false, true, 0);
    std::fill(call.slots.begin(), call.slots.end(), 0);
    call.floors = {100, 100};
    const uint16_t infinity = dtype == DType::kBFloat16 ? 0x7f80 : 0x7c00;
    const float infinite = INFINITY;
    char* at = &call.hidden[(4 * 70 + 69) * (dtype == DType::kFloat32 ? 4 : 2)];
    if (dtype == DType::kFloat32)
      std::memcpy(at, &infinite, 4);
    else
      std::memcpy(at, &infinity, 2);
    const std::vector<char> before = call.hidden;
    run(call);
    const size_t row = before.size() / 9;
    CHECK(!std::memcmp(&before[4 * row], &call.hidden[4 * row], row), "the row was changed");
    CHECK(std::isnan(call.projections[4]) && !std::isnan(call.projections[5]), "reported as %g", call.projections[4]);
    CHECK(call.fired[5] && !call.fired[4], "fired");
  }
}

void test_threads_over_ranges_give_the_bits_of_one() {
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const Call before = make(dtype, 203, 100, 1, 2, true, true, 7);
    Call one = before, many = before;
    run(one);
    point(many);
    std::vector<std::thread> threads;
    for (int64_t begin = 0; begin < 203; begin += 29)
      threads.emplace_back([&many, begin] { cpu::cap(many.params, begin, std::min<int64_t>(begin + 29, 203)); });
    for (std::thread& thread : threads) thread.join();
    CHECK(one.residual == many.residual, "threads show");
    CHECK(!std::memcmp(one.projections.data(), many.projections.data(), one.projections.size() * 4), "threads show");
    CHECK(one.fired == many.fired, "threads show");
  }
}

void test_statistics() {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  // Two layers of five rows, in a buffer with room for six; the second layer fires nowhere.
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
  const std::vector<double> wanted = {3, 1, 1, 1, 0, -1, 1, 1, 1, 1, 1, 0, 3, 3, 3, 2,
                                      3, 0, 0, 0, 6, 1,  3, 0, 1, 0, 0, 0, 4, 4, 4, 0};
  CHECK(stats == wanted, "statistics");
}

void test_passes() {
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
  const char* asked = std::getenv("AXISCAP_ISA");
  if (asked && std::strcmp(asked, cpu::isa())) {
    std::printf("this machine has no %s\n", asked);
    return 77;  // ctest's SKIP_RETURN_CODE
  }
  test_every_tail();
  test_the_norm_of_every_tail();
  test_rows_that_are_not_finite();
  test_threads_over_ranges_give_the_bits_of_one();
  test_statistics();
  test_passes();
  std::printf("%s: %s\n", cpu::isa(), failures ? "failed" : "passed");
  return failures != 0;
}
