// A chunk of 16 numbers -> codes, bits of the mask, and its block's scale, in memory.
#pragma once

#include "block_scale.h"

namespace megatron_ext {

// Codes of 16 numbers, and a bit for each that was not clipped.
template <class Format>
struct Codes {
  static constexpr int kWords = kChunk * Format::kBits / 32;
  uint32_t words[kWords];
  uint32_t kept;
};

template <class Format, bool kIsPlain>
MEGATRON_EXT_DEVICE Codes<Format> encode_chunk(const CopyPlan& plan, const Chunk& values,
                                               float factor, int64_t row, int64_t column) {
  constexpr int kPerWord = 32 / Format::kBits;
  Codes<Format> codes{};
  if (!Format::kHasNan && is_nan(factor)) {
    // Whatever is not finite has made its block's scale NaN, and nothing else is NaN.
#pragma unroll
    for (int i = 0; i < Codes<Format>::kWords; ++i) codes.words[i] = 0x88888888u;
    return codes;
  }
  Chunk scaled;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) scaled.at[i] = values.at[i] * factor;
  if (!kIsPlain && plan.rule.is_stochastic) {
    uint64_t index = uint64_t(row * plan.columns + column);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float uniform = uniform_number(plan.key, index + i);
      uint32_t code;
      if constexpr (Format::kHasNan) {
        code = encode_random<Format>(scaled.at[i], uniform);
      } else {
        code = encode_number_random<Format>(scaled.at[i], uniform);
      }
      codes.words[i / kPerWord] |= code << (i % kPerWord * Format::kBits);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; i += 2) {
      uint32_t pair = encode_nearest_pair<Format>(scaled.at[i], scaled.at[i + 1]);
      codes.words[i / kPerWord] |= pair << (i % kPerWord * Format::kBits);
    }
  }
  if (!kIsPlain && plan.rule.keeps_mask) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      codes.kept |= uint32_t(magnitude(scaled.at[i]) < Format::kMaxValue) << i;
    }
  }
  return codes;
}

template <class Format>
MEGATRON_EXT_DEVICE uint32_t code_at(const Codes<Format>& codes, int i) {
  constexpr int kPerWord = 32 / Format::kBits;
  uint32_t word = codes.words[i / kPerWord] >> (i % kPerWord * Format::kBits);
  return word & ((1u << Format::kBits) - 1);
}

template <class Format>
MEGATRON_EXT_DEVICE void store_codes(const CopyPlan& plan, const Codes<Format>& codes, int64_t row,
                                     int64_t column) {
  int64_t index = row * plan.columns + column;
  if (plan.is_aligned) {
    uint8_t* to = plan.codes + index * Format::kBits / 8;
    if constexpr (Format::kBits == 8) {
      *reinterpret_cast<uint4*>(to) =
          uint4{codes.words[0], codes.words[1], codes.words[2], codes.words[3]};
    } else {
      *reinterpret_cast<uint2*>(to) = uint2{codes.words[0], codes.words[1]};
    }
    if (plan.kept) *reinterpret_cast<uint16_t*>(plan.kept + index / 8) = uint16_t(codes.kept);
    return;
  }
  // Rows of any length, for FP8 only: 4-bit rows are multiples of 16.
  constexpr int kPerByte = 8 / Format::kBits;
#pragma unroll
  for (int i = 0; i < kChunk; i += kPerByte) {
    if (column + i >= plan.columns) continue;
    constexpr int kPerWord = 32 / Format::kBits;
    uint32_t byte = codes.words[i / kPerWord] >> (i % kPerWord * Format::kBits);
    plan.codes[(index + i) / kPerByte] = uint8_t(byte);
  }
  if (plan.kept) {
    for (int i = 0; i < kChunk && column + i < plan.columns; i += 8) {
      plan.kept[(index + i) / 8] = uint8_t(codes.kept >> i);
    }
  }
}

MEGATRON_EXT_DEVICE void store_scale(const CopyPlan& plan, uint32_t code, int64_t index) {
  if (ScaleFormat(plan.rule.scale_format) == ScaleFormat::kFloat32) {
    static_cast<uint32_t*>(plan.scales)[index] = code;
  } else {
    static_cast<uint8_t*>(plan.scales)[index] = uint8_t(code);
  }
}

