// The kernels for one instruction set. CMake compiles this file once for each, with the compiler flags and AXISCAP_ISA.
#include "kernels/cpu/cap.h"

namespace axiscap::AXISCAP_ISA {

void cap(const CapParams& params, int64_t begin, int64_t end) {
  switch (params.dtype) {
    case DType::kFloat32:
      return cap_rows<float>(params, begin, end);
    case DType::kBFloat16:
      return cap_rows<bfloat16>(params, begin, end);
    case DType::kFloat16:
      return cap_rows<float16>(params, begin, end);
  }
}

uint64_t read_pass(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  constexpr int kUnroll = 8;
  VecU32 acc[kUnroll] = {};
  int64_t i = 0;
  for (; i + kUnroll * int64_t(sizeof(VecU32)) <= bytes; i += kUnroll * sizeof(VecU32))
    for (int u = 0; u < kUnroll; ++u) {
      VecU32 x;
      std::memcpy(&x, p + i + u * sizeof(VecU32), sizeof(x));
      acc[u] ^= x;
    }
  uint64_t sum = 0;
  for (int u = 0; u < kUnroll; ++u)
    for (int j = 0; j < kWidth; ++j) sum ^= acc[u][j];
  for (; i < bytes; ++i) sum ^= uint8_t(p[i]);
  return sum;
}

void read_modify_write_pass(void* data, int64_t bytes) {
  char* p = static_cast<char*>(data);
  int64_t i = 0;
  for (; i + int64_t(sizeof(VecU32)) <= bytes; i += sizeof(VecU32)) {
    VecU32 x;
    std::memcpy(&x, p + i, sizeof(x));
    x ^= 1;
    std::memcpy(p + i, &x, sizeof(x));
  }
  for (; i < bytes; ++i) p[i] ^= 1;
}

}  // namespace axiscap::AXISCAP_ISA
