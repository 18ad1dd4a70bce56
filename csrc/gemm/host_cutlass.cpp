// Where CUTLASS's kernels look for scales: its own layout function, evaluated on the CPU, as a plain C
// function for ctypes. The test of `scale_layout.h`.
//
//     g++ -std=c++17 -O1 -shared -fPIC -I CUTLASS/include -I CUDA/include -I CUDA/include/cccl
//         host_cutlass.cpp -o cutlass_host.so
#include "cute/layout.hpp"
#include "cutlass/detail/sm100_blockscaled_layout.hpp"

extern "C" {

// Offsets of all scales of a matrix [rows, blocks * block] where CUTLASS's kernels look for them;
// the bytes that they span.
int64_t cutlass_offsets(int rows, int num_blocks, int block, int64_t* offsets) {
  const auto fill = [&](const auto& layout) {
    for (int row = 0; row < rows; ++row) {
      for (int i = 0; i < num_blocks; ++i) {
        offsets[int64_t(row) * num_blocks + i] = layout(cute::make_coord(row, i * block, 0));
      }
    }
    return int64_t(cute::cosize(cute::filter_zeros(layout)));
  };
  const auto shape = cute::make_shape(rows, 1, num_blocks * block, 1);
  return block == 16 ? fill(cutlass::detail::Sm1xxBlockScaledConfig<16>::tile_atom_to_shape_SFA(shape))
                     : fill(cutlass::detail::Sm1xxBlockScaledConfig<32>::tile_atom_to_shape_SFA(shape));
}
}  // extern "C"
