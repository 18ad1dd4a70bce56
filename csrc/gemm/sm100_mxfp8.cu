// MXFP8 products on sm_100a. Compiled, never run: no such device was at hand.
#include "block_scaled_launch.h"

namespace megatron_ext::gemm::sm100 {

BlockScaledKernels mxfp8() { return block_scaled_kernels<Blackwell, MxFp8>(); }

}  // namespace megatron_ext::gemm::sm100
