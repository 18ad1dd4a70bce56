// Kernel types for Blackwell: the tensor core multiplies E2M1 or E4M3 codes and applies the blocks'
// scales itself. float32 or bfloat16 out.
//
//     out = alpha * left right^T (+ out)      left [m, k], right [n, k], out [m, n], all row-major
//
// | format | elements | scales of | instruction, sm_100a (tcgen05) | sm_120a (mma.sync) |
// |---|---|---|---|---|
// | nvfp4 | e2m1 | 16, e4m3 | kind::mxf4nvf4.block_scale.block16 | kind::mxf4nvf4 scale_vec::4X |
// | mxfp4 | e2m1 | 32, e8m0 | kind::mxf4.block_scale.block32 | kind::mxf4nvf4 scale_vec::2X |
// | mxfp8 | e4m3 | 32, e8m0 | kind::mxf8f6f4.block_scale.block32 | kind::mxf8f6f4 scale_vec::1X |
//
// Scales are swizzled first (`scale_layout.h`). Sums are float32 throughout, nothing is promoted.
// Compiled for their targets, never run: no such device was at hand.
#pragma once

#include "cutlass/bfloat16.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/operations.hpp"
#include "cutlass/float8.h"
#include "cutlass/float_subbyte.h"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

namespace megatron_ext::gemm {

struct NvFp4 {
  using Pair = cutlass::nv_float4_t<cutlass::float_e2m1_t>;
  static constexpr int kBlock = 16, kAlignment = 32, kBits = 4;
};
struct MxFp4 {
  using Pair = cutlass::mx_float4_t<cutlass::float_e2m1_t>;
  static constexpr int kBlock = 32, kAlignment = 32, kBits = 4;
};
struct MxFp8 {
  using Pair = cutlass::mx_float8_t<cutlass::float_e4m3_t>;
  static constexpr int kBlock = 32, kAlignment = 16, kBits = 8;
};

/// sm_100a. Two multiprocessors share a 256 x 256 tile; clusters of 4 x 2 where the chip has room for
/// them and pairs elsewhere, so that no multiprocessor stays idle.
struct Blackwell {
  using Arch = cutlass::arch::Sm100;
  template <class Format>
  using Tile = cute::Shape<cute::_256, cute::_256, cute::Int<1024 / Format::kBits>>;
  using Cluster = cute::Shape<int32_t, int32_t, cute::_1>;
  // Chosen automatically, a float32 epilogue leaves no shared memory for operands.
  template <class Out>
  using EpilogueTile = cute::Shape<cute::_128, cute::Int<128 / int(sizeof(Out))>>;
  using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecialized2Sm;
  template <class Format>
  using Schedule = cute::conditional_t<
      Format::kBits == 8, cutlass::gemm::KernelTmaWarpSpecialized2SmMxf8f6f4Sm100,
      cute::conditional_t<Format::kBlock == 16, cutlass::gemm::KernelTmaWarpSpecialized2SmNvf4Sm100,
                          cutlass::gemm::KernelTmaWarpSpecialized2SmMxf4Sm100>>;

  static void place(cutlass::KernelHardwareInfo& hardware) {
    hardware.cluster_shape = dim3(4, 2, 1);
    hardware.cluster_shape_fallback = dim3(2, 1, 1);
  }
};

/// sm_120a: 99 KiB of shared memory a block, no multicast; two warpgroups take turns at 128 x 128.
struct GeForce {
  using Arch = cutlass::arch::Sm120;
  template <class Format>
  using Tile = cute::Shape<cute::_128, cute::_128, cute::_128>;
  using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
  template <class Out>
  using EpilogueTile = cutlass::epilogue::collective::EpilogueTileAuto;
  using EpilogueSchedule = cutlass::epilogue::collective::EpilogueScheduleAuto;
  template <class Format>
  using Schedule = cutlass::gemm::KernelTmaWarpSpecializedPingpong;

  static void place(cutlass::KernelHardwareInfo&) {}
};

/// Device: Blackwell or GeForce. Out: float or bfloat16; only float is ever added to.
template <class Device, class Format_, class Out>
struct BlockScaledKernel {
  using Format = Format_;
  using Operand = typename Format::Pair;
  using Tile = typename Device::template Tile<Format>;
  using Cluster = typename Device::Cluster;
  using RowMajor = cutlass::layout::RowMajor;
  using Source = cute::conditional_t<cute::is_same_v<Out, float>, float, void>;
  static constexpr int kOutAlignment = 16 / int(sizeof(Out));

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      typename Device::Arch, cutlass::arch::OpClassBlockScaledTensorOp, Tile, Cluster,
      typename Device::template EpilogueTile<Out>, float, float, Source, RowMajor, kOutAlignment, Out,
      RowMajor, kOutAlignment, typename Device::EpilogueSchedule,
      cutlass::epilogue::fusion::LinearCombination<Out, float, Source, float>>::CollectiveOp;

  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      typename Device::Arch, cutlass::arch::OpClassBlockScaledTensorOp, Operand, RowMajor,
      Format::kAlignment, Operand, cutlass::layout::ColumnMajor, Format::kAlignment, float, Tile,
      Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<int(
          sizeof(typename Epilogue::SharedStorage))>,
      typename Device::template Schedule<Format>>::CollectiveOp;

  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<cutlass::gemm::kernel::GemmUniversal<
      cute::Shape<int, int, int, int>, Mainloop, Epilogue, void>>;
};

}  // namespace megatron_ext::gemm
