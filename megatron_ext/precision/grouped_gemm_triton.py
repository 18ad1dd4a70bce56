"""Products of all experts of a rank in one Triton kernel; token counts stay on the device.

    rows      out[t] = rows[t] weight[e]^T      t in [starts[e], starts[e + 1])     forward, dgrad
    columns   out[e] = left[:, t] right[:, t]^T over those t                        wgrad

dgrad is the first with the transposed weights [E, K, N]. Formats and sums are those of
`gemm_triton.py`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from torch import Tensor

from megatron_ext.precision.block_format import BlockFormat
from megatron_ext.precision.gemm_config import GemmPlan, plan_of
from megatron_ext.precision.gemm_launch_triton import Extent, check_pair, current_target, launch
from megatron_ext.precision.gemm_operand import operand_of
from megatron_ext.precision.gemm_triton import checked_out, why_not_multiply
from megatron_ext.precision.grouped_quantized import GroupedQuantized, check_layout


def why_not_grouped_multiply(formats: tuple[BlockFormat, BlockFormat], device: torch.device) -> str:
    """As `gemm_triton.why_not_multiply`."""
    return why_not_multiply(formats, device)


def grouped_multiply_triton(
    left: GroupedQuantized,
    right: GroupedQuantized,
    starts: Tensor,
    *,
    out_dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    alignment: int = 1,
    plan: GemmPlan | None = None,
) -> Tensor:
    """One product for each expert.

    Args:
        left, right: `rows` [T, K] and `stacked` [E, N, K], or both `columns`, [M, T] and [N, T].
        starts: int32 or int64 [E + 1] on the device, rising, not beyond T; rows after the last are
            nobody's, and their part of a new result is not written.
        out_dtype, out: as for `multiply_triton`.
        alignment: the caller's word that every start is a multiple of it (`columns`). Whole steps
            of the kernel (`plan.tile.depth`, at most 256) can be read by TMA, others are masked.

    Returns:
        [T, N] or [E, M, N]; an expert without tokens gets zeros there (or `out` unchanged).

    Raises:
        ValueError: layouts, formats or sizes that do not go together.
    """
    check_pair(left.block_format, right.block_format)
    check_layout(left.block_format, left.layout)
    num_groups = starts.numel() - 1
    if (left.layout, right.layout) == ("rows", "stacked"):
        shape, extent_of = _rows_shape(left, right, num_groups), _rows_extent
    elif (left.layout, right.layout) == ("columns", "columns"):
        shape, extent_of = _columns_shape(left, right, num_groups), _columns_extent
    else:
        raise ValueError(
            f"no product of {left.layout} with {right.layout}; there are rows with stacked, and "
            "columns with columns"
        )
    result = checked_out(out, shape, out_dtype, left.codes.device)
    if not result.numel():
        return result
    plan = plan or plan_of(left.block_format, current_target())
    is_rows = left.layout == "rows"
    if not is_rows and alignment % plan.tile.depth:
        plan = replace(plan, uses_tma=False, swizzles=False)
    launch(
        # Swizzled blocks have 128 rows, and an expert's tokens start anywhere.
        operand_of(left, plan, swizzles=plan.swizzles and not is_rows),
        operand_of(right, plan, swizzles=plan.swizzles),
        result.flatten(0, -2),
        starts,
        extent_of(left, right, num_groups, plan),
        plan,
        grouping="rows" if is_rows else "columns",
        adds=out is not None,
    )
    return result


def _rows_shape(
    left: GroupedQuantized, right: GroupedQuantized, num_groups: int
) -> tuple[int, ...]:
    (num_rows, depth), (num_experts, columns, right_depth) = left.shape, right.shape
    if depth != right_depth or num_experts != num_groups:
        raise ValueError(
            f"rows of {depth} columns of {num_groups} experts do not go with weights "
            f"{list(right.shape)}"
        )
    return num_rows, columns


def _columns_shape(
    left: GroupedQuantized, right: GroupedQuantized, num_groups: int
) -> tuple[int, ...]:
    (rows, depth), (columns, right_depth) = left.shape, right.shape
    if depth != right_depth:
        raise ValueError(f"left has {depth} tokens and right {right_depth}; both are contracted")
    return num_groups, rows, columns


def _rows_extent(
    left: GroupedQuantized, right: GroupedQuantized, num_groups: int, plan: GemmPlan
) -> Extent:
    (rows, depth), columns, tile = left.shape, right.shape[1], plan.tile
    # Each expert's last tile may be partly filled; an expert without tokens has none.
    down = triton.cdiv(rows, tile.rows) + min(num_groups, rows)
    num_tiles = down * triton.cdiv(columns, tile.parts * tile.columns)
    return Extent(rows, columns, depth, num_groups, num_tiles)


def _columns_extent(
    left: GroupedQuantized, right: GroupedQuantized, num_groups: int, plan: GemmPlan
) -> Extent:
    (rows, depth), columns, tile = left.shape, right.shape[0], plan.tile
    of_group = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.parts * tile.columns)
    return Extent(rows, columns, depth, num_groups, of_group * num_groups)
