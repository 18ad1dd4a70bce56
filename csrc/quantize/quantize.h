// Launchers of the quantise kernels; the same work as megatron_ext/precision/reference.py.
//
// One pass over a matrix [rows, columns], row-major, makes its copy in few bits, that of its
// transpose, or both. No torch in here. A launcher returns nullptr, or what went wrong.
//
//     x_h = x S H,   s = scale of each block of x_h,   c = encode(x_h * (1 / s))
//
// Bytes that move, for a bfloat16 matrix, per element: 2 in, and out 1 + 4/128 a copy (fp8_1x128),
// 1/2 + 1/32 (mxfp4), 1/2 + 1/16 (nvfp4, whose largest magnitude is a pass before: 2 more).
#pragma once

#include <cstdint>

namespace megatron_ext {

enum class Input : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum class Element : int { kE4M3 = 0, kE5M2 = 1, kE2M1 = 2 };
enum class ScaleRule : int { kAbsmax = 0, kQuest = 1, kHeadroom = 2, kEden = 3 };

// `Quantizer` and its `BlockFormat` as numbers, in the order that quantize_cuda.py writes them.
struct Rule {
  int element;              // Element
  int block_rows;           // 0: all rows share a scale
  int block_columns;        // 0: all columns
  int scale_format;         // ScaleFormat
  int has_tensor_scale;     // 0 or 1
  int scale_rule;           // ScaleRule
  int hadamard_group;       // a power of two up to 128; 1: none
  int is_stochastic;
  int rounds_scale_up;
  int power_of_two_scales;
  int tries_four;
  int keeps_mask;
};

// A copy to be made; of the transpose, where it is `transposed`.
struct Copy {
  Rule rule;
  uint8_t* codes;           // nullptr: not this copy
  void* scales;             // float32 or uint8, [down, across]
  float* tensor_scale;      // where the format has one, else nullptr
  uint8_t* kept;            // where rule.keeps_mask
  const float* signs;       // [hadamard_group], or nullptr
  const float* amax;        // [1], or [rows] where a row has one scale; nullptr: found on the way
  uint64_t seed;
};

struct Matrix {
  const void* data;
  int input;                // Input
  int64_t rows, columns;
};

// Whether a copy needs `amax`: its scales are known only after the whole row or tensor.
bool needs_amax(const Rule& rule);

const char* quantize_matrix(const Matrix& matrix, const Copy& row, const Copy& transposed,
                            void* stream);

// Largest magnitudes in the basis of the copy: of the tensor, float32 [1], or of each of its rows,
// where rule.block_columns is 0 and rule.block_rows is 1. Starts from what is there: zeros.
const char* largest_magnitudes(const Matrix& matrix, const Rule& rule, const float* signs,
                               bool is_transposed, float* amax, void* stream);

}  // namespace megatron_ext
