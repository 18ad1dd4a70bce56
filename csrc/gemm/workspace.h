// What every launcher needs: pieces of workspace, the device, the epilogue's factors, the start.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "cutlass/cutlass.h"
#include "cutlass/kernel_hardware_info.h"

namespace megatron_ext::gemm {

constexpr std::size_t kWorkspaceAlignment = 128;

inline std::size_t aligned(std::size_t bytes) {
  return (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
}

inline cutlass::KernelHardwareInfo hardware() {
  cutlass::KernelHardwareInfo info;
  cudaGetDevice(&info.device_id);
  info.sm_count = cutlass::KernelHardwareInfo::query_device_multiprocessor_count(info.device_id);
  return info;
}

/// out = alpha * product (+ out).
template <class Fusion>
void set_scale(Fusion& fusion, const float* alpha, bool accumulate) {
  fusion.alpha = 1.0f;
  fusion.alpha_ptr = alpha;
  fusion.beta = accumulate ? 1.0f : 0.0f;
}

/// nullptr, or what CUTLASS says went wrong.
template <class Gemm>
const char* run(const typename Gemm::Arguments& arguments, void* workspace, cudaStream_t stream) {
  Gemm gemm;
  cutlass::Status status = Gemm::can_implement(arguments);
  if (status == cutlass::Status::kSuccess) status = gemm.initialize(arguments, workspace, stream);
  if (status == cutlass::Status::kSuccess) status = gemm.run(stream);
  return status == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(status);
}

}  // namespace megatron_ext::gemm
