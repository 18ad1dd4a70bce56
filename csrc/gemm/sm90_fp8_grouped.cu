// FP8 activations 1 x 128 times FP8 weights 128 x 128 of groups of rows: experts' forward and dgrad on
// sm_90a. Compiled, never run: no such device was at hand.
#include "sm90_fp8_grouped_launch.h"

namespace megatron_ext::gemm::sm90 {
namespace {

using ToFloat = Kernel<TallTile, float, true, true>;
using ToBFloat16 = Kernel<TallTile, cutlass::bfloat16_t, true, true>;

}  // namespace

std::size_t grouped_weights_workspace_bytes(const Problem& problem, const Groups& groups) {
  return problem.out_type == Out::kBFloat16
             ? grouped_workspace_bytes<ToBFloat16, false>(problem, groups)
             : grouped_workspace_bytes<ToFloat, false>(problem, groups);
}

const char* grouped_weights_multiply(const Problem& problem, const Groups& groups, void* workspace,
                                     cudaStream_t stream) {
  return problem.out_type == Out::kBFloat16
             ? grouped_multiply<ToBFloat16, false>(problem, groups, workspace, stream)
             : grouped_multiply<ToFloat, false>(problem, groups, workspace, stream);
}

}  // namespace megatron_ext::gemm::sm90
