// Products of few rows: tiles of 128 x 128, in a file of their own to be compiled beside the others.
#pragma once

#include "gemm.h"

namespace megatron_ext::gemm::sm90 {

std::size_t small_weights_workspace_bytes(const Problem& problem);
const char* small_weights_multiply(const Problem& problem, void* workspace, cudaStream_t stream);

}  // namespace megatron_ext::gemm::sm90
