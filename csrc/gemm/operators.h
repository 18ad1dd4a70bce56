// From torch's tensors to the launchers of `gemm.h`. Included by bindings.cpp alone.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>

#include "gemm.h"

namespace megatron_ext::gemm {

/// As `KERNELS` of megatron_ext/precision/gemm_cuda_plan.py numbers them.
enum class Kernel : int64_t {
  kFp8Tall = 0,
  kFp8Small = 1,
  kFp8Rows = 2,
  kNvFp4Sm100 = 3,
  kMxFp4Sm100 = 4,
  kMxFp8Sm100 = 5,
  kNvFp4Sm120 = 6,
  kMxFp4Sm120 = 7,
  kMxFp8Sm120 = 8,
};

struct Tensors {
  const at::Tensor& out;
  const at::Tensor& left;
  const at::Tensor& left_scales;
  const at::Tensor& right;
  const at::Tensor& right_scales;
  const std::optional<at::Tensor>& alpha;   // float32 []
  const std::optional<at::Tensor>& starts;  // int32 [groups + 1]
  at::IntArrayRef plan;                     // Kernel, m, n, k, left block rows, right block rows
  bool accumulate;
};

inline int64_t up(int64_t value, int64_t by) { return (value + by - 1) / by; }

/// Columns that share a scale, and elements in a byte.
struct Format {
  int block, per_byte, scale_bytes;
};

inline Format format_of(Kernel kernel) {
  switch (kernel) {
    case Kernel::kNvFp4Sm100:
    case Kernel::kNvFp4Sm120:
      return {16, 2, 1};
    case Kernel::kMxFp4Sm100:
    case Kernel::kMxFp4Sm120:
      return {32, 2, 1};
    case Kernel::kMxFp8Sm100:
    case Kernel::kMxFp8Sm120:
      return {32, 1, 1};
    default:
      return {128, 1, 4};
  }
}

inline void check_bytes(const at::Tensor& tensor, int64_t num_bytes, const at::Tensor& out,
                        const char* name) {
  TORCH_CHECK(tensor.is_contiguous() && int64_t(tensor.nbytes()) == num_bytes &&
                  tensor.device() == out.device(),
              name, " must be ", num_bytes, " contiguous bytes on the device of out");
  TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0, name,
              " must begin at a multiple of 16 bytes");
}

/// Every size is checked against the tensors, so that no kernel leaves them.
inline Problem problem_of(const Tensors& tensors, Kernel kernel) {
  const auto plan = tensors.plan;
  const int64_t m = plan[1], n = plan[2], k = plan[3], left_rows = plan[4], right_rows = plan[5];
  const Format format = format_of(kernel);
  const bool is_fp8 = format.scale_bytes == 4;
  const bool has_blocks = kernel == Kernel::kFp8Tall || kernel == Kernel::kFp8Small;
  TORCH_CHECK(m > 0 && n > 0 && k > 0 && m <= INT_MAX && n <= INT_MAX && k <= INT_MAX,
              "m, n and k must be above 0 and 32 bits wide");
  TORCH_CHECK(k % (16 * format.per_byte) == 0, "a row of codes must be a multiple of 16 bytes");
  TORCH_CHECK(is_fp8 ? left_rows == 1 && right_rows == (has_blocks ? 128 : 1)
                     : (left_rows == 1 || left_rows == 16) && (right_rows == 1 || right_rows == 16),
              "no kernel for blocks of so many rows");
  const int64_t groups = tensors.starts.has_value() ? tensors.starts->numel() - 1 : 1;
  const bool is_depth = tensors.starts.has_value() && !has_blocks;
  const int64_t stacks = tensors.starts.has_value() && has_blocks ? groups : 1;
  const int64_t blocks = up(k, format.block);
  check_bytes(tensors.left, m * k / format.per_byte, tensors.out, "left");
  check_bytes(tensors.right, stacks * n * k / format.per_byte, tensors.out, "right");
  check_bytes(tensors.left_scales, up(m, left_rows) * blocks * format.scale_bytes, tensors.out,
              "left_scales");
  check_bytes(tensors.right_scales, stacks * up(n, right_rows) * blocks * format.scale_bytes,
              tensors.out, "right_scales");
  const bool is_float = tensors.out.scalar_type() == at::kFloat;
  TORCH_CHECK(is_float || (tensors.out.scalar_type() == at::kBFloat16 && !tensors.accumulate),
              "out must be float32, or bfloat16 where nothing is added to it");
  const int64_t element = is_float ? 4 : 2;
  TORCH_CHECK(n * element % 16 == 0, "a row of out must be a multiple of 16 bytes");
  check_bytes(tensors.out, (is_depth ? groups : 1) * m * n * element, tensors.out, "out");
  const float* alpha = nullptr;
  if (tensors.alpha.has_value()) {
    TORCH_CHECK(tensors.alpha->scalar_type() == at::kFloat && tensors.alpha->numel() == 1 &&
                    tensors.alpha->device() == tensors.out.device(),
                "alpha must be one float32 on the device of out");
    alpha = tensors.alpha->const_data_ptr<float>();
  }
  return {static_cast<const uint8_t*>(tensors.left.const_data_ptr()),
          static_cast<const uint8_t*>(tensors.right.const_data_ptr()),
          tensors.left_scales.const_data_ptr(),
          tensors.right_scales.const_data_ptr(),
          alpha,
          tensors.out.mutable_data_ptr(),
          int(m),
          int(n),
          int(k),
          int(left_rows),
          int(right_rows),
          is_float ? Out::kFloat32 : Out::kBFloat16,
          tensors.accumulate};
}

