// FP8 activations 1 x 128 times FP8 weights 128 x 128, tall tiles: forward and dgrad on sm_90a.
// Compiled, never run: no such device was at hand.
#include "sm90_fp8_launch.h"
#include "sm90_fp8_small.h"

namespace megatron_ext::gemm::sm90 {
namespace {

using ToFloat = Kernel<TallTile, float, true, false>;
using ToBFloat16 = Kernel<TallTile, cutlass::bfloat16_t, true, false>;

}  // namespace

std::size_t weights_workspace_bytes(const Problem& problem, bool is_tall) {
  if (!is_tall) return small_weights_workspace_bytes(problem);
  return problem.out_type == Out::kBFloat16 ? workspace_bytes<ToBFloat16, true>(problem)
                                            : workspace_bytes<ToFloat, true>(problem);
}

const char* weights_multiply(const Problem& problem, bool is_tall, void* workspace,
                             cudaStream_t stream) {
  if (!is_tall) return small_weights_multiply(problem, workspace, stream);
  return problem.out_type == Out::kBFloat16
             ? multiply<ToBFloat16, true>(problem, workspace, stream)
             : multiply<ToFloat, true>(problem, workspace, stream);
}

}  // namespace megatron_ext::gemm::sm90
