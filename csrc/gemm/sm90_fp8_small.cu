// FP8 activations 1 x 128 times FP8 weights 128 x 128, tiles of 128 x 128: few rows, on sm_90a.
// Compiled, never run: no such device was at hand.
#include "sm90_fp8_small.h"

#include "sm90_fp8_launch.h"

namespace megatron_ext::gemm::sm90 {
namespace {

using ToFloat = Kernel<SmallTile, float, true, false>;
using ToBFloat16 = Kernel<SmallTile, cutlass::bfloat16_t, true, false>;

}  // namespace

std::size_t small_weights_workspace_bytes(const Problem& problem) {
  return problem.out_type == Out::kBFloat16 ? workspace_bytes<ToBFloat16, true>(problem)
                                            : workspace_bytes<ToFloat, true>(problem);
}

const char* small_weights_multiply(const Problem& problem, void* workspace, cudaStream_t stream) {
  return problem.out_type == Out::kBFloat16
             ? multiply<ToBFloat16, true>(problem, workspace, stream)
             : multiply<ToFloat, true>(problem, workspace, stream);
}

}  // namespace megatron_ext::gemm::sm90
