// A Hopper mainloop for FP8 operands with a float32 scale for each 128 of the contracted dim.
//
// The tensor core adds e4m3 products with few bits (about 14), so its sums may not grow long:
//
//     sum over blocks b of 128:   acc += (s_left[row, b] * s_right[column, b]) * partial_b
//
// partial_b is what wgmma made of one block; `acc` is float32 in registers ("promotion", DeepSeek-V3
// section 3.3.2). CUTLASS's own mainloop keeps one partial sum for each accumulator, which stops at
// tiles of 128 x 128. There a multiprocessor asks 48 bytes a clock of L2, more than it gives. This
// one walks the rows of a 256 x 128 tile in waves of 64 a warpgroup and keeps the partial sum of one
// wave: 128 + 64 registers instead of 256, and 32 bytes a clock with the left tile multicast to two
// blocks. While one warpgroup promotes, the other one's wgmma run.
//
// A stage of shared memory is released after the first wgmma of the next one has ended: all four warps
// of the warpgroup have issued that one, so all have read their scales of the stage before.
//
// Loads, barriers, scheduler and epilogue are those of the class it derives from.
// Compiled for sm_90a, never run: no such device was at hand.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/gemm/collective/collective_builder.hpp"

namespace megatron_ext::gemm {

/// Base: CUTLASS's blockwise-scaled collective for sm_90, single or of groups.
template <class Base>
struct PromotedMainloop : Base {
  using typename Base::ElementBlockScale;
  using typename Base::MainloopPipeline;
  using typename Base::Params;
  using typename Base::PipelineState;
  using typename Base::SmemLayoutA;
  using typename Base::SmemLayoutB;
  using typename Base::SmemLayoutSFA;
  using typename Base::SmemLayoutSFB;
  using typename Base::TensorStorage;
  using typename Base::TiledMma;
  using typename Base::TileShape;

  static constexpr bool kOneRightScale = Base::ScaleNsPerTile == 1;
  static_assert(Base::ScaleMsPerTile == cute::size<0>(TileShape{}), "a scale for each row");
  static_assert(kOneRightScale || Base::ScaleNsPerTile == cute::size<1>(TileShape{}),
                "a scale for each column, or one for the tile");

