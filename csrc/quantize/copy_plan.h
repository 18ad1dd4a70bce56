// A copy as kernels get it: its rule with everything that is the same for all blocks worked out.
#pragma once

#include <cmath>

#include "../common/random_bits.h"
#include "../common/scales.h"
#include "quantize.h"

namespace megatron_ext {

struct CopyPlan {
  Rule rule;
  uint8_t* codes;           // nullptr: no such copy
  void* scales;
  float* tensor_scale;
  uint8_t* kept;
  const float* signs;
  const float* amax;
  int64_t rows, columns;    // of the copy
  int64_t across;           // blocks in a row
  bool is_aligned;          // chunks of 16 lie on boundaries of 16 codes
  uint32_t key, scales_key; // of stochastic rounding
  float hadamard_scale;     // 1 / sqrt(group)
  float inverse_max;        // 1 / the element format's largest value
  float floor_factor;       // 2^-e_max
  float tensor_factor;      // tensor's scale over its largest magnitude
  float max_value;
};

// Constants of reference.py, which computes them in float64 and rounds once.
constexpr double kQuestFactor = 2.92247856 / 6.0;
constexpr double kEdenFactor = (17.0 / 16.0) * 0.93;
constexpr double kEdenScalesMax = 255.99;
constexpr double kFourOverSixScalesMax = 256.0;
constexpr double kHeadroom = 4.0 / 3.0;

inline double max_value_of(int element) {
  switch (Element(element)) {
    case Element::kE4M3: return double(E4M3::kMaxValue);
    case Element::kE5M2: return double(E5M2::kMaxValue);
    default: return double(E2M1::kMaxValue);
  }
}

inline int max_exponent_of(int element) {
  switch (Element(element)) {
    case Element::kE4M3: return E4M3::kMaxExponent;
    case Element::kE5M2: return E5M2::kMaxExponent;
    default: return E2M1::kMaxExponent;
  }
}

inline float tensor_factor_of(const Rule& rule) {
  double factor = 1.0, scales_max = double(E4M3::kMaxValue);
  if (ScaleRule(rule.scale_rule) == ScaleRule::kEden) {
    factor = kEdenFactor;
    scales_max = kEdenScalesMax;
  } else if (rule.tries_four) {
    scales_max = kFourOverSixScalesMax;
  }
  return float(factor / (scales_max * max_value_of(rule.element)));
}

inline bool is_on_boundary(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// rows, columns: of the copy.
inline CopyPlan plan_copy(const Copy& copy, int64_t rows, int64_t columns) {
  const Rule& rule = copy.rule;
  CopyPlan plan{};
  plan.rule = rule;
  plan.codes = copy.codes;
  plan.scales = copy.scales;
  plan.tensor_scale = copy.tensor_scale;
  plan.kept = copy.kept;
  plan.signs = copy.signs;
  plan.amax = copy.amax;
  plan.rows = rows;
  plan.columns = columns;
  plan.across = rule.block_columns == 0 ? 1 : (columns + rule.block_columns - 1) / rule.block_columns;
  plan.is_aligned = columns % 16 == 0 && is_on_boundary(copy.codes) && is_on_boundary(copy.kept);
  plan.key = seed_key(copy.seed);
  plan.scales_key = seed_key(derive_seed(copy.seed, 1));
  plan.hadamard_scale = float(1.0 / std::sqrt(double(rule.hadamard_group)));
  plan.inverse_max = float(1.0 / max_value_of(rule.element));
  plan.floor_factor = float(std::exp2(double(-max_exponent_of(rule.element))));
  plan.tensor_factor = tensor_factor_of(rule);
  plan.max_value = float(max_value_of(rule.element));
  return plan;
}

}  // namespace megatron_ext
