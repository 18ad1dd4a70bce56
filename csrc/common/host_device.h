// One source for a GPU and for a CPU.
//
// nvcc compiles a file for a GPU. g++ compiles the same file with MEGATRON_EXT_EMULATE, and every
// thread of a block becomes a fiber of emulate.h, so a kernel runs whole on a machine without one.
// Headers that need neither compile with g++ alone.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MEGATRON_EXT_HD __host__ __device__ __forceinline__
#define MEGATRON_EXT_DEVICE __device__ __forceinline__
#else
#define MEGATRON_EXT_HD inline
#define MEGATRON_EXT_DEVICE inline
#endif

namespace megatron_ext {

MEGATRON_EXT_HD uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

MEGATRON_EXT_HD float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

MEGATRON_EXT_HD float magnitude(float value) { return float_of(bits_of(value) & 0x7FFFFFFFu); }

MEGATRON_EXT_HD bool is_nan(float value) { return (bits_of(value) & 0x7FFFFFFFu) > 0x7F800000u; }

MEGATRON_EXT_HD bool is_finite(float value) {
  return (bits_of(value) & 0x7F800000u) != 0x7F800000u;
}

// The larger of two magnitudes; a NaN wins, as in torch's amax. Bits of numbers >= 0 are ordered.
MEGATRON_EXT_HD float larger_magnitude(float first, float second) {
#if defined(__CUDA_ARCH__)
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(fabsf(first)), "f"(fabsf(second)));
  return larger;
#else
  uint32_t a = bits_of(first) & 0x7FFFFFFFu, b = bits_of(second) & 0x7FFFFFFFu;
  return float_of(a > b ? a : b);
#endif
}

}  // namespace megatron_ext
