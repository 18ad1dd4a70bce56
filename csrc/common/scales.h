// Scales of blocks: megatron_ext/precision/scales.py.
#pragma once

#include "../common/small_float.h"

namespace megatron_ext {

// How a block's scale is written.
enum class ScaleFormat : int { kFloat32 = 0, kE8M0 = 1, kE4M3 = 2 };

constexpr float kSmallestScale = 1.1754943508222875e-38f;  // 2^-126
constexpr uint32_t kE8M0Nan = 255;

MEGATRON_EXT_HD float floor_power_of_two(float value) {
  return float_of(bits_of(value) & 0x7F800000u);
}

MEGATRON_EXT_HD float ceil_power_of_two(float value) {
  float below = floor_power_of_two(value);
  return below == value ? below : below * 2.0f;
}

MEGATRON_EXT_HD uint32_t encode_e8m0(float power) {
  return is_finite(power) ? bits_of(power) >> 23 : kE8M0Nan;
}

MEGATRON_EXT_HD float decode_e8m0(uint32_t code) {
  if (code == kE8M0Nan) return float_of(0x7FC00000u);
  return code == 0 ? float_of(0x00400000u) : float_of(code << 23);
}

MEGATRON_EXT_HD uint32_t encode_scale_e4m3(float scale) {
  return is_finite(scale) ? encode_nearest<E4M3>(scale) : E4M3::kNanCode;
}

// 1 / s, and 0 for a scale that stands for zeros.
MEGATRON_EXT_HD float reciprocal(float scale) {
#if defined(__CUDA_ARCH__)
  return scale < kSmallestScale ? 0.0f : __frcp_rn(scale);
#else
  return scale < kSmallestScale ? 0.0f : 1.0f / scale;
#endif
}

MEGATRON_EXT_HD float square_root(float value) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(value);
#else
  return __builtin_sqrtf(value);
#endif
}

MEGATRON_EXT_HD float quotient(float dividend, float divisor) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(dividend, divisor);
#else
  return dividend / divisor;
#endif
}

}  // namespace megatron_ext
