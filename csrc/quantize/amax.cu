// Largest magnitudes of a tensor or of its rows, in the basis in which they will be rounded.
#include "copy_plan.h"
#include "tile.h"

namespace megatron_ext {
namespace {

struct AmaxPlan {
  float* amax;
  const float* signs;
  int hadamard_group;
  float hadamard_scale;
  bool is_transposed, is_by_row;
};

// Bits of numbers >= 0 are ordered as the numbers are, and NaN lies above infinity.
MEGATRON_EXT_DEVICE void raise(float* amax, float largest) {
  atomicMax(reinterpret_cast<unsigned*>(amax), bits_of(largest) & 0x7FFFFFFFu);
}

template <Input kInput>
__global__ void __launch_bounds__(kThreads, kInput == Input::kFloat32 ? 2 : 3)
    find_largest(const __grid_constant__ Matrix matrix, const __grid_constant__ AmaxPlan plan,
                 const bool is_aligned) {
  MEGATRON_EXT_SHARED(shared);
  uint4* tile = reinterpret_cast<uint4*>(shared);
  float* of_warps = reinterpret_cast<float*>(shared);
  const TilePlace from = tile_place(matrix, blockIdx.x);
  const int place = int(threadIdx.x) % kChunksAcross, line = int(threadIdx.x) / kChunksAcross;
  const Hadamard hadamard{plan.hadamard_group, plan.hadamard_scale,
                          sign_flips(plan.signs, plan.hadamard_group, place)};
  load_tile<kInput>(tile, matrix, is_aligned, from);
  const int64_t num_lines = plan.is_transposed ? matrix.columns : matrix.rows;
  const int64_t first_line = (plan.is_transposed ? from.column : from.row) + line;
  float largest = 0.0f;
  for (int i = 0; i < kTile; i += kRowsAtOnce) {
    Chunk values = plan.is_transposed ? column_chunk<kInput>(tile, line + i, place)
                                      : row_chunk<kInput>(tile, line + i, place);
    transform(values, hadamard, place);
    float of_chunk = largest_magnitude(values);
    if (plan.is_by_row) {
      of_chunk = max_across(of_chunk, kChunksAcross);
      const int64_t at = first_line + i;
      if (place == 0 && at < num_lines) raise(plan.amax + at, of_chunk);
    }
    largest = larger_magnitude(largest, of_chunk);
  }
  if (plan.is_by_row) return;
  largest = max_across(largest, 32);
  // The tile has been read.
  __syncthreads();
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = largest;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kThreads / 32; ++warp) {
      largest = larger_magnitude(largest, of_warps[warp]);
    }
    raise(plan.amax, largest);
  }
}

template <Input kInput>
const char* start(const Matrix& matrix, const AmaxPlan& plan, void* stream) {
  return launch(find_largest<kInput>, num_tiles(matrix), kThreads, kTileBytes<kInput>, stream,
                matrix, plan, chunks_are_aligned(matrix));
}

}  // namespace

const char* largest_magnitudes(const Matrix& matrix, const Rule& rule, const float* signs,
                               bool is_transposed, float* amax, void* stream) {
  const bool is_by_row = rule.block_rows == 1 && rule.block_columns == 0;
  const AmaxPlan plan{amax, signs, rule.hadamard_group,
                      float(1.0 / std::sqrt(double(rule.hadamard_group))), is_transposed,
                      is_by_row};
  switch (Input(matrix.input)) {
    case Input::kFloat32: return start<Input::kFloat32>(matrix, plan, stream);
    case Input::kBFloat16: return start<Input::kBFloat16>(matrix, plan, stream);
    default: return start<Input::kFloat16>(matrix, plan, stream);
  }
}

}  // namespace megatron_ext
