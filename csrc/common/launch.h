// Starting a kernel on a GPU, or by fibers on the CPU (emulate.h).
#pragma once

#include "../common/host_device.h"

#if defined(MEGATRON_EXT_EMULATE)
#include "../common/emulate.h"
#else
#include <cuda_runtime_api.h>
// Memory that the threads of a block share, as much as the launch says.
#define MEGATRON_EXT_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace megatron_ext {

// nullptr, or what CUDA says went wrong.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
                   unsigned shared_bytes, void* stream, Arguments... arguments) {
  if (blocks == 0) return nullptr;
#if defined(MEGATRON_EXT_EMULATE)
  (void)stream;
  emulate::run(blocks, threads, shared_bytes, [=] { kernel(arguments...); });
  return nullptr;
#else
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  }
  if (error == cudaSuccess) {
    kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#endif
}

}  // namespace megatron_ext
