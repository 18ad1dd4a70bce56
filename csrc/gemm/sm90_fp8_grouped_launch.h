// How the products of groups (experts) are started on sm_90a, all in one kernel.
//
// Groups are ranges of tokens: offsets[g] .. offsets[g + 1], known to the device only.
//
//     of rows:   out[range] = left[range] right[g]^T        left [tokens, k], right [groups, n, k]
//     of depth:  out[g] (+)= left[:, range] right[:, range]^T        out [groups, m, n], float32
//
// A small kernel turns the offsets into the pointers, strides and shapes that CUTLASS reads, so the
// host never waits for them. Groups of depth begin at multiples of 128 tokens; one without tokens
// has no tiles, its part of `out` stays as it is.
#pragma once

#include "sm90_fp8_launch.h"

namespace megatron_ext::gemm::sm90 {

/// What CUTLASS wants of every group, in one piece of workspace.
template <class Kernel>
struct GroupTables {
  using Shape = cute::Shape<int, int, int>;
  using OperandStride = typename Kernel::Gemm::GemmKernel::InternalStrideA;
  using OutStride = typename Kernel::Gemm::GemmKernel::InternalStrideD;
  using OutElement = typename Kernel::Gemm::ElementD;

  Shape* shapes;
  const Element** left;
  const Element** right;
  const float** left_scales;
  const float** right_scales;
  OutElement** out;
  OperandStride* operand_strides;
  OutStride* out_strides;

  static std::size_t bytes(int groups) {
    return aligned((sizeof(Shape) + 5 * sizeof(void*) + sizeof(OperandStride) + sizeof(OutStride)) *
                   groups + 64);
  }

  static GroupTables in(uint8_t* place, int groups) {
    GroupTables tables;
    auto take = [&](auto*& member) {
      using Member = std::remove_reference_t<decltype(*member)>;
      member = reinterpret_cast<Member*>(place);
      place += (sizeof(Member) * groups + 7) / 8 * 8;
    };
    take(tables.left);
    take(tables.right);
    take(tables.left_scales);
    take(tables.right_scales);
    take(tables.out);
    take(tables.operand_strides);
    take(tables.out_strides);
    take(tables.shapes);
    return tables;
  }
};

template <class Kernel, bool kOfDepth>
__global__ void fill_tables(GroupTables<Kernel> tables, Problem problem, const int* offsets,
                            const float* left_scales, const float* right_scales, int groups) {
  int g = blockIdx.x * blockDim.x + threadIdx.x;
  if (g >= groups) return;
  int64_t start = offsets[g], size = offsets[g + 1] - offsets[g];
  int64_t m = problem.m, n = problem.n, k = problem.k, blocks = ceil_divide(k, kScaleDepth);
  auto* left = reinterpret_cast<const Element*>(problem.left);
  auto* right = reinterpret_cast<const Element*>(problem.right);
  auto* out = static_cast<typename GroupTables<Kernel>::OutElement*>(problem.out);
  if constexpr (kOfDepth) {
    tables.left[g] = left + start;
    tables.right[g] = right + start;
    tables.left_scales[g] = left_scales + start / kScaleDepth * m;
    tables.right_scales[g] = right_scales + start / kScaleDepth * n;
    tables.out[g] = out + g * m * n;
    tables.shapes[g] = size > 0 ? cute::make_shape(int(m), int(n), int(size))
                                : cute::make_shape(0, 0, kScaleDepth);
  } else {
    tables.left[g] = left + start * k;
    tables.right[g] = right + g * n * k;
    tables.left_scales[g] = left_scales + start * blocks;
    tables.right_scales[g] = right_scales + g * ceil_divide(n, 128) * blocks;
    tables.out[g] = out + start * n;
    tables.shapes[g] = cute::make_shape(int(size), int(n), int(k));
  }
  tables.operand_strides[g] = cute::make_stride(k, cute::_1{}, cute::_0{});
  tables.out_strides[g] = cute::make_stride(n, cute::_1{}, cute::_0{});
}

template <class Kernel>
typename Kernel::Gemm::Arguments grouped_arguments(const Problem& problem, int groups,
                                                   const GroupTables<Kernel>& tables) {
  typename Kernel::Gemm::Arguments result{
      cutlass::gemm::GemmUniversalMode::kGrouped,
      {groups, tables.shapes, nullptr},
      {tables.left, tables.operand_strides, tables.right, tables.operand_strides,
       tables.left_scales, nullptr, tables.right_scales, nullptr},
      {{}, nullptr, tables.out_strides, tables.out, tables.out_strides},
      hardware()};
  if constexpr (!cute::is_void_v<typename Kernel::Source>) {
    result.epilogue.ptr_C = const_cast<const float**>(tables.out);
  }
  set_scale(result.epilogue.thread, problem.alpha, problem.accumulate);
  return result;
}

template <class Kernel, bool kOfDepth>
std::size_t grouped_workspace_bytes(const Problem& problem, const Groups& groups) {
  std::size_t scales = scale_bytes(problem.m, problem.k);
  if (kOfDepth) scales += scale_bytes(problem.n, problem.k);
  auto tables = GroupTables<Kernel>::in(nullptr, groups.num_groups);
  return scales + GroupTables<Kernel>::bytes(groups.num_groups) +
         Kernel::Gemm::get_workspace_size(
             grouped_arguments<Kernel>(problem, groups.num_groups, tables));
}

template <class Kernel, bool kOfDepth>
const char* grouped_multiply(const Problem& problem, const Groups& groups, void* workspace,
                             cudaStream_t stream) {
  constexpr int kThreads = 64;
  int num_blocks = int(ceil_divide(problem.k, kScaleDepth));
  auto* place = static_cast<uint8_t*>(workspace);
  auto* left_scales = reinterpret_cast<float*>(place);
  place += scale_bytes(problem.m, problem.k);
  // Groups of rows have their scales by column each; groups of depth are ranges of columns. No
  // padding: CUTLASS's kernel of groups takes scales element by element.
  const char* error = scales_by_column(
      static_cast<const float*>(problem.left_scales), left_scales, problem.m, num_blocks, problem.m,
      kOfDepth ? nullptr : groups.offsets, groups.num_groups, stream);
  if (error != nullptr) return error;
  auto* right_scales = static_cast<const float*>(problem.right_scales);
  if constexpr (kOfDepth) {
    auto* by_column = reinterpret_cast<float*>(place);
    error = scales_by_column(right_scales, by_column, problem.n, num_blocks, problem.n, nullptr, 0,
                             stream);
    if (error != nullptr) return error;
    right_scales = by_column;
    place += scale_bytes(problem.n, problem.k);
  }

  auto tables = GroupTables<Kernel>::in(place, groups.num_groups);
  place += GroupTables<Kernel>::bytes(groups.num_groups);
  fill_tables<Kernel, kOfDepth>
      <<<unsigned(ceil_divide(groups.num_groups, kThreads)), kThreads, 0, stream>>>(
          tables, problem, groups.offsets, left_scales, right_scales, groups.num_groups);
  cudaError_t launched = cudaGetLastError();
  if (launched != cudaSuccess) return cudaGetErrorString(launched);

  return run<typename Kernel::Gemm>(
      grouped_arguments<Kernel>(problem, groups.num_groups, tables), place, stream);
}

}  // namespace megatron_ext::gemm::sm90
