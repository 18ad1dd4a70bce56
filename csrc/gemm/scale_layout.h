// Where a scale stands in the layouts that kernels read. Host and device: the same code is tested on
// the CPU against CUTLASS's own layout function and against a formula in torch.
//
// swizzled     tcgen05, mma.sync block_scale: atoms of 128 rows x 4 blocks, atoms along k first:
//
//     atom   = (row / 128) * ceil(num_blocks / 4) + block / 4
//     offset = 512 atom + 16 (row % 32) + 4 (row / 32 % 4) + block % 4           bytes
//
// by column    sm_90a: [num_blocks, rows padded to 4], float32.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define MEGATRON_EXT_HOST_DEVICE __host__ __device__
#else
#define MEGATRON_EXT_HOST_DEVICE
#endif

namespace megatron_ext::gemm {

constexpr int kAtomRows = 128;
constexpr int kAtomBlocks = 4;
constexpr int kAtomBytes = kAtomRows * kAtomBlocks;

MEGATRON_EXT_HOST_DEVICE constexpr int64_t ceil_divide(int64_t value, int64_t by) {
  return (value + by - 1) / by;
}

/// Bytes of the swizzled scales of a matrix with `rows` rows and `num_blocks` blocks along k.
MEGATRON_EXT_HOST_DEVICE constexpr int64_t swizzled_bytes(int64_t rows, int64_t num_blocks) {
  return ceil_divide(rows, kAtomRows) * ceil_divide(num_blocks, kAtomBlocks) * kAtomBytes;
}

MEGATRON_EXT_HOST_DEVICE constexpr int64_t swizzled_offset(int64_t row, int64_t block,
                                                           int64_t num_blocks) {
  int64_t atom = row / kAtomRows * ceil_divide(num_blocks, kAtomBlocks) + block / kAtomBlocks;
  return atom * kAtomBytes + row % 32 * 16 + row / 32 % 4 * 4 + block % kAtomBlocks;
}

/// Where the scale at a byte of the swizzled layout comes from.
struct ScalePlace {
  int64_t row, block;
};

/// The inverse of `swizzled_offset`; places past the matrix's end are padding.
MEGATRON_EXT_HOST_DEVICE constexpr ScalePlace swizzled_place(int64_t offset, int64_t num_blocks) {
  int64_t atoms_across = ceil_divide(num_blocks, kAtomBlocks);
  int64_t atom = offset / kAtomBytes, inside = offset % kAtomBytes;
  return {atom / atoms_across * kAtomRows + inside % 16 / 4 * 32 + inside / 16,
          atom % atoms_across * kAtomBlocks + inside % 4};
}

/// Scale of one byte of the swizzled layout; 0 (the smallest scale) in the padding.
/// scales: codes [ceil(rows / block_rows), num_blocks], row-major.
MEGATRON_EXT_HOST_DEVICE inline uint8_t swizzled_scale(const uint8_t* scales, int64_t offset,
                                                       int64_t rows, int64_t num_blocks,
                                                       int block_rows) {
  ScalePlace place = swizzled_place(offset, num_blocks);
  bool inside = place.row < rows && place.block < num_blocks;
  return inside ? scales[place.row / block_rows * num_blocks + place.block] : 0;
}

/// Rows of scales by column: the copy engine takes strides of 16 bytes.
MEGATRON_EXT_HOST_DEVICE constexpr int64_t padded_rows(int64_t rows) {
  return ceil_divide(rows, 4) * 4;
}

}  // namespace megatron_ext::gemm
