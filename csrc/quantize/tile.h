// A tile of 128 x 128 numbers of a matrix in shared memory, in a block of 256 threads, and chunks of
// 16 of them, along a row or along a column.
//
//     row chunk     thread t has columns 16 (t % 8) .. of row    t / 8 + 32 i,   i = 0 .. 3
//     column chunk  thread t has rows    16 (t % 8) .. of column t / 8 + 32 i
//
// So what shares a scale or a transform lies in up to 8 neighbouring threads of a warp either way.
// Shared memory is in vectors of 16 bytes, those of row r moved by (r / 16) % 8 places within a row:
// the 8 threads that read one column at rows 16 apart would else ask the same bank.
#pragma once

#include "../common/chunk.h"
#include "../common/launch.h"
#include "quantize.h"

namespace megatron_ext {

constexpr int kTile = 128, kThreads = 256, kChunksAcross = kTile / kChunk;
constexpr int kRowsAtOnce = kThreads / kChunksAcross;

template <Input kInput>
struct InputBits {
  static constexpr int kBytes = kInput == Input::kFloat32 ? 4 : 2;
  static constexpr int kVectors = kChunk * kBytes / 16;       // of a chunk
  static constexpr int kVectorsAcross = kTile * kBytes / 16;  // of a tile's row
  static constexpr int kPerVector = 16 / kBytes;
};

MEGATRON_EXT_HD float half_value(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(uint16_t(bits)));
  return value;
#else
  uint32_t sign = (bits & 0x8000u) << 16, size = bits & 0x7FFFu;
  if (size >= 0x7C00u) return float_of(sign | 0x7F800000u | (size & 0x3FFu) << 13);
  float value = float_of(size << 13) * 5.192296858534828e33f;  // 2^112: between the two biases
  return float_of(bits_of(value) | sign);
#endif
}

template <Input kInput>
MEGATRON_EXT_HD float value_of(uint32_t bits) {
  if constexpr (kInput == Input::kFloat32) return float_of(bits);
  if constexpr (kInput == Input::kBFloat16) return float_of(bits << 16);
  return half_value(bits);
}

// 16 numbers of a row as they lie in memory.
template <Input kInput>
struct RawChunk {
  uint4 vectors[InputBits<kInput>::kVectors];
};

MEGATRON_EXT_HD uint32_t word_of(const uint4& vector, int place) {
  return place == 0 ? vector.x : place == 1 ? vector.y : place == 2 ? vector.z : vector.w;
}

template <Input kInput>
MEGATRON_EXT_HD Chunk values_of(const RawChunk<kInput>& raw) {
  Chunk values;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    constexpr int kPerVector = InputBits<kInput>::kPerVector;
    int place = i % kPerVector;
    if constexpr (kInput == Input::kFloat32) {
      values.at[i] = value_of<kInput>(word_of(raw.vectors[i / kPerVector], place));
    } else {
      uint32_t word = word_of(raw.vectors[i / kPerVector], place / 2);
      values.at[i] = value_of<kInput>(place % 2 ? word >> 16 : word & 0xFFFFu);
    }
  }
  return values;
}

template <Input kInput>
MEGATRON_EXT_HD uint32_t element_bits(const void* data, int64_t index) {
  if constexpr (kInput == Input::kFloat32) return static_cast<const uint32_t*>(data)[index];
  return static_cast<const uint16_t*>(data)[index];
}

// Where a tile begins; tiles go along rows first.
struct TilePlace {
  int64_t row, column;
};

MEGATRON_EXT_HD TilePlace tile_place(const Matrix& matrix, unsigned tile) {
  unsigned across = unsigned((matrix.columns + kTile - 1) / kTile);
  return {int64_t(tile / across) * kTile, int64_t(tile % across) * kTile};
}

template <Input kInput>
MEGATRON_EXT_DEVICE int vector_place(int row, int vector) {
  return row * InputBits<kInput>::kVectorsAcross + (vector ^ (row / kChunk % kChunksAcross));
}

// 16 bytes on their way to shared memory past the registers, or zeros.
MEGATRON_EXT_DEVICE void start_copy(uint4* to, const void* from, bool is_inside) {
#if defined(__CUDA_ARCH__)
  const unsigned address = unsigned(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(address), "l"(from), "r"(is_inside ? 16 : 0)
               : "memory");
#else
  *to = is_inside ? *static_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
#endif
}

MEGATRON_EXT_DEVICE void wait_for_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
  __syncthreads();
}

// 16 bytes of a row that begins or ends anywhere.
template <Input kInput>
MEGATRON_EXT_DEVICE uint4 gather(const Matrix& matrix, int64_t row, int64_t column) {
  using Bits = InputBits<kInput>;
  constexpr int kPerWord = 4 / Bits::kBytes;
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < Bits::kPerVector; ++i) {
    if (row < matrix.rows && column + i < matrix.columns) {
      const uint32_t bits = element_bits<kInput>(matrix.data, row * matrix.columns + column + i);
      words[i / kPerWord] |= bits << (i % kPerWord * 16);
    }
  }
  return uint4{words[0], words[1], words[2], words[3]};
}

// The tile, in shared memory, when all threads are back. What lies outside of the matrix is 0.
template <Input kInput>
MEGATRON_EXT_DEVICE void load_tile(uint4* tile, const Matrix& matrix, bool is_aligned,
                                   const TilePlace& from) {
  using Bits = InputBits<kInput>;
  constexpr int kVectors = kTile * Bits::kVectorsAcross;
  for (int i = int(threadIdx.x); i < kVectors; i += kThreads) {
    const int line = i / Bits::kVectorsAcross, vector = i % Bits::kVectorsAcross;
    const int64_t row = from.row + line, column = from.column + vector * Bits::kPerVector;
    uint4* to = tile + vector_place<kInput>(line, vector);
    if (is_aligned) {
      const bool is_inside = row < matrix.rows && column < matrix.columns;
      const int64_t index = is_inside ? row * matrix.columns + column : 0;
      start_copy(to, static_cast<const char*>(matrix.data) + index * Bits::kBytes, is_inside);
    } else {
      *to = gather<kInput>(matrix, row, column);
    }
  }
  wait_for_copies();
}

// 16 numbers of a row, from column 16 chunk.
template <Input kInput>
MEGATRON_EXT_DEVICE Chunk row_chunk(const uint4* tile, int row, int chunk) {
  constexpr int kVectors = InputBits<kInput>::kVectors;
  RawChunk<kInput> raw;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    raw.vectors[i] = tile[vector_place<kInput>(row, chunk * kVectors + i)];
  }
  return values_of(raw);
}

// 16 numbers of a column, from row 16 chunk.
template <Input kInput>
MEGATRON_EXT_DEVICE Chunk column_chunk(const uint4* tile, int column, int chunk) {
  constexpr int kPerVector = InputBits<kInput>::kPerVector;
  Chunk values;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const uint4* vector =
        tile + vector_place<kInput>(chunk * kChunk + i, column / kPerVector);
    values.at[i] = value_of<kInput>(element_bits<kInput>(vector, column % kPerVector));
  }
  return values;
}

template <Input kInput>
constexpr unsigned kTileBytes = unsigned(kTile * kTile * InputBits<kInput>::kBytes);

inline unsigned num_tiles(const Matrix& matrix) {
  int64_t down = (matrix.rows + kTile - 1) / kTile, across = (matrix.columns + kTile - 1) / kTile;
  return unsigned(down * across);
}

inline bool chunks_are_aligned(const Matrix& matrix) {
  return matrix.columns % kChunk == 0 && reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0;
}

}  // namespace megatron_ext
