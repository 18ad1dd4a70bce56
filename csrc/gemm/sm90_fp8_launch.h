// How one product is started on sm_90a. Included by the .cu files, which name the kernels.
#pragma once

#include "cute/tensor.hpp"
#include "gemm.h"
#include "scale_launch.h"
#include "scale_layout.h"
#include "sm90_fp8.h"
#include "workspace.h"

namespace megatron_ext::gemm::sm90 {

/// Tiles of neighbouring rows and columns run together, so that their operands stay in L2.
constexpr int kTilesTogether = 8;

/// Scales by column of one operand.
inline std::size_t scale_bytes(int rows, int k) {
  return aligned(sizeof(float) * padded_rows(rows) * ceil_divide(k, kScaleDepth));
}

/// left_scales: by column. right_scales: by column, or row-major [ceil(n / 128), ceil(k / 128)].
template <class Kernel, bool kRightBlocks>
typename Kernel::Gemm::Arguments arguments(const Problem& problem, const float* left_scales,
                                           const float* right_scales) {
  using namespace cute;
  using Gemm = typename Kernel::Gemm;
  int m = problem.m, n = problem.n, k = problem.k;
  int num_blocks = int(ceil_divide(k, kScaleDepth));
  int left_rows = int(padded_rows(m)), right_rows = int(padded_rows(n));
  auto depth = make_shape(Int<kScaleDepth>{}, num_blocks);

  auto left_layout = make_layout(
      make_shape(make_shape(_1{}, left_rows), depth, 1),
      make_stride(make_stride(_0{}, _1{}), make_stride(_0{}, left_rows), left_rows * num_blocks));
  typename Kernel::RightScaleLayout right_layout;
  if constexpr (kRightBlocks) {
    int blocks_down = int(ceil_divide(n, 128));
    right_layout = make_layout(make_shape(make_shape(_128{}, blocks_down), depth, 1),
                               make_stride(make_stride(_0{}, num_blocks), make_stride(_0{}, _1{}),
                                           blocks_down * num_blocks));
  } else {
    right_layout = make_layout(make_shape(make_shape(_1{}, right_rows), depth, 1),
                               make_stride(make_stride(_0{}, _1{}), make_stride(_0{}, right_rows),
                                           right_rows * num_blocks));
  }

  typename Gemm::Arguments result{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {m, n, k, 1},
      {reinterpret_cast<const Element*>(problem.left), {int64_t(k), _1{}, int64_t(0)},
       reinterpret_cast<const Element*>(problem.right), {int64_t(k), _1{}, int64_t(0)}, left_scales,
       left_layout, right_scales, right_layout},
      {{}, nullptr, {int64_t(n), _1{}, int64_t(0)}, nullptr, {int64_t(n), _1{}, int64_t(0)}},
      hardware()};
  using Source = typename Kernel::Source;
  if constexpr (!is_void_v<Source>) {
    result.epilogue.ptr_C = static_cast<const Source*>(problem.out);
  }
  result.epilogue.ptr_D = static_cast<typename Gemm::ElementD*>(problem.out);
  set_scale(result.epilogue.thread, problem.alpha, problem.accumulate);
  result.scheduler.max_swizzle_size = kTilesTogether;
  return result;
}

/// Workspace: left scales by column, right ones if they are rows', then what CUTLASS asks for.
template <class Kernel, bool kRightBlocks>
std::size_t workspace_bytes(const Problem& problem) {
  std::size_t scales = scale_bytes(problem.m, problem.k);
  if (!kRightBlocks) scales += scale_bytes(problem.n, problem.k);
  return scales + Kernel::Gemm::get_workspace_size(
                      arguments<Kernel, kRightBlocks>(problem, nullptr, nullptr));
}

template <class Kernel, bool kRightBlocks>
const char* multiply(const Problem& problem, void* workspace, cudaStream_t stream) {
  int num_blocks = int(ceil_divide(problem.k, kScaleDepth));
  auto* place = static_cast<uint8_t*>(workspace);
  auto* left_scales = reinterpret_cast<float*>(place);
  const char* error = scales_by_column(static_cast<const float*>(problem.left_scales), left_scales,
                                       problem.m, num_blocks, int(padded_rows(problem.m)), nullptr,
                                       0, stream);
  if (error != nullptr) return error;
  place += scale_bytes(problem.m, problem.k);
  auto* right_scales = static_cast<const float*>(problem.right_scales);
  if constexpr (!kRightBlocks) {
    auto* by_column = reinterpret_cast<float*>(place);
    error = scales_by_column(right_scales, by_column, problem.n, num_blocks,
                             int(padded_rows(problem.n)), nullptr, 0, stream);
    if (error != nullptr) return error;
    right_scales = by_column;
    place += scale_bytes(problem.n, problem.k);
  }

  return run<typename Kernel::Gemm>(
      arguments<Kernel, kRightBlocks>(problem, left_scales, right_scales), place, stream);
}

}  // namespace megatron_ext::gemm::sm90
