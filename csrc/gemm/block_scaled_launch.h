// How a block-scaled product is started on Blackwell. Included by the .cu files, which name kernels.
#pragma once

#include "block_scaled.h"
#include "gemm.h"
#include "scale_launch.h"
#include "scale_layout.h"
#include "workspace.h"

namespace megatron_ext::gemm {

/// Swizzled scales of one operand.
template <class Format>
std::size_t swizzled_workspace(int rows, int k) {
  return aligned(std::size_t(swizzled_bytes(rows, ceil_divide(k, Format::kBlock))));
}

template <class Device, class Kernel>
typename Kernel::Gemm::Arguments block_scaled_arguments(const Problem& problem,
                                                        const uint8_t* left_scales,
                                                        const uint8_t* right_scales) {
  using namespace cute;
  using Gemm = typename Kernel::Gemm;
  using Mainloop = typename Kernel::Mainloop;
  using Layout = typename Mainloop::Sm1xxBlkScaledConfig;
  using Element = typename Gemm::ElementA;
  using Scale = typename Kernel::Operand::ScaleFactorType;
  int m = problem.m, n = problem.n, k = problem.k;
  auto shape = make_shape(m, n, k, 1);

  typename Gemm::Arguments result{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {m, n, k, 1},
      {reinterpret_cast<const Element*>(problem.left), {int64_t(k), _1{}, int64_t(0)},
       reinterpret_cast<const Element*>(problem.right), {int64_t(k), _1{}, int64_t(0)},
       reinterpret_cast<const Scale*>(left_scales), Layout::tile_atom_to_shape_SFA(shape),
       reinterpret_cast<const Scale*>(right_scales), Layout::tile_atom_to_shape_SFB(shape)},
      {{}, nullptr, {int64_t(n), _1{}, int64_t(0)}, nullptr, {int64_t(n), _1{}, int64_t(0)}},
      hardware()};
  using Source = typename Kernel::Source;
  if constexpr (!is_void_v<Source>) {
    result.epilogue.ptr_C = static_cast<const Source*>(problem.out);
  }
  result.epilogue.ptr_D = static_cast<typename Gemm::ElementD*>(problem.out);
  set_scale(result.epilogue.thread, problem.alpha, problem.accumulate);
  Device::place(result.hw_info);
  return result;
}

/// Workspace: both operands' scales, then what CUTLASS asks for.
template <class Device, class Kernel>
std::size_t block_scaled_workspace_bytes(const Problem& problem) {
  using Format = typename Kernel::Format;
  return swizzled_workspace<Format>(problem.m, problem.k) +
         swizzled_workspace<Format>(problem.n, problem.k) +
         Kernel::Gemm::get_workspace_size(
             block_scaled_arguments<Device, Kernel>(problem, nullptr, nullptr));
}

template <class Device, class Kernel>
const char* block_scaled_multiply(const Problem& problem, void* workspace, cudaStream_t stream) {
  using Format = typename Kernel::Format;
  int64_t num_blocks = ceil_divide(problem.k, Format::kBlock);
  auto* left_scales = static_cast<uint8_t*>(workspace);
  auto* right_scales = left_scales + swizzled_workspace<Format>(problem.m, problem.k);
  auto* rest = right_scales + swizzled_workspace<Format>(problem.n, problem.k);
  const char* error = swizzle_scales(static_cast<const uint8_t*>(problem.left_scales), left_scales,
                                     problem.m, num_blocks, problem.left_block_rows, stream);
  if (error == nullptr) {
    error = swizzle_scales(static_cast<const uint8_t*>(problem.right_scales), right_scales,
                           problem.n, num_blocks, problem.right_block_rows, stream);
  }
  if (error != nullptr) return error;
  return run<typename Kernel::Gemm>(
      block_scaled_arguments<Device, Kernel>(problem, left_scales, right_scales), rest, stream);
}

/// Both types of `out`.
template <class Device, class Format>
BlockScaledKernels block_scaled_kernels() {
  using ToFloat = BlockScaledKernel<Device, Format, float>;
  using ToBFloat16 = BlockScaledKernel<Device, Format, cutlass::bfloat16_t>;
  return {
      [](const Problem& problem) {
        return problem.out_type == Out::kBFloat16
                   ? block_scaled_workspace_bytes<Device, ToBFloat16>(problem)
                   : block_scaled_workspace_bytes<Device, ToFloat>(problem);
      },
      [](const Problem& problem, void* workspace, cudaStream_t stream) {
        return problem.out_type == Out::kBFloat16
                   ? block_scaled_multiply<Device, ToBFloat16>(problem, workspace, stream)
                   : block_scaled_multiply<Device, ToFloat>(problem, workspace, stream);
      }};
}

}  // namespace megatron_ext::gemm
