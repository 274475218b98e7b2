// Vectors of float in the vector extension of GCC and Clang (x86, Arm and others), and loads and stores for the three
// row dtypes. AXISCAP_ISA is the namespace: the file is compiled once for each instruction set, and each copy needs its
// own symbols. Intrinsics are used only if GCC has no good code for a conversion between widths.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels/params.h"

namespace axiscap::AXISCAP_ISA {

#if defined(__AVX512F__)
inline constexpr int kWidth = 16;
#elif defined(__AVX2__)
inline constexpr int kWidth = 8;
#else
inline constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef uint32_t VecU32 __attribute__((vector_size(kWidth * 4)));
typedef uint16_t VecU16 __attribute__((vector_size(kWidth * 2)));

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline Vec broadcast(float x) { return x - Vec{}; }

inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof(x)); }

inline void store(float* p, Vec x, Vec y) {
  store(p, x);
  store(p + kWidth, y);
}

// a * b + c, with one rounding if the instruction set has a fused multiply-add. It is explicit, because a compiler may
// contract one loop and not another one, and a row must have the same bits in all of them.
inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

inline VecU32 widen(const uint16_t* p) {
  VecU16 half;
  std::memcpy(&half, p, sizeof(half));
  return __builtin_convertvector(half, VecU32);
}

// Stores the low halves of x, then the low halves of y.
inline void narrow(uint16_t* p, VecU32 x, VecU32 y) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i packed = _mm256_packus_epi32((__m256i)x, (__m256i)y);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
#else
  const VecU16 halves[2] = {__builtin_convertvector(x, VecU16), __builtin_convertvector(y, VecU16)};
  std::memcpy(p, halves, sizeof(halves));
#endif
}

// A bfloat16 is the upper half of a float. One shuffle moves it to the upper half and clears the lower half.
inline Vec load(const bfloat16* p) {
#if defined(__AVX512F__)
  alignas(64) static constexpr uint16_t kToUpperHalves[32] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                                              0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  const __m512i half = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return (Vec)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, _mm512_load_si512(kToUpperHalves), half);
#elif defined(__AVX2__)
  constexpr char kZero = -1;
  const __m256i to_upper_halves =
      _mm256_setr_epi8(kZero, kZero, 0, 1, kZero, kZero, 2, 3, kZero, kZero, 4, 5, kZero, kZero, 6, 7,  //
                       kZero, kZero, 8, 9, kZero, kZero, 10, 11, kZero, kZero, 12, 13, kZero, kZero, 14, 15);
  const __m256i half = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return (Vec)_mm256_shuffle_epi8(half, to_upper_halves);
#else
  return bit_cast<Vec>(widen(&p->bits) << 16);
#endif
}

// Rounds to nearest even; the result is in the upper half. NaN needs no special case: a corrected row has no NaN,
// because its projection was finite, and the NaN of a sum of two bfloat16 has a lower half of zeros, so nothing
// carries.
inline VecU32 round_to_bfloat16(Vec x) {
  const VecU32 bits = bit_cast<VecU32>(x);
#if defined(__AVX512F__)
  // A test and a blend are two operations, shift, mask and sum are three: the loop is bound by their number.
  const __mmask16 odd = _mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(0x10000));
  return bits + (VecU32)_mm512_mask_blend_epi32(odd, _mm512_set1_epi32(0x7fff), _mm512_set1_epi32(0x8000));
#else
  return bits + 0x7fff + ((bits >> 16) & 1);
#endif
}