inline BlockScaledKernels block_scaled(Kernel kernel) {
  switch (kernel) {
    case Kernel::kNvFp4Sm100:
      return sm100::nvfp4();
    case Kernel::kMxFp4Sm100:
      return sm100::mxfp4();
    case Kernel::kMxFp8Sm100:
      return sm100::mxfp8();
    case Kernel::kNvFp4Sm120:
      return sm120::nvfp4();
    case Kernel::kMxFp4Sm120:
      return sm120::mxfp4();
    default:
      return sm120::mxfp8();
  }
}

/// On the current device and the stream given; nullptr, or what went wrong.
inline const char* multiply_tensors(const Tensors& tensors, void* stream_pointer) {
  TORCH_CHECK(tensors.plan.size() == 6, "a plan has 6 numbers");
  TORCH_CHECK(tensors.plan[0] >= 0 && tensors.plan[0] <= int64_t(Kernel::kMxFp8Sm120),
              "no kernel of that number");
  const auto kernel = Kernel(tensors.plan[0]);
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const auto workspace = [&](std::size_t bytes) {
    return at::empty({int64_t(bytes)}, tensors.out.options().dtype(at::kByte));
  };
  if (!tensors.starts.has_value()) {
    const Problem problem = problem_of(tensors, kernel);
    if (kernel == Kernel::kFp8Rows) {
      TORCH_CHECK(problem.out_type == Out::kFloat32, "wgrad's out must be float32");
      at::Tensor space = workspace(sm90::rows_workspace_bytes(problem));
      return sm90::rows_multiply(problem, space.mutable_data_ptr(), stream);
    }
    if (kernel == Kernel::kFp8Tall || kernel == Kernel::kFp8Small) {
      const bool is_tall = kernel == Kernel::kFp8Tall;
      at::Tensor space = workspace(sm90::weights_workspace_bytes(problem, is_tall));
      return sm90::weights_multiply(problem, is_tall, space.mutable_data_ptr(), stream);
    }
    const BlockScaledKernels kernels = block_scaled(kernel);
    at::Tensor space = workspace(kernels.workspace_bytes(problem));
    return kernels.multiply(problem, space.mutable_data_ptr(), stream);
  }
  const at::Tensor& starts = *tensors.starts;
  TORCH_CHECK(starts.scalar_type() == at::kInt && starts.is_contiguous() && starts.numel() > 1 &&
                  starts.device() == tensors.out.device(),
              "starts must be contiguous int32 on the device of out, two of them at least");
  const Groups groups{starts.const_data_ptr<int32_t>(), int(starts.numel() - 1)};
  const Problem problem = problem_of(tensors, kernel);
  if (kernel == Kernel::kFp8Rows) {
    TORCH_CHECK(problem.out_type == Out::kFloat32 && problem.accumulate,
                "products of groups of depth are added to float32");
    at::Tensor space = workspace(sm90::grouped_rows_workspace_bytes(problem, groups));
    return sm90::grouped_rows_multiply(problem, groups, space.mutable_data_ptr(), stream);
  }
  TORCH_CHECK(kernel == Kernel::kFp8Tall, "no grouped kernel of that number");
  at::Tensor space = workspace(sm90::grouped_weights_workspace_bytes(problem, groups));
  return sm90::grouped_weights_multiply(problem, groups, space.mutable_data_ptr(), stream);
}

}  // namespace megatron_ext::gemm
