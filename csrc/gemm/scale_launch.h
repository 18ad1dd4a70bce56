// Launchers of the kernels in `scale_layout.cu`; nullptr, or what went wrong.
#pragma once

#include <cstdint>

namespace megatron_ext::gemm {

/// float32 [rows, num_blocks] -> [num_blocks, rows], `stride` from one block to the next. With groups
/// (offsets, on the device) group g is [num_blocks, offsets[g + 1] - offsets[g]] without gaps, from
/// element offsets[g] * num_blocks on.
const char* scales_by_column(const float* scales, float* out, int rows, int num_blocks, int stride,
                             const int* offsets, int num_groups, void* stream);

/// Codes [ceil(rows / block_rows), num_blocks] -> the swizzled layout of every row.
const char* swizzle_scales(const uint8_t* scales, uint8_t* out, int64_t rows, int64_t num_blocks,
                           int block_rows, void* stream);

}  // namespace megatron_ext::gemm
