// Sums, largest magnitudes and Hadamard transforms over a row that neighbouring threads hold in
// chunks of 16: within a chunk in registers, across chunks by shuffles.
//
// The order is reference.py's: neighbours first, then neighbours of those. a + b = b + a in IEEE
// arithmetic, so both threads of a shuffle have the same sum.
#pragma once

#include "../common/launch.h"

namespace megatron_ext {

constexpr int kChunk = 16;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

struct Chunk {
  float at[kChunk];
};

// Neighbours first is halves last.
template <int kCount>
MEGATRON_EXT_DEVICE float sum_of_halves(const float* terms) {
  if constexpr (kCount == 1) {
    return terms[0];
  } else {
    return sum_of_halves<kCount / 2>(terms) + sum_of_halves<kCount / 2>(terms + kCount / 2);
  }
}

MEGATRON_EXT_DEVICE float tree_sum(const Chunk& terms) { return sum_of_halves<kChunk>(terms.at); }

MEGATRON_EXT_DEVICE float largest_magnitude(const Chunk& values) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) largest = larger_magnitude(largest, values.at[i]);
  return largest;
}

// Over 1, 2, 4 or 8 neighbouring threads; all of them get the result.
MEGATRON_EXT_DEVICE float sum_across(float value, int lanes) {
  for (int lane = 1; lane < lanes; lane *= 2) value += __shfl_xor_sync(kAllLanes, value, lane);
  return value;
}

MEGATRON_EXT_DEVICE float max_across(float value, int lanes) {
  for (int lane = 1; lane < lanes; lane *= 2) {
    value = larger_magnitude(value, __shfl_xor_sync(kAllLanes, value, lane));
  }
  return value;
}

// A transform of groups of `group` (1: none), scaled by 1 / sqrt(group); `flips` has a bit for
// each value whose sign turns first. `place` is the chunk's number in its row.
struct Hadamard {
  int group;
  float scale;
  uint32_t flips;
};

MEGATRON_EXT_DEVICE uint32_t sign_flips(const float* signs, int group, int place) {
  uint32_t flips = 0;
  if (signs == nullptr) return flips;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    int at = (place * kChunk + i) & (group - 1);
    flips |= (bits_of(signs[at]) >> 31) << i;
  }
  return flips;
}

MEGATRON_EXT_DEVICE void transform(Chunk& values, const Hadamard& hadamard, int place) {
  if (hadamard.group == 1) return;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    values.at[i] = float_of(bits_of(values.at[i]) ^ ((hadamard.flips >> i) << 31));
  }
#pragma unroll
  for (int span = 1; span < kChunk; span *= 2) {
    if (span < hadamard.group) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if ((i & span) == 0) {
          float first = values.at[i], second = values.at[i + span];
          values.at[i] = first + second;
          values.at[i + span] = first - second;
        }
      }
    }
  }
  for (int lane = 1; lane * kChunk < hadamard.group; lane *= 2) {
    // The second of a pair is first - second: its own with the other sign, added.
    uint32_t minus = (place & lane) ? 0x80000000u : 0u;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      float other = __shfl_xor_sync(kAllLanes, values.at[i], lane);
      values.at[i] = other + float_of(bits_of(values.at[i]) ^ minus);
    }
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) values.at[i] *= hadamard.scale;
}

}  // namespace megatron_ext
