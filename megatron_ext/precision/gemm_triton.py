"""Products of matrices of few bits in Triton: out = left right^T.

    out[m, n] = f_m g_n sum_k (decode(a[m, k]) s[m, k]) (decode(b[n, k]) t[n, k])

with float32 sums, s and t the scales of blocks, f and g those of a whole row or tensor. Sums are
made in another order than the definition's (`reference.multiply`), so the two differ by float32's
roundings: at most about K eps sum_k |a b|.

`gemm_config.py` says what each target does in hardware; what it emulates has the same result.
Experts are multiplied by `grouped_gemm_triton.py`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from megatron_ext.precision.block_format import BlockFormat
from megatron_ext.precision.gemm_config import GemmPlan, plan_of
from megatron_ext.precision.gemm_launch_triton import (
    Extent,
    check_pair,
    current_target,
    launch,
    why_not_pair,
)
from megatron_ext.precision.gemm_operand import operand_of
from megatron_ext.precision.quantized import Quantized


def why_not_multiply(formats: tuple[BlockFormat, BlockFormat], device: torch.device) -> str:
    """Why these formats are not multiplied; empty where they are, on any device Triton knows."""
    del device
    return why_not_pair(*formats)


def multiply_triton(
    left: Quantized,
    right: Quantized,
    *,
    out_dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    plan: GemmPlan | None = None,
) -> Tensor:
    """left right^T.

    Args:
        left, right: [m, k] and [n, k], both of 8 or both of 4 bits with scales of one kind: E4M3
            and E5M2, blocks of 1 x 128 and 128 x 128, or 1 x 16 and 16 x 16 may meet.
        out_dtype: of the result; float32 where `out` is given.
        out: float32 [m, n], to which the product is added.
        plan: tile sizes; None: the table's for this device.

    Returns:
        [m, n]: `out`, or a new matrix.

    Raises:
        ValueError: formats or sizes that do not go together.
    """
    check_pair(left.block_format, right.block_format)
    (rows, depth), (columns, right_depth) = left.shape, right.shape
    if depth != right_depth:
        raise ValueError(f"left has {depth} columns and right {right_depth}; both are contracted")
    result = checked_out(out, (rows, columns), out_dtype, left.codes.device)
    if not result.numel():
        return result
    plan = plan or plan_of(left.block_format, current_target())
    tile = plan.tile
    num_tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.parts * tile.columns)
    launch(
        operand_of(left, plan, swizzles=plan.swizzles),
        operand_of(right, plan, swizzles=plan.swizzles),
        result,
        None,
        Extent(rows, columns, depth, 1, num_tiles),
        plan,
        grouping="none",
        adds=out is not None,
    )
    return result


def checked_out(
    out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`out`, or a new matrix. ValueError: another shape or dtype, or strided columns."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if tuple(out.shape) != shape or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(
            f"products are added to a contiguous float32 {list(shape)}; out is {out.dtype} "
            f"{list(out.shape)} with strides {list(out.stride())}"
        )
    return out