  /// The products of one tile. No k tiles at all leave zeros: an expert without tokens.
  template <class Accumulators>
  CUTLASS_DEVICE void mma(MainloopPipeline pipeline, PipelineState stage_state,
                          Accumulators& accumulators, int num_k_tiles, int thread_index,
                          TensorStorage& shared, Params const&) {
    using namespace cute;
    Tensor left = make_tensor(make_smem_ptr(shared.smem_A.data()), SmemLayoutA{});
    Tensor right = make_tensor(make_smem_ptr(shared.smem_B.data()), SmemLayoutB{});
    Tensor left_scales = spread_left(make_smem_ptr(shared.smem_SFA.data()));
    Tensor right_scales = spread_right(make_smem_ptr(shared.smem_SFB.data()));

    TiledMma tiled_mma;
    constexpr int kWarpGroups = size(TiledMma{}) / cutlass::NumThreadsPerWarpGroup;
    int warp_group = __shfl_sync(0xFFFFFFFF, thread_index / cutlass::NumThreadsPerWarpGroup, 0);
    auto group_mma = tiled_mma.get_slice(
        make_layout(Int<kWarpGroups>{}, Int<cutlass::NumThreadsPerWarpGroup>{})(warp_group));
    auto thread_mma = tiled_mma.get_slice(thread_index);
    Tensor left_parts = group_mma.make_fragment_A(group_mma.partition_A(left));
    Tensor right_parts = group_mma.make_fragment_B(group_mma.partition_B(right));
    // (value, wave, 1, (k block, stage))
    Tensor my_left_scales = thread_mma.partition_C(left_scales);
    Tensor my_right_scales = thread_mma.partition_C(right_scales);

    static_assert(decltype(size<2>(accumulators))::value == 1, "one instruction covers the columns");
    constexpr int kWaves = decltype(size<1>(accumulators))::value;
    constexpr int kInstructions = decltype(size<2>(left_parts))::value;
    Tensor partial = make_fragment_like(accumulators(_, _0{}, _0{}));
    Tensor row_scales =
        make_tensor_like<ElementBlockScale>(my_left_scales(_, _0{}, _0{}, make_coord(_0{}, 0)));

    clear(accumulators);
    PipelineState previous = stage_state;
    bool is_first = true;
    CUTLASS_PRAGMA_NO_UNROLL
    for (; num_k_tiles > 0; --num_k_tiles) {
      pipeline.consumer_wait(stage_state);
      int stage = stage_state.index();
      CUTLASS_PRAGMA_UNROLL
      for (int wave = 0; wave < kWaves; ++wave) {
        cute::warpgroup_fence_operand(partial);
        cute::warpgroup_arrive();
        tiled_mma.accumulate_ = GMMA::ScaleOut::Zero;
        CUTLASS_PRAGMA_UNROLL
        for (int k = 0; k < kInstructions; ++k) {
          cute::gemm(tiled_mma, left_parts(_, wave, k, stage), right_parts(_, _0{}, k, stage),
                     partial);
          tiled_mma.accumulate_ = GMMA::ScaleOut::One;
        }
        cute::warpgroup_commit_batch();
        cute::warpgroup_fence_operand(partial);
        // Meanwhile: the scales of this wave's rows.
        Tensor stage_left = my_left_scales(_, wave, _0{}, make_coord(_0{}, stage));
        Tensor stage_right = my_right_scales(_, wave, _0{}, make_coord(_0{}, stage));
        copy(stage_left, row_scales);
        if constexpr (kOneRightScale) {
          ElementBlockScale right_scale = stage_right(_0{});
          Tensor stored = filter_zeros(row_scales);
          CUTLASS_PRAGMA_UNROLL
          for (int i = 0; i < size(stored); ++i) {
            stored(i) *= right_scale;
          }
        }
        cute::warpgroup_wait<0>();
        cute::warpgroup_fence_operand(partial);
        if (wave == 0 && !is_first) {
          pipeline.consumer_release(previous);
        }
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < size(partial); ++i) {
          // Columns' scales are read as they are needed: 32 more registers would not fit.
          float scaled = kOneRightScale ? partial(i) : partial(i) * stage_right(i);
          accumulators(i, wave, 0) = fmaf(scaled, row_scales(i), accumulators(i, wave, 0));
        }
      }
      is_first = false;
      previous = stage_state;
      ++stage_state;
    }
    // One thread releases the last stage (mma_tail): every warp has read its scales by then.
    cutlass::arch::NamedBarrier::sync(cutlass::NumThreadsPerWarpGroup, warp_group);
  }

 private:
  /// Scales of rows as if they were a tile: (rows, columns, (k, stage)), columns of stride 0.
  template <class Pointer>
  CUTLASS_DEVICE static auto spread_left(Pointer scales) {
    using namespace cute;
    auto [rows, blocks, stages] = shape(SmemLayoutSFA{});
    auto [row_step, block_step, stage_step] = stride(SmemLayoutSFA{});
    return make_tensor(scales,
                       make_layout(make_shape(rows, get<1>(TileShape{}), make_shape(blocks, stages)),
                                   make_stride(row_step, _0{}, make_stride(block_step, stage_step))));
  }

  template <class Pointer>
  CUTLASS_DEVICE static auto spread_right(Pointer scales) {
    using namespace cute;
    auto [columns, blocks, stages] = shape(SmemLayoutSFB{});
    auto [column_step, block_step, stage_step] = stride(SmemLayoutSFB{});
    return make_tensor(
        scales, make_layout(make_shape(get<0>(TileShape{}), columns, make_shape(blocks, stages)),
                            make_stride(_0{}, column_step, make_stride(block_step, stage_step))));
  }
};

}  // namespace megatron_ext::gemm
