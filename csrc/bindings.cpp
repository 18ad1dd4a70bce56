// The kernels as operators of torch: torch.ops.megatron_ext_cuda.*. The only file that knows torch.
//
// An operator checks what a kernel would otherwise read or write out of bounds; the message says the
// condition. Who allocates, chooses and explains is Python (megatron_ext/precision/*_cuda.py).
//
// With MEGATRON_EXT_EMULATE it is built for the CPU, with the kernels as fibers.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <vector>

#include "quantize/quantize.h"

#if defined(MEGATRON_EXT_EMULATE)
#define MEGATRON_EXT_KEY CPU
#else
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "gemm/operators.h"
#define MEGATRON_EXT_KEY CUDA
#endif

namespace {

using at::Tensor;

// The current stream of a tensor's device, which is made the current device meanwhile.
class OnDevice {
 public:
#if defined(MEGATRON_EXT_EMULATE)
  explicit OnDevice(const Tensor&) {}
  void* stream() const { return nullptr; }
#else
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.device()) {}
  void* stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }

 private:
  c10::cuda::CUDAGuard guard_;
#endif
};

void check_launch(const char* error) { TORCH_CHECK(error == nullptr, "CUDA kernel: ", error); }

// ---- quantise ------------------------------------------------------------------------------

constexpr int64_t kRuleNumbers = int64_t(sizeof(megatron_ext::Rule) / sizeof(int));

megatron_ext::Matrix matrix_of(const Tensor& matrix) {
  TORCH_CHECK(matrix.dim() == 2 && matrix.is_contiguous(), "matrix must be 2-D and contiguous");
  const auto type = matrix.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
              "matrix must be float32, bfloat16 or float16");
  const auto input = type == at::kFloat      ? megatron_ext::Input::kFloat32
                     : type == at::kBFloat16 ? megatron_ext::Input::kBFloat16
                                             : megatron_ext::Input::kFloat16;
  return {matrix.const_data_ptr(), int(input), matrix.size(0), matrix.size(1)};
}

megatron_ext::Rule rule_of(at::IntArrayRef numbers) {
  TORCH_CHECK(int64_t(numbers.size()) == kRuleNumbers, "a rule has ", kRuleNumbers, " numbers");
  int values[kRuleNumbers];
  for (int64_t i = 0; i < kRuleNumbers; ++i) values[i] = int(numbers[i]);
  megatron_ext::Rule rule;
  static_assert(sizeof(rule) == sizeof(values));
  std::memcpy(&rule, values, sizeof(rule));
  const int group = rule.hadamard_group;
  TORCH_CHECK(group >= 1 && group <= 128 && (group & (group - 1)) == 0,
              "hadamard_group must be a power of two up to 128");
  return rule;
}

const float* floats(const std::optional<Tensor>& tensor, int64_t at_least, const Tensor& matrix,
                    const char* name) {
  if (!tensor.has_value()) return nullptr;
  TORCH_CHECK(tensor->scalar_type() == at::kFloat && tensor->is_contiguous() &&
                  tensor->numel() >= at_least && tensor->device() == matrix.device(),
              name, " must be ", at_least, " contiguous float32 on the matrix's device");
  return tensor->const_data_ptr<float>();
}

void* written(const Tensor& tensor, int64_t num_bytes, const Tensor& matrix, const char* name) {
  TORCH_CHECK(tensor.is_contiguous() && int64_t(tensor.nbytes()) == num_bytes &&
                  tensor.device() == matrix.device(),
              name, " must be ", num_bytes, " contiguous bytes on the matrix's device");
  return tensor.mutable_data_ptr();
}

int64_t num_blocks(int64_t size, int block) { return block == 0 ? 1 : (size + block - 1) / block; }

// A copy with rows x columns: `stored` is codes, scales, then the tensor's scale and the mask where
// the rule has them. An empty rule: no such copy.
megatron_ext::Copy copy_of(const Tensor& matrix, int64_t rows, int64_t columns,
                           at::IntArrayRef numbers, at::TensorList stored,
                           const std::optional<Tensor>& signs, const std::optional<Tensor>& amax,
                           int64_t seed) {
  megatron_ext::Copy copy{};
  if (numbers.empty()) return copy;
  const megatron_ext::Rule rule = copy.rule = rule_of(numbers);
  const bool is_packed = rule.element == int(megatron_ext::Element::kE2M1);
  const bool has_scale =
      rule.has_tensor_scale || rule.scale_rule == int(megatron_ext::ScaleRule::kHeadroom);
  const int block = rule.block_columns;
  TORCH_CHECK(columns % rule.hadamard_group == 0, "hadamard_group must divide the columns");
  TORCH_CHECK(!is_packed || (block > 0 && columns % block == 0), "blocks must divide the columns");
  TORCH_CHECK(block == 0 || (block % 16 == 0 && 128 % block == 0),
              "blocks must have 16, 32, 64 or 128 columns");
  TORCH_CHECK(!rule.keeps_mask || columns % 8 == 0, "a mask needs columns that 8 divides");
  TORCH_CHECK(int64_t(stored.size()) == 2 + has_scale + (rule.keeps_mask != 0),
              "stored must have codes, scales and what the rule has besides");
  const int64_t blocks = num_blocks(rows, rule.block_rows) * num_blocks(columns, block);
  const int64_t scale_bytes = rule.scale_format == 0 ? 4 : 1;
  copy.codes = static_cast<uint8_t*>(
      written(stored[0], rows * columns / (is_packed ? 2 : 1), matrix, "codes"));
  copy.scales = written(stored[1], blocks * scale_bytes, matrix, "scales");
  if (has_scale) copy.tensor_scale = static_cast<float*>(written(stored[2], 4, matrix, "scale"));
  if (rule.keeps_mask) {
    copy.kept = static_cast<uint8_t*>(written(stored.back(), rows * columns / 8, matrix, "kept"));
  }
  copy.signs = floats(signs, rule.hadamard_group, matrix, "signs");
  const bool is_by_row = rule.block_rows == 1 && block == 0;
  copy.amax = floats(amax, is_by_row ? rows : 1, matrix, "amax");
  TORCH_CHECK(copy.amax != nullptr || !megatron_ext::needs_amax(rule), "the rule needs amax");
  copy.seed = uint64_t(seed);
  return copy;
}

