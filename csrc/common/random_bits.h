// Random numbers as a hash of (seed, position): megatron_ext/precision/random_bits.py.
//
//     u_i = mix(low(i) xor mix(seed) xor mix(high(i))) / 2^32, of which the upper 24 bits are used
#pragma once

#include "../common/host_device.h"

namespace megatron_ext {

MEGATRON_EXT_HD uint32_t mix(uint32_t word) {
  word ^= word >> 16;
  word *= 0x7FEB352Du;
  word ^= word >> 15;
  word *= 0x846CA68Bu;
  return word ^ (word >> 16);
}

// mix(0) = 0, so a tensor of fewer than 2^32 elements has nothing to add for the upper half.
MEGATRON_EXT_HD float uniform_number(uint32_t key, uint64_t index) {
  uint32_t word = mix(uint32_t(index) ^ key ^ mix(uint32_t(index >> 32)));
  return float(word >> 8) * 5.9604644775390625e-8f;  // 2^-24
}

MEGATRON_EXT_HD uint32_t seed_key(uint64_t seed) { return mix(uint32_t(seed)); }

// derive_seed(seed, part) of two numbers.
MEGATRON_EXT_HD uint32_t derive_seed(uint64_t seed, uint64_t part) {
  uint32_t word = mix(mix(uint32_t(seed)) ^ uint32_t(seed >> 32));
  word = mix(word ^ mix(uint32_t(part)) ^ uint32_t(part >> 32));
  return word & 0x7FFFFFFFu;
}

}  // namespace megatron_ext
