// Selects the instruction set once, and runs its kernels.
#include "launchers/cpu.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

namespace axiscap {

struct Kernels {
  const char* isa;
  void (*cap)(const CapParams&, int64_t, int64_t);
  uint64_t (*read_pass)(const void*, int64_t);
  void (*read_modify_write_pass)(void*, int64_t);
};

#define AXISCAP_DECLARE(ISA)                                                         \
  namespace ISA {                                                                    \
  void cap(const CapParams&, int64_t, int64_t);                                      \
  uint64_t read_pass(const void*, int64_t);                                          \
  void read_modify_write_pass(void*, int64_t);                                       \
  inline constexpr Kernels kernels = {#ISA, cap, read_pass, read_modify_write_pass}; \
  }

#if defined(__x86_64__)
AXISCAP_DECLARE(avx512bf16)
AXISCAP_DECLARE(avx512)
AXISCAP_DECLARE(avx2)
#endif
#if defined(__aarch64__)
// Every processor of this architecture has NEON.
AXISCAP_DECLARE(neon)
#else
AXISCAP_DECLARE(baseline)
#endif

namespace {

const Kernels& select_kernels() {
#if defined(__aarch64__)
  return neon::kernels;
#else
#if defined(__x86_64__)
  const char* requested_isa = std::getenv("AXISCAP_ISA");
  const auto is_allowed = [requested_isa](const Kernels& kernels) {
    return !requested_isa || !*requested_isa || !std::strcmp(requested_isa, kernels.isa);
  };
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool has_avx512bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  if (has_avx512bf16 && is_allowed(avx512bf16::kernels)) return avx512bf16::kernels;
  if (has_avx512 && is_allowed(avx512::kernels)) return avx512::kernels;
  if (has_avx2 && is_allowed(avx2::kernels)) return avx2::kernels;
#endif
  return baseline::kernels;
#endif
}

const Kernels& kernels() {
  static const Kernels& selected = select_kernels();
  return selected;
}

// Adds a row's projections to the statistics of its slot. projections, floors: (directions,); stats: (directions,
// kStatFields).
void accumulate_row(const float* projections, const float* floors, int64_t directions, double* stats) {
  bool fired = false;
  for (int64_t k = 0; k < directions; ++k) {
    const double projection = projections[k];
    const double floor = floors[k];
    double* s = stats + k * kStatFields;
    s[kSeen] += 1;
    if (!std::isfinite(projection)) {
      s[kNonFinite] += 1;
      continue;
    }
    s[kSum] += projection;
    s[kMin] = std::min(s[kMin], projection);
    s[kMax] = std::max(s[kMax], projection);
    if (projection >= floor) continue;
    s[kBelow] += 1;
    s[kShortfall] += floor - projection;
    // The row is unchanged until a direction fires, so the first direction below its floor fires first.
    if (!fired) s[kFired] += 1;
    fired = true;
  }
}

}  // namespace

namespace cpu {

void cap(const CapParams& params, int64_t begin, int64_t end) { kernels().cap(params, begin, end); }

void accumulate(const StatsParams& p) {
  for (int64_t layer = 0; layer < p.layers; ++layer) {
    const float* projections = p.projections + layer * p.layer_stride;
    for (int64_t row = 0; row < p.rows; ++row) {
      const int32_t slot = p.slots ? p.slots[row] : 0;
      if (slot == kNoSlot) continue;
      const int64_t entry = (layer * p.num_slots + slot) * p.directions;
      accumulate_row(projections + row * p.directions, p.floors + entry, p.directions, p.stats + entry * kStatFields);
    }
  }
}

uint64_t read_pass(const void* data, int64_t bytes) { return kernels().read_pass(data, bytes); }

void read_modify_write_pass(void* data, int64_t bytes) { kernels().read_modify_write_pass(data, bytes); }

const char* isa() { return kernels().isa; }

}  // namespace cpu
}  // namespace axiscap
