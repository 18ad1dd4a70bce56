// Number formats of 8 and 4 bits: megatron_ext/precision/formats.py.
//
// With t = min(|x|, largest) and e the exponent of max(t, smallest normal), neighbours lie
// 2^(e - m) apart. Adding M = 2^(e + 23 - m) to t leaves k = rint(t / step) in the sum's last bits,
// because float32 numbers around M lie just as far apart and are rounded to even as well. Then
//
//     code = k + (e - e_min) 2^m           (k reaches 2^(m + 1) where t rounds up to the next power)
//
// holds for normal and subnormal values alike. Stochastic: k = floor(t / step + u).
#pragma once

#include "../common/host_device.h"

namespace megatron_ext {

struct E4M3 {
  static constexpr int kBits = 8, kMantissaBits = 3, kMinExponent = -6, kMaxExponent = 8;
  static constexpr uint32_t kMaxCode = 0x7E, kNanCode = 0x7F;
  static constexpr bool kHasNan = true;
  static constexpr float kMaxValue = 448.0f;
};

struct E5M2 {
  static constexpr int kBits = 8, kMantissaBits = 2, kMinExponent = -14, kMaxExponent = 15;
  static constexpr uint32_t kMaxCode = 0x7B, kNanCode = 0x7E;
  static constexpr bool kHasNan = true;
  static constexpr float kMaxValue = 57344.0f;
};

struct E2M1 {
  static constexpr int kBits = 4, kMantissaBits = 1, kMinExponent = 0, kMaxExponent = 2;
  // It has no NaN: a zero of the other sign stands for one, the scale tells.
  static constexpr uint32_t kMaxCode = 0x7, kNanCode = 0x0;
  static constexpr bool kHasNan = false;
  static constexpr float kMaxValue = 6.0f;
};

template <class Format>
MEGATRON_EXT_HD uint32_t sign_code(float value) {
  return (bits_of(value) >> 31) << (Format::kBits - 1);
}

template <class Format>
MEGATRON_EXT_HD uint32_t nan_code(float value) {
  if (Format::kHasNan) return sign_code<Format>(value) | Format::kNanCode;
  return sign_code<Format>(value) ^ (1u << (Format::kBits - 1));
}

// min(|x|, largest); NaN becomes the largest, and is put right by who asked.
template <class Format>
MEGATRON_EXT_HD float clamped_magnitude(float value) {
  float size = magnitude(value);
  return size < Format::kMaxValue ? size : Format::kMaxValue;
}

// Bits of 2^e, e as above.
template <class Format>
MEGATRON_EXT_HD uint32_t step_exponent(float clamped) {
  constexpr uint32_t kSmallest = uint32_t(127 + Format::kMinExponent) << 23;
  uint32_t power = bits_of(clamped) & 0x7F800000u;
  return power > kSmallest ? power : kSmallest;
}

template <class Format>
MEGATRON_EXT_HD uint32_t code_of_steps(uint32_t steps, uint32_t power) {
  constexpr int kShift = 23 - Format::kMantissaBits;
  constexpr uint32_t kSmallest = uint32_t(127 + Format::kMinExponent) << Format::kMantissaBits;
  return steps + (power >> kShift) - kSmallest;
}

// Of a number that is no NaN.
template <class Format>
MEGATRON_EXT_HD uint32_t encode_number_nearest(float value) {
  float clamped = clamped_magnitude<Format>(value);
  uint32_t power = step_exponent<Format>(clamped);
  uint32_t magic = power + (uint32_t(23 - Format::kMantissaBits) << 23);
  uint32_t steps = bits_of(clamped + float_of(magic)) - magic;
  return code_of_steps<Format>(steps, power) | sign_code<Format>(value);
}

template <class Format>
MEGATRON_EXT_HD uint32_t encode_number_random(float value, float uniform) {
  float clamped = clamped_magnitude<Format>(value);
  uint32_t power = step_exponent<Format>(clamped);
  // 1 / step is a power of two, so the product is exact; the sum is rounded once, as in torch.
  float inverse = float_of((uint32_t(254 + Format::kMantissaBits) << 23) - power);
  uint32_t steps = uint32_t(clamped * inverse + uniform);
  uint32_t code = code_of_steps<Format>(steps, power);
  return (code < Format::kMaxCode ? code : Format::kMaxCode) | sign_code<Format>(value);
}

template <class Format>
MEGATRON_EXT_HD uint32_t encode_nearest(float value) {
  return is_nan(value) ? nan_code<Format>(value) : encode_number_nearest<Format>(value);
}

template <class Format>
MEGATRON_EXT_HD uint32_t encode_random(float value, float uniform) {
  return is_nan(value) ? nan_code<Format>(value) : encode_number_random<Format>(value, uniform);
}

// The value of a code; NaN where the format has one. Exact.
template <class Format>
MEGATRON_EXT_HD float decode(uint32_t code) {
  constexpr uint32_t kSign = 1u << (Format::kBits - 1);
  uint32_t size = code & (kSign - 1);
  uint32_t exponent = size >> Format::kMantissaBits;
  uint32_t fraction = size & ((1u << Format::kMantissaBits) - 1);
  fraction |= uint32_t(exponent > 0) << Format::kMantissaBits;
  int power = int(exponent > 0 ? exponent : 1) - 1 + Format::kMinExponent - Format::kMantissaBits;
  float value = float(fraction) * float_of(uint32_t(127 + power) << 23);
  if (Format::kHasNan && size > Format::kMaxCode) {
    bool is_infinite = Format::kNanCode == 0x7E && size == Format::kMaxCode + 1;
    value = float_of(is_infinite ? 0x7F800000u : 0x7FC00000u);
  }
  return code & kSign ? -value : value;
}

// The nearest value of the format, with x's sign.
template <class Format>
MEGATRON_EXT_HD float round_to(float value) {
  if (is_nan(value)) return value;
  float clamped = clamped_magnitude<Format>(value);
  float magic = float_of(step_exponent<Format>(clamped) +
                         (uint32_t(23 - Format::kMantissaBits) << 23));
  float rounded = (clamped + magic) - magic;
  return float_of(bits_of(rounded) | (bits_of(value) & 0x80000000u));
}

// Codes of two neighbours to the nearest, the first in the lower bits: one instruction where the
// device has it. In a format that has NaN the numbers may be NaN; E5M2's is put right here.
template <class Format>
MEGATRON_EXT_HD uint32_t encode_nearest_pair(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  if constexpr (Format::kBits == 8) {
    uint16_t pair;
    if constexpr (Format::kMantissaBits == 3) {
      asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
      return pair;
    } else {
      asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
      uint32_t codes = pair;
      if (is_nan(first)) codes = (codes & 0xFF00u) | Format::kNanCode;
      if (is_nan(second)) codes = (codes & 0x00FFu) | (Format::kNanCode << 8);
      return codes;
    }
  }
#if defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM103_ALL) || \
    defined(__CUDA_ARCH_FEAT_SM120_ALL) || defined(__CUDA_ARCH_FEAT_SM121_ALL) || \
    (defined(__CUDA_ARCH_FAMILY_SPECIFIC__) && __CUDA_ARCH__ >= 1000)
  if constexpr (Format::kBits == 4) {
    uint32_t pair;
    asm("{ .reg .b8 pair; cvt.rn.satfinite.e2m1x2.f32 pair, %1, %2; cvt.u32.u8 %0, pair; }"
        : "=r"(pair)
        : "f"(second), "f"(first));
    return pair;
  }
#endif
#endif
  if constexpr (Format::kHasNan) {
    return encode_nearest<Format>(first) | (encode_nearest<Format>(second) << Format::kBits);
  }
  return encode_number_nearest<Format>(first) |
         (encode_number_nearest<Format>(second) << Format::kBits);
}

}  // namespace megatron_ext