// EDEN: <x, x> / <x, q> over a Hadamard group; the scale times it is rounded at random.
template <class Format>
MEGATRON_EXT_DEVICE uint32_t unbiased_scale_code(const CopyPlan& plan, const Chunk& values,
                                                 const Codes<Format>& codes,
                                                 const BlockScale& block, int64_t scale_index) {
  Chunk squares, products;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    squares.at[i] = values.at[i] * values.at[i];
    products.at[i] = values.at[i] * (decode<Format>(code_at(codes, i)) * block.scale);
  }
  int lanes = plan.rule.hadamard_group / kChunk;
  float length = sum_across(tree_sum(squares), lanes);
  float overlap = sum_across(tree_sum(products), lanes);
  float factor = overlap > 0.0f ? quotient(length, overlap) : 1.0f;
  float uniform = uniform_number(plan.scales_key, uint64_t(scale_index));
  return encode_random<E4M3>(decode<E4M3>(block.code) * factor, uniform);
}

// A chunk inside of the copy, with a factor that is known.
template <class Format>
MEGATRON_EXT_DEVICE void store_quantized(const CopyPlan& plan, const Chunk& values, float factor,
                                         int64_t row, int64_t column) {
  store_codes(plan, encode_chunk<Format, false>(plan, values, factor, row, column), row, column);
}

// Everything that happens to chunks of a copy whose blocks lie in one row, or whose scales follow
// from `amax`. kIsPlain: largest magnitude and rounding to the nearest, nothing else.
template <class Format, bool kIsPlain>
class RowQuantizer {
 public:
  // `place`: number of the chunk in its tile.
  MEGATRON_EXT_DEVICE RowQuantizer(const CopyPlan& plan, int place)
      : plan_(plan), place_(place), tensor_scale_(tensor_scale_of(plan)) {
    if constexpr (!kIsPlain) {
      flips_ = sign_flips(plan.signs, plan.rule.hadamard_group, place);
    }
  }

  // Every thread of the warp must come here.
  MEGATRON_EXT_DEVICE void quantize(Chunk values, int64_t row, int64_t column) const {
    const Rule& rule = plan_.rule;
    const bool is_inside = row < plan_.rows && column < plan_.columns;
    float given = 0.0f;
    if (rule.block_columns == 0 && is_inside) given = plan_.amax[rule.block_rows == 0 ? 0 : row];
    if constexpr (!kIsPlain) {
      transform(values, Hadamard{rule.hadamard_group, plan_.hadamard_scale, flips_}, place_);
    }
    const int lanes = rule.block_columns / kChunk;
    BlockScale block = block_scale<kIsPlain>(plan_, values, lanes, given, tensor_scale_);
    const Codes<Format> codes =
        encode_chunk<Format, kIsPlain>(plan_, values, block.factor, row, column);
    int64_t scale_index = rule.block_rows == 0 ? 0 : row * plan_.across;
    if (rule.block_columns > 0) scale_index += column / rule.block_columns;
    if (!kIsPlain && ScaleRule(rule.scale_rule) == ScaleRule::kEden) {
      block.code = unbiased_scale_code<Format>(plan_, values, codes, block, scale_index);
    }
    if (!is_inside) return;
    store_codes(plan_, codes, row, column);
    if (is_first_of_block(row, column)) store_scale(plan_, block.code, scale_index);
    if (plan_.tensor_scale && row == 0 && column == 0) *plan_.tensor_scale = tensor_scale_;
  }

 private:
  MEGATRON_EXT_DEVICE bool is_first_of_block(int64_t row, int64_t column) const {
    const Rule& rule = plan_.rule;
    if (rule.block_columns > 0) return column % rule.block_columns == 0;
    return column == 0 && (rule.block_rows == 1 || row == 0);
  }

  const CopyPlan& plan_;
  int place_;
  uint32_t flips_ = 0;
  float tensor_scale_;
};

}  // namespace megatron_ext
