// MXFP4 products on sm_100a. Compiled, never run: no such device was at hand.
#include "block_scaled_launch.h"

namespace megatron_ext::gemm::sm100 {

BlockScaledKernels mxfp4() { return block_scaled_kernels<Blackwell, MxFp4>(); }

}  // namespace megatron_ext::gemm::sm100
