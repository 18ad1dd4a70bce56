// The kernels of scale_layout.cu on the CPU, by fibers (common/emulate.h), as plain C functions for
// ctypes.
//
//     g++ -std=c++17 -O2 -shared -fPIC host.cpp -o gemm_host.so
#define MEGATRON_EXT_EMULATE
#include "scale_layout.cu"

extern "C" {

const char* swizzle(const uint8_t* scales, uint8_t* out, int64_t rows, int64_t num_blocks,
                    int block_rows) {
  return megatron_ext::gemm::swizzle_scales(scales, out, rows, num_blocks, block_rows, nullptr);
}

const char* by_column(const float* scales, float* out, int rows, int num_blocks, int stride,
                      const int* offsets, int num_groups) {
  return megatron_ext::gemm::scales_by_column(scales, out, rows, num_blocks, stride, offsets,
                                              num_groups, nullptr);
}

int64_t swizzled_bytes(int64_t rows, int64_t num_blocks) {
  return megatron_ext::gemm::swizzled_bytes(rows, num_blocks);
}

}  // extern "C"
