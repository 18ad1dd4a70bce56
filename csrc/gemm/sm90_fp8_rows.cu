// FP8 1 x 128 times FP8 1 x 128, float32 out, single and of groups of depth: wgrad on sm_90a.
// Compiled, never run: no such device was at hand.
#include "sm90_fp8_grouped_launch.h"

namespace megatron_ext::gemm::sm90 {
namespace {

using Single = Kernel<TallTile, float, false, false>;
using Grouped = Kernel<TallTile, float, false, true>;

}  // namespace

std::size_t rows_workspace_bytes(const Problem& problem) {
  return workspace_bytes<Single, false>(problem);
}

const char* rows_multiply(const Problem& problem, void* workspace, cudaStream_t stream) {
  return multiply<Single, false>(problem, workspace, stream);
}

std::size_t grouped_rows_workspace_bytes(const Problem& problem, const Groups& groups) {
  return grouped_workspace_bytes<Grouped, true>(problem, groups);
}

const char* grouped_rows_multiply(const Problem& problem, const Groups& groups, void* workspace,
                                  cudaStream_t stream) {
  return grouped_multiply<Grouped, true>(problem, groups, workspace, stream);
}

}  // namespace megatron_ext::gemm::sm90
