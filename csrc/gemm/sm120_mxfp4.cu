// MXFP4 products on sm_120a. Compiled, never run: no such device was at hand.
#include "block_scaled_launch.h"

namespace megatron_ext::gemm::sm120 {

BlockScaledKernels mxfp4() { return block_scaled_kernels<GeForce, MxFp4>(); }

}  // namespace megatron_ext::gemm::sm120
