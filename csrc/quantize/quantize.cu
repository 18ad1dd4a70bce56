// One pass over a matrix: its copy in few bits, its transpose's, or both (quantize.h).
#include "quantize.h"

#include "store.h"
#include "tile.h"

namespace megatron_ext {
namespace {

// A tile of float32 is 64 KiB; what does more than the plain work needs more registers.
template <Input kInput, bool kIsPlain>
constexpr int kBlocksAtOnce = (kInput == Input::kFloat32 ? 3 : 4) - (kIsPlain ? 0 : 1);

// Blocks of a row, or one scale for a row or the tensor.
template <Input kInput, class Format, bool kIsPlain>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<kInput, kIsPlain>)
    quantize_rows(const __grid_constant__ Matrix matrix, const __grid_constant__ CopyPlan row_copy,
                  const __grid_constant__ CopyPlan column_copy, const bool is_aligned) {
  MEGATRON_EXT_SHARED(shared);
  uint4* tile = reinterpret_cast<uint4*>(shared);
  const TilePlace from = tile_place(matrix, blockIdx.x);
  const int place = int(threadIdx.x) % kChunksAcross, line = int(threadIdx.x) / kChunksAcross;
  load_tile<kInput>(tile, matrix, is_aligned, from);
  if (row_copy.codes) {
    const RowQuantizer<Format, kIsPlain> quantizer(row_copy, place);
#pragma unroll 1
    for (int i = line; i < kTile; i += kRowsAtOnce) {
      quantizer.quantize(row_chunk<kInput>(tile, i, place), from.row + i,
                         from.column + place * kChunk);
    }
  }
  if (column_copy.codes) {
    const RowQuantizer<Format, kIsPlain> quantizer(column_copy, place);
#pragma unroll 1
    for (int i = line; i < kTile; i += kRowsAtOnce) {
      quantizer.quantize(column_chunk<kInput>(tile, i, place), from.column + i,
                         from.row + place * kChunk);
    }
  }
}

// One number of each of the 16 rows of a block of 16 x 16: a thread a block.
MEGATRON_EXT_DEVICE Chunk lines_of_block(const float* of_chunks, int block) {
  Chunk lines;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const int row = block / kChunksAcross * kChunk + i;
    lines.at[i] = of_chunks[row * kChunksAcross + block % kChunksAcross];
  }
  return lines;
}

// Square error of blocks of 16 x 16, each with the scale its thread proposes; 0 in other threads.
template <Input kInput>
MEGATRON_EXT_DEVICE float block_error(const uint4* tile, float* of_chunks, BlockScale* blocks,
                                      const BlockScale& proposed) {
  const int here = int(threadIdx.x), place = here % kChunksAcross;
  const bool has_block = here < kChunksAcross * kChunksAcross;
  __syncthreads();
  if (has_block) blocks[here] = proposed;
  __syncthreads();
  for (int i = here / kChunksAcross; i < kTile; i += kRowsAtOnce) {
    const BlockScale& block = blocks[i / kChunk * kChunksAcross + place];
    of_chunks[i * kChunksAcross + place] =
        square_error(row_chunk<kInput>(tile, i, place), block);
  }
  __syncthreads();
  return has_block ? tree_sum(lines_of_block(of_chunks, here)) : 0.0f;
}

// The scale of block (down, across) of the matrix, in both copies.
MEGATRON_EXT_DEVICE void store_scales(const CopyPlan& row_copy, const CopyPlan& column_copy,
                                      uint32_t code, float tensor_scale, int64_t down,
                                      int64_t across) {
  const CopyPlan* copies[2] = {&row_copy, &column_copy};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const CopyPlan& copy = *copies[i];
    const int64_t line = i == 0 ? down : across, place = i == 0 ? across : down;
    if (!copy.codes || place >= copy.across || line * copy.rule.block_rows >= copy.rows) continue;
    store_scale(copy, code, line * copy.across + place);
    if (copy.tensor_scale && down == 0 && across == 0) *copy.tensor_scale = tensor_scale;
  }
}

