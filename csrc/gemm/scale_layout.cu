// Kernels that bring scales into the layouts of `scale_layout.h`. 1 byte of scales belongs to 8 to 32
// bytes of codes. Tested on the CPU as they stand, by fibers (common/emulate.h); not run on a GPU.
#include "../common/launch.h"
#include "scale_launch.h"
#include "scale_layout.h"

namespace megatron_ext::gemm {
namespace {

constexpr int kTile = 32;
// A column more, so that 32 rows of one block lie in 32 banks.
constexpr int kTileStride = kTile + 1;
constexpr unsigned kThreads = 256;
constexpr unsigned kTileBytes = kTile * kTileStride * sizeof(float);

/// The last group that starts at or before a row, or group 0.
MEGATRON_EXT_DEVICE int group_of(const int* offsets, int num_groups, int row) {
  int low = 0, high = num_groups - 1;
  while (low < high) {
    int middle = (low + high + 1) / 2;
    if (offsets[middle] <= row) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

/// A block a tile of 32 rows x 32 blocks, read along blocks and written along rows.
__global__ void by_column_kernel(const float* scales, float* out, int rows, int num_blocks,
                                 int stride, const int* offsets, int num_groups) {
  MEGATRON_EXT_SHARED(shared);
  float* tile = reinterpret_cast<float*>(shared);
  int tiles_across = int(ceil_divide(num_blocks, kTile));
  int first_row = int(blockIdx.x) / tiles_across * kTile;
  int first_block = int(blockIdx.x) % tiles_across * kTile;
  int lane = int(threadIdx.x) % kTile, step = int(kThreads) / kTile;
  for (int i = int(threadIdx.x) / kTile; i < kTile; i += step) {
    int row = first_row + i, block = first_block + lane;
    if (row < rows && block < num_blocks) {
      tile[i * kTileStride + lane] = scales[int64_t(row) * num_blocks + block];
    }
  }
  __syncthreads();
  int row = first_row + lane;
  if (row >= rows) return;
  int64_t place = row, step_out = stride;
  if (offsets != nullptr) {
    int group = group_of(offsets, num_groups, row);
    int start = offsets[group], end = offsets[group + 1];
    if (row < start || row >= end) return;  // rows of no group
    step_out = end - start;
    place = int64_t(start) * num_blocks + (row - start);
  }
  for (int i = int(threadIdx.x) / kTile; i < kTile; i += step) {
    int block = first_block + i;
    if (block < num_blocks) {
      out[place + block * step_out] = tile[lane * kTileStride + i];
    }
  }
}

/// Four bytes a thread: the four blocks of one row in one atom, the first in the lowest bits.
__global__ void swizzle_kernel(const uint8_t* scales, uint32_t* out, int64_t num_words,
                               int64_t rows, int64_t num_blocks, int block_rows) {
  int64_t word = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (word >= num_words) return;
  uint32_t four = 0;
  for (int i = 0; i < kAtomBlocks; ++i) {
    four |= uint32_t(swizzled_scale(scales, word * 4 + i, rows, num_blocks, block_rows)) << 8 * i;
  }
  out[word] = four;
}

}  // namespace

const char* scales_by_column(const float* scales, float* out, int rows, int num_blocks, int stride,
                             const int* offsets, int num_groups, void* stream) {
  int64_t blocks = ceil_divide(rows, kTile) * ceil_divide(num_blocks, kTile);
  return launch(by_column_kernel, unsigned(blocks), kThreads, kTileBytes, stream, scales, out, rows,
                num_blocks, stride, offsets, num_groups);
}

const char* swizzle_scales(const uint8_t* scales, uint8_t* out, int64_t rows, int64_t num_blocks,
                           int block_rows, void* stream) {
  int64_t num_words = swizzled_bytes(rows, num_blocks) / 4;
  return launch(swizzle_kernel, unsigned(ceil_divide(num_words, kThreads)), kThreads, 0u, stream,
                scales, reinterpret_cast<uint32_t*>(out), num_words, rows, num_blocks, block_rows);
}

}  // namespace megatron_ext::gemm