void quantize(const Tensor& matrix, at::IntArrayRef row_rule, at::TensorList row_stored,
              const std::optional<Tensor>& row_signs, const std::optional<Tensor>& row_amax,
              int64_t row_seed, at::IntArrayRef transposed_rule, at::TensorList transposed_stored,
              const std::optional<Tensor>& transposed_signs,
              const std::optional<Tensor>& transposed_amax, int64_t transposed_seed) {
  const megatron_ext::Matrix input = matrix_of(matrix);
  const megatron_ext::Copy row = copy_of(matrix, input.rows, input.columns, row_rule, row_stored,
                                         row_signs, row_amax, row_seed);
  const megatron_ext::Copy transposed =
      copy_of(matrix, input.columns, input.rows, transposed_rule, transposed_stored,
              transposed_signs, transposed_amax, transposed_seed);
  const OnDevice device(matrix);
  check_launch(megatron_ext::quantize_matrix(input, row, transposed, device.stream()));
}

void largest_magnitudes(const Tensor& matrix, at::IntArrayRef numbers,
                        const std::optional<Tensor>& signs, bool is_transposed,
                        const Tensor& amax) {
  const megatron_ext::Matrix input = matrix_of(matrix);
  const megatron_ext::Rule rule = rule_of(numbers);
  const int64_t rows = is_transposed ? input.columns : input.rows;
  const int64_t columns = is_transposed ? input.rows : input.columns;
  TORCH_CHECK(columns % rule.hadamard_group == 0, "hadamard_group must divide the columns");
  const int64_t count = rule.block_rows == 1 && rule.block_columns == 0 ? rows : 1;
  float* out = static_cast<float*>(written(amax, count * 4, matrix, "amax"));
  const OnDevice device(matrix);
  check_launch(megatron_ext::largest_magnitudes(
      input, rule, floats(signs, rule.hadamard_group, matrix, "signs"), is_transposed, out,
      device.stream()));
}

#if !defined(MEGATRON_EXT_EMULATE)
// ---- multiply: gemm/operators.h; CUTLASS's kernels have no emulation -----------------------

void multiply(const Tensor& out, const Tensor& left, const Tensor& left_scales, const Tensor& right,
              const Tensor& right_scales, const std::optional<Tensor>& alpha,
              const std::optional<Tensor>& starts, at::IntArrayRef plan, bool accumulate) {
  const OnDevice device(out);
  check_launch(megatron_ext::gemm::multiply_tensors(
      {out, left, left_scales, right, right_scales, alpha, starts, plan, accumulate},
      device.stream()));
}
#endif

}  // namespace

TORCH_LIBRARY(megatron_ext_cuda, library) {
  // Written in place; struct Rule of quantize/quantize.h says what the numbers of a rule are.
  library.def(
      "quantize(Tensor matrix, int[] row_rule, Tensor(a!)[] row_stored, Tensor? row_signs, "
      "Tensor? row_amax, int row_seed, int[] transposed_rule, Tensor(b!)[] transposed_stored, "
      "Tensor? transposed_signs, Tensor? transposed_amax, int transposed_seed) -> ()");
  library.def(
      "largest_magnitudes(Tensor matrix, int[] rule, Tensor? signs, bool is_transposed, "
      "Tensor(a!) amax) -> ()");
#if !defined(MEGATRON_EXT_EMULATE)
  // plan: kernel, m, n, k, rows that share a scale left and right (gemm/operators.h).
  library.def(
      "multiply(Tensor(a!) out, Tensor left, Tensor left_scales, Tensor right, "
      "Tensor right_scales, Tensor? alpha, Tensor? starts, int[] plan, bool accumulate) -> ()");
#endif
}

TORCH_LIBRARY_IMPL(megatron_ext_cuda, MEGATRON_EXT_KEY, library) {
  library.impl("quantize", &quantize);
  library.impl("largest_magnitudes", &largest_magnitudes);
#if !defined(MEGATRON_EXT_EMULATE)
  library.impl("multiply", &multiply);
#endif
}