// Blocks of kBlock x kBlock; the transpose is stored with the same codes.
template <Input kInput, class Format, int kBlock>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<kInput, true>)
    quantize_squares(const __grid_constant__ Matrix matrix, const __grid_constant__ CopyPlan row_copy,
                  const __grid_constant__ CopyPlan column_copy, const bool is_aligned) {
  constexpr int kBlocks = kTile / kBlock, kBlockChunks = kBlock / kChunk;
  MEGATRON_EXT_SHARED(shared);
  uint4* tile = reinterpret_cast<uint4*>(shared);
  float* of_chunks = reinterpret_cast<float*>(shared + kTileBytes<kInput>);
  BlockScale* blocks = reinterpret_cast<BlockScale*>(of_chunks + kTile * kChunksAcross);
  const TilePlace from = tile_place(matrix, blockIdx.x);
  const int place = int(threadIdx.x) % kChunksAcross, line = int(threadIdx.x) / kChunksAcross;
  // Either copy has the rule; the row's where both are made.
  const CopyPlan& plan = row_copy.codes ? row_copy : column_copy;
  const float tensor_scale = tensor_scale_of(plan);

  load_tile<kInput>(tile, matrix, is_aligned, from);
  for (int i = line; i < kTile; i += kRowsAtOnce) {
    of_chunks[i * kChunksAcross + place] = largest_magnitude(row_chunk<kInput>(tile, i, place));
  }
  __syncthreads();
  // A warp a block of 128, a thread a block of 16.
  const int here = int(threadIdx.x);
  const bool has_block = here < kBlocks * kBlocks;
  float ideal = 0.0f;
  if constexpr (kBlock == kTile) {
    float largest = 0.0f;
    for (int i = here % 32; i < kTile * kChunksAcross; i += 32) {
      largest = larger_magnitude(largest, of_chunks[i]);
    }
    ideal = absmax_scale(plan, max_across(largest, 32));
  } else if (has_block) {
    ideal = absmax_scale(plan, largest_magnitude(lines_of_block(of_chunks, here)));
  }
  BlockScale block =
      block_scale_of_code(plan, code_of_scale(plan, ideal, tensor_scale), tensor_scale);
  if constexpr (kBlock == kChunk) {
    if (plan.rule.tries_four) {
      const BlockScale wider =
          block_scale_of_code(plan, code_of_wider_scale(ideal, tensor_scale), tensor_scale);
      const float error = block_error<kInput>(tile, of_chunks, blocks, block);
      if (block_error<kInput>(tile, of_chunks, blocks, wider) < error) block = wider;
    }
  }
  if (has_block) {
    blocks[here] = block;
    store_scales(row_copy, column_copy, block.code, tensor_scale,
                 from.row / kBlock + here / kBlocks, from.column / kBlock + here % kBlocks);
  }
  __syncthreads();
  for (int i = line; i < kTile; i += kRowsAtOnce) {
    if (row_copy.codes && from.row + i < matrix.rows &&
        from.column + place * kChunk < matrix.columns) {
      const float factor = blocks[i / kBlock * kBlocks + place / kBlockChunks].factor;
      store_quantized<Format>(row_copy, row_chunk<kInput>(tile, i, place), factor, from.row + i,
                              from.column + place * kChunk);
    }
    if (column_copy.codes && from.column + i < matrix.columns &&
        from.row + place * kChunk < matrix.rows) {
      const float factor = blocks[place / kBlockChunks * kBlocks + i / kBlock].factor;
      store_quantized<Format>(column_copy, column_chunk<kInput>(tile, i, place), factor,
                              from.column + i, from.row + place * kChunk);
    }
  }
}

struct Call {
  Matrix matrix;
  CopyPlan row, transposed;
  void* stream;
};

