// The scale of a block: from its largest magnitude or its values, through the scale's own format,
// to the factor that its values are multiplied with.
#pragma once

#include "../common/chunk.h"
#include "copy_plan.h"

namespace megatron_ext {

struct BlockScale {
  uint32_t code;            // as stored: of E8M0 or E4M3, or the bits of a float32
  float scale;              // what decoded codes are multiplied with
  float factor;             // 1 / scale
};

// What all blocks' scales are relative to; 1 where the format has no such thing.
MEGATRON_EXT_HD float tensor_scale_of(const CopyPlan& plan) {
  if (ScaleRule(plan.rule.scale_rule) == ScaleRule::kHeadroom) return float(kHeadroom);
  if (!plan.rule.has_tensor_scale) return 1.0f;
  float scale = plan.amax[0] * plan.tensor_factor;
  return scale < kSmallestScale ? 1.0f : scale;
}

MEGATRON_EXT_HD float absmax_scale(const CopyPlan& plan, float largest) {
  bool is_e8m0 = ScaleFormat(plan.rule.scale_format) == ScaleFormat::kE8M0;
  if (is_e8m0 && !plan.rule.rounds_scale_up) return floor_power_of_two(largest) * plan.floor_factor;
  float scale = largest * plan.inverse_max;
  if (ScaleRule(plan.rule.scale_rule) == ScaleRule::kEden) scale *= float(kEdenFactor);
  if (is_e8m0 || plan.rule.power_of_two_scales) return ceil_power_of_two(scale);
  return scale;
}

// Power of two nearest to 2.92 / 6 of the standard deviation; `lanes` threads hold the block.
MEGATRON_EXT_DEVICE float quest_scale(const Chunk& values, int lanes) {
  Chunk squares;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) squares.at[i] = values.at[i] * values.at[i];
  float share = 1.0f / float(lanes * kChunk);
  float mean = sum_across(tree_sum(values), lanes) * share;
  float variance = sum_across(tree_sum(squares), lanes) * share - mean * mean;
  if (variance < 0.0f) variance = 0.0f;
  return floor_power_of_two(square_root(variance) * float(kQuestFactor * 1.4142135623730951));
}

MEGATRON_EXT_HD float decode_scale(const CopyPlan& plan, uint32_t code) {
  switch (ScaleFormat(plan.rule.scale_format)) {
    case ScaleFormat::kE8M0: return decode_e8m0(code);
    case ScaleFormat::kE4M3: return decode<E4M3>(code);
    default: return float_of(code);
  }
}

MEGATRON_EXT_HD BlockScale block_scale_of_code(const CopyPlan& plan, uint32_t code,
                                               float tensor_scale) {
  float scale = decode_scale(plan, code) * tensor_scale;
  return {code, scale, reciprocal(scale)};
}

// What E4M3 scales are made of: relative to the tensor's.
MEGATRON_EXT_HD float relative_scale(float ideal, float tensor_scale) {
  return ideal * reciprocal(tensor_scale);
}

MEGATRON_EXT_HD uint32_t code_of_scale(const CopyPlan& plan, float ideal, float tensor_scale) {
  switch (ScaleFormat(plan.rule.scale_format)) {
    case ScaleFormat::kE8M0: return encode_e8m0(ideal);
    case ScaleFormat::kE4M3: return encode_scale_e4m3(relative_scale(ideal, tensor_scale));
    default: return bits_of(ideal);
  }
}

// Four over six: the code with which a block's largest value is stored as 4 in place of 6.
MEGATRON_EXT_HD uint32_t code_of_wider_scale(float ideal, float tensor_scale) {
  return encode_scale_e4m3(relative_scale(ideal, tensor_scale) * 1.5f);
}

// Sum of (x - nearest stored value)^2 over a chunk.
MEGATRON_EXT_DEVICE float square_error(const Chunk& values, const BlockScale& block) {
  Chunk errors;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    float error = values.at[i] - round_to<E2M1>(values.at[i] * block.factor) * block.scale;
    errors.at[i] = error * error;
  }
  return tree_sum(errors);
}

// Scale of a block that `lanes` neighbouring threads hold; `given`: its row's or tensor's largest.
template <bool kIsPlain>
MEGATRON_EXT_DEVICE BlockScale block_scale(const CopyPlan& plan, const Chunk& values, int lanes,
                                           float given, float tensor_scale) {
  float ideal;
  if (!kIsPlain && ScaleRule(plan.rule.scale_rule) == ScaleRule::kQuest) {
    ideal = quest_scale(values, lanes);
  } else {
    bool is_given = plan.rule.block_columns == 0;
    float largest = is_given ? given : max_across(largest_magnitude(values), lanes);
    ideal = absmax_scale(plan, largest);
  }
  uint32_t code = code_of_scale(plan, ideal, tensor_scale);
  BlockScale block = block_scale_of_code(plan, code, tensor_scale);
  if (kIsPlain || !plan.rule.tries_four) return block;
  code = code_of_wider_scale(ideal, tensor_scale);
  BlockScale wider = block_scale_of_code(plan, code, tensor_scale);
  float error = sum_across(square_error(values, block), lanes);
  float wider_error = sum_across(square_error(values, wider), lanes);
  return wider_error < error ? wider : block;
}

}  // namespace megatron_ext