inline void store(bfloat16* p, Vec x, Vec y) {
#if defined(__AVX512BF16__)
  // One instruction rounds both, but treats subnormal numbers as zero. If a result is zero, the code below decides.
  const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
  if (__builtin_expect(_mm512_testn_epi16_mask(rounded, _mm512_set1_epi16(0x7fff)) == 0, 1)) {
    _mm512_storeu_si512(p, rounded);
    return;
  }
#endif
#if defined(__AVX512F__)
  alignas(64) static constexpr uint16_t kUpperHalves[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                            23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                            45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  _mm512_storeu_si512(p, _mm512_permutex2var_epi16((__m512i)round_to_bfloat16(x), _mm512_load_si512(kUpperHalves),
                                                   (__m512i)round_to_bfloat16(y)));
#else
  narrow(&p->bits, round_to_bfloat16(x) >> 16, round_to_bfloat16(y) >> 16);
#endif
}

#if defined(__AVX512F__)
inline Vec load(const float16* p) {
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(float16* p, Vec x, Vec y) {
  __m256i* to = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(to, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
  _mm256_storeu_si256(to + 1, _mm512_cvtps_ph((__m512)y, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
inline Vec load(const float16* p) { return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store(float16* p, Vec x, Vec y) {
  __m128i* to = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(to, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(to + 1, _mm256_cvtps_ph((__m256)y, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)
typedef __fp16 VecF16 __attribute__((vector_size(kWidth * 2)));
inline Vec load(const float16* p) {
  VecF16 half;
  std::memcpy(&half, p, sizeof(half));
  return __builtin_convertvector(half, Vec);
}
inline void store(float16* p, Vec x, Vec y) {
  const VecF16 halves[2] = {__builtin_convertvector(x, VecF16), __builtin_convertvector(y, VecF16)};
  std::memcpy(p, halves, sizeof(halves));
}
#else
// Without a conversion instruction the float is built from its fields. Scaling by 2^112 changes the exponent's bias
// from 15 to 127 and is exact for normal and subnormal halves. For infinity and NaN the exponent is set to all ones.
inline Vec load(const float16* p) {
  const VecU32 bits = widen(&p->bits);
  const VecU32 magnitude = (bits & 0x7fff) << 13;
  const VecU32 special = (VecU32)((bits & 0x7c00) == 0x7c00);
  const VecU32 scaled = bit_cast<VecU32>(bit_cast<Vec>(magnitude) * 0x1p112f);
  return bit_cast<Vec>(((scaled & ~special) | ((magnitude | 0x7f800000) & special)) | ((bits & 0x8000) << 16));
}
// Normal halves are rounded as integers. Subnormal halves are rounded by adding 0.5, whose last place is 2^-24. Numbers
// from 65520 on become infinite.
inline VecU32 round_to_float16(Vec x) {
  const VecU32 bits = bit_cast<VecU32>(x);
  const VecU32 magnitude = bits & 0x7fffffff;
  const VecU32 normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const VecU32 subnormal = bit_cast<VecU32>(bit_cast<Vec>(magnitude) + 0.5f) - 0x3f000000;
  const VecU32 is_subnormal = (VecU32)(magnitude < (113u << 23));
  const VecU32 is_infinite = (VecU32)(magnitude >= 0x477ff000);
  const VecU32 finite = (normal & ~is_subnormal) | (subnormal & is_subnormal);
  const VecU32 is_nan = (VecU32)(magnitude > 0x7f800000);
  return (finite & ~is_infinite) | (0x7c00 & is_infinite) | (0x200 & is_nan) | ((bits >> 16) & 0x8000);
}
inline void store(float16* p, Vec x, Vec y) { narrow(&p->bits, round_to_float16(x), round_to_float16(y)); }
#endif

inline Vec magnitude(Vec x) { return bit_cast<Vec>(bit_cast<VecU32>(x) & 0x7fffffff); }

// Rounds to fp8 (E4M3). A number outside its range becomes the largest fp8 number. Below 2^-6 fp8 numbers are subnormal
// with steps of 2^-9. These are also the steps of float32 above 2^14, so adding 2^14 rounds to them. From 2^-6 on, the
// last 20 bits of the mantissa are rounded off, and the exponent's bias changes from 127 to 7.
inline VecU32 round_to_fp8(Vec x) {
  const VecU32 bits = bit_cast<VecU32>(x), magnitude = bits & 0x7fffffff;
  const VecU32 largest = bit_cast<VecU32>(broadcast(kFp8Max)), is_larger = (VecU32)(magnitude > largest);
  const VecU32 clamped = (magnitude & ~is_larger) | (largest & is_larger);
  const VecU32 normal = ((clamped + 0x7ffff + ((clamped >> 20) & 1)) >> 20) - (120u << 3);
  const VecU32 subnormal = bit_cast<VecU32>(bit_cast<Vec>(clamped) + 0x1p14f) - 0x46800000;
  const VecU32 is_subnormal = (VecU32)(clamped < (121u << 23)), is_nan = (VecU32)(magnitude > 0x7f800000);
  return (normal & ~is_subnormal) | (subnormal & is_subnormal) | (0x7f & is_nan) | ((bits >> 24) & 0x80);
}

inline void store_fp8(uint8_t* p, Vec x, Vec y) {
  typedef uint8_t VecU8 __attribute__((vector_size(kWidth)));
  const VecU8 bytes[2] = {__builtin_convertvector(round_to_fp8(x), VecU8),
                          __builtin_convertvector(round_to_fp8(y), VecU8)};
  std::memcpy(p, bytes, sizeof(bytes));
}

}  // namespace axiscap::AXISCAP_ISA