// Nothing but a scale from the largest magnitude, and rounding to the nearest.
bool is_plain(const CopyPlan& plan) {
  const Rule& rule = plan.rule;
  const ScaleRule scale_rule = ScaleRule(rule.scale_rule);
  const bool has_simple_scale = scale_rule == ScaleRule::kAbsmax && !rule.tries_four;
  return !plan.codes || (has_simple_scale && rule.hadamard_group == 1 && !rule.is_stochastic &&
                         !rule.keeps_mask);
}

template <Input kInput, class Format>
const char* start_rows(const Call& call) {
  const bool plain = is_plain(call.row) && is_plain(call.transposed);
  return launch(plain ? quantize_rows<kInput, Format, true> : quantize_rows<kInput, Format, false>,
                num_tiles(call.matrix), kThreads, kTileBytes<kInput>, call.stream, call.matrix,
                call.row, call.transposed, chunks_are_aligned(call.matrix));
}

template <Input kInput, class Format, int kBlock>
const char* start_squares(const Call& call) {
  constexpr unsigned kBlocks = kTile / kBlock;
  const unsigned shared_bytes =
      unsigned(kTileBytes<kInput> + kTile * kChunksAcross * sizeof(float) +
               kBlocks * kBlocks * sizeof(BlockScale));
  return launch(quantize_squares<kInput, Format, kBlock>, num_tiles(call.matrix), kThreads,
                shared_bytes, call.stream, call.matrix, call.row, call.transposed,
                chunks_are_aligned(call.matrix));
}

template <Input kInput>
const char* start(const Call& call, const Rule& rule) {
  const Element element = Element(rule.element);
  if (rule.block_rows == 128 && element == Element::kE4M3) {
    return start_squares<kInput, E4M3, 128>(call);
  }
  if (rule.block_rows == 16 && element == Element::kE2M1) {
    return start_squares<kInput, E2M1, 16>(call);
  }
  if (rule.block_rows > 1) return "no CUDA kernel has these blocks of several rows";
  switch (element) {
    case Element::kE4M3: return start_rows<kInput, E4M3>(call);
    case Element::kE5M2: return start_rows<kInput, E5M2>(call);
    default: return start_rows<kInput, E2M1>(call);
  }
}

const char* start(const Call& call, const Rule& rule) {
  switch (Input(call.matrix.input)) {
    case Input::kFloat32: return start<Input::kFloat32>(call, rule);
    case Input::kBFloat16: return start<Input::kBFloat16>(call, rule);
    default: return start<Input::kFloat16>(call, rule);
  }
}

// Kernels have one element format and one kind of blocks.
bool share_a_pass(const Rule& row, const Rule& transposed) {
  const bool are_squares = row.block_rows > 1 || transposed.block_rows > 1;
  return row.element == transposed.element &&
         (!are_squares || (row.block_rows == transposed.block_rows &&
                           row.power_of_two_scales == transposed.power_of_two_scales &&
                           row.tries_four == transposed.tries_four));
}

}  // namespace

bool needs_amax(const Rule& rule) {
  return rule.block_columns == 0 ||
         (rule.has_tensor_scale && ScaleRule(rule.scale_rule) != ScaleRule::kHeadroom);
}

const char* quantize_matrix(const Matrix& matrix, const Copy& row, const Copy& transposed,
                            void* stream) {
  Call call{matrix, {}, {}, stream};
  if (row.codes) call.row = plan_copy(row, matrix.rows, matrix.columns);
  if (transposed.codes) call.transposed = plan_copy(transposed, matrix.columns, matrix.rows);
  if (!row.codes) return transposed.codes ? start(call, transposed.rule) : nullptr;
  if (!transposed.codes || share_a_pass(row.rule, transposed.rule)) return start(call, row.rule);
  Call first = call, second = call;
  first.transposed.codes = nullptr;
  second.row.codes = nullptr;
  const char* error = start(first, row.rule);
  return error ? error : start(second, transposed.rule);
}

}  // namespace megatron_ext
