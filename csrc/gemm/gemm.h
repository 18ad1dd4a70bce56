// Launchers of the block-scaled products. No torch, no CUTLASS in here.
//
// Every product is    out = alpha * left right^T (+ out)    with left [m, k], right [n, k],
// out [m, n], codes and scales row-major as `megatron_ext/precision/quantized.py` stores them;
// scale layouts that a kernel needs are made in the workspace, on the stream.
//
// A launcher returns nullptr, or what went wrong. It checks nothing that is a mistake of the caller
// (shapes, alignment: `megatron_ext/precision/gemm_cuda.py` does).
// Compiled for their targets, never run: no such device was at hand.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace megatron_ext::gemm {

enum class Out : int { kFloat32 = 0, kBFloat16 = 1 };

/// Operands of one product. Grouped ones: see `Groups`.
struct Problem {
  const uint8_t* left;        // codes, [m, k] or [m, k / 2]
  const uint8_t* right;       // codes, [n, k] or [n, k / 2]
  const void* left_scales;    // float32, or codes of E8M0 or E4M3: [m, ceil(k / block)]
  const void* right_scales;   // [n or ceil(n / 128 or 16), ceil(k / block)]
  const float* alpha;         // product of the tensors' scales, on the device; nullptr: 1
  void* out;                  // float32 or bfloat16 [m, n]
  int m, n, k;
  int left_block_rows, right_block_rows;  // rows that share a scale: 1; 16 (nvfp4_2d); 128
  Out out_type;
  bool accumulate;            // adds to out, which is float32
};

/// Ranges of tokens: offsets int32 [num_groups + 1] on the device, first 0, not falling.
struct Groups {
  const int32_t* offsets;
  int num_groups;
};

// FP8 e4m3, sm_90a. k is a multiple of 128 (of 16 for the last block of a wgrad), n of 8 (bfloat16
// out) or 4; operands and out begin at multiples of 16 bytes.
namespace sm90 {

/// left 1 x 128, right 128 x 128: forward, dgrad. is_tall: tiles of 256 rows, else 128.
std::size_t weights_workspace_bytes(const Problem& problem, bool is_tall);
const char* weights_multiply(const Problem& problem, bool is_tall, void* workspace,
                             cudaStream_t stream);

/// Both 1 x 128, float32 out: wgrad.
std::size_t rows_workspace_bytes(const Problem& problem);
const char* rows_multiply(const Problem& problem, void* workspace, cudaStream_t stream);

/// Groups of rows, right [groups, n, k] in blocks of 128 x 128; m counts the rows of all groups.
std::size_t grouped_weights_workspace_bytes(const Problem& problem, const Groups& groups);
const char* grouped_weights_multiply(const Problem& problem, const Groups& groups, void* workspace,
                                     cudaStream_t stream);

/// Groups of depth, added to out [groups, m, n]; k counts the tokens of all groups. Offsets are
/// multiples of 128.
std::size_t grouped_rows_workspace_bytes(const Problem& problem, const Groups& groups);
const char* grouped_rows_multiply(const Problem& problem, const Groups& groups, void* workspace,
                                  cudaStream_t stream);

}  // namespace sm90

/// A block-scaled product, Blackwell. k is a multiple of 32 (4 bits) or 16, n as above; operands and
/// out begin at multiples of 16 bytes. nvfp4: blocks of 16, scales in E4M3; mxfp4, mxfp8: 32, E8M0.
struct BlockScaledKernels {
  std::size_t (*workspace_bytes)(const Problem& problem);
  const char* (*multiply)(const Problem& problem, void* workspace, cudaStream_t stream);
};

namespace sm100 {
BlockScaledKernels nvfp4();
BlockScaledKernels mxfp4();
BlockScaledKernels mxfp8();
}  // namespace sm100

namespace sm120 {
BlockScaledKernels nvfp4();
BlockScaledKernels mxfp4();
BlockScaledKernels mxfp8();
}  // namespace sm120

}  // namespace megatron_ext::gemm
