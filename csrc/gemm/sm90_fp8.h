// Kernel types for sm_90a: e4m3 operands with float32 scales, float32 or bfloat16 out.
//
//     out = alpha * left right^T (+ out)      left [m, k], right [n, k], out [m, n], all row-major
//
// Left scales are 1 x 128. Right scales are 128 x 128 (weights) or 1 x 128 (wgrad).
// Scales of rows are read column by column of the grid ([k / 128, m], m padded to 4 so that the copy
// engine takes them); those of 128 x 128 blocks as `Quantized` keeps them, row-major.
#pragma once

#include "cutlass/bfloat16.h"
#include "cutlass/detail/blockwise_scale_layout.hpp"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/operations.hpp"
#include "cutlass/float8.h"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/group_array_problem_shape.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/gemm/kernel/tile_scheduler_params.h"
#include "promoted_mainloop.h"

namespace megatron_ext::gemm::sm90 {

using cute::_0;
using cute::_1;
using cute::_2;
using cute::_128;
using cute::_256;

using Element = cutlass::float_e4m3_t;
using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;

constexpr int kScaleDepth = 128;
constexpr int kOperandAlignment = 16;

/// 256 rows a block for large products, 128 where there are few rows. Two blocks share the left tile.
struct TallTile {
  using Shape = cute::Shape<_256, _128, _128>;
};
struct SmallTile {
  using Shape = cute::Shape<_128, _128, _128>;
};
using Cluster = cute::Shape<_1, _2, _1>;

/// Right scales: 128 columns share one, stored along k; or a column has its own, stored along n.
template <bool kRightBlocks>
using ScaleConfig = cutlass::detail::Sm90BlockwiseScaleConfig<
    1, kRightBlocks ? 128 : 1, kScaleDepth, cute::GMMA::Major::MN,
    kRightBlocks ? cute::GMMA::Major::K : cute::GMMA::Major::MN>;

template <class T, bool kGrouped>
using PointerIf = cute::conditional_t<kGrouped, T*, T>;

/// Tile: TallTile, SmallTile. Out: float or bfloat16; only float is ever added to.
template <class Tile, class Out, bool kRightBlocks, bool kGrouped>
struct Kernel {
  using TileShape = typename Tile::Shape;
  using Scales = ScaleConfig<kRightBlocks>;
  using LeftScaleLayout = decltype(Scales::deduce_layoutSFA());
  using RightScaleLayout = decltype(Scales::deduce_layoutSFB());
  using Source = cute::conditional_t<cute::is_same_v<Out, float>, float, void>;
  static constexpr int kOutAlignment = 16 / int(sizeof(Out));

  using MainloopSchedule = cute::conditional_t<
      kGrouped, cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperativeFP8Blockwise,
      cutlass::gemm::KernelTmaWarpSpecializedCooperativeFP8Blockwise>;
  using EpilogueSchedule =
      cute::conditional_t<kGrouped, cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative,
                          cutlass::epilogue::TmaWarpSpecializedCooperative>;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, Source,
      PointerIf<RowMajor, kGrouped>, kOutAlignment, Out, PointerIf<RowMajor, kGrouped>,
      kOutAlignment, EpilogueSchedule,
      cutlass::epilogue::fusion::LinearCombination<Out, float, Source, float>>::CollectiveOp;

  using Mainloop = PromotedMainloop<typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element,
      cute::tuple<PointerIf<RowMajor, kGrouped>, PointerIf<LeftScaleLayout, kGrouped>>,
      kOperandAlignment, Element,
      cute::tuple<PointerIf<ColumnMajor, kGrouped>, PointerIf<RightScaleLayout, kGrouped>>,
      kOperandAlignment, float, TileShape, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<int(
          sizeof(typename Epilogue::SharedStorage))>,
      MainloopSchedule>::CollectiveOp>;

  using ProblemShape =
      cute::conditional_t<kGrouped, cutlass::gemm::GroupProblemShape<cute::Shape<int, int, int>>,
                          cute::Shape<int, int, int, int>>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<
      cutlass::gemm::kernel::GemmUniversal<ProblemShape, Mainloop, Epilogue>>;
};

}  // namespace megatron_ext::gemm::sm90
