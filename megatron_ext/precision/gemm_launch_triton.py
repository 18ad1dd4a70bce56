"""Launching the Triton product: what device this is, how many programs, TMA or plain pointers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_ext.precision.block_format import BlockFormat
from megatron_ext.precision.gemm_config import GemmPlan, Target
from megatron_ext.precision.gemm_kernel_triton import product_kernel
from megatron_ext.precision.gemm_operand import Operand, Scales

Grouping = Literal["none", "rows", "columns"]

# So that the interpreter's programs, too, make several tiles each.
_INTERPRETED_PROGRAMS = 2
_TMA_ALIGNMENT_BYTES = 16


@dataclass(frozen=True, slots=True)
class Extent:
    """Sizes of a product.

    Attributes:
        rows, columns: of the result, of each expert in `columns`.
        depth: contracted, of all experts together in `columns`.
        num_groups: experts; 1 where nothing is grouped.
        num_tiles: as many as there can be; the kernel knows how many there are.
    """

    rows: int
    columns: int
    depth: int
    num_groups: int
    num_tiles: int


@cache
def current_target() -> Target:
    """Of the device in use, or the interpreter."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Target("interpreter", "")
    found = triton.runtime.driver.active.get_current_target()
    return Target("hip" if found.backend == "hip" else "cuda", str(found.arch))


def why_not_pair(left: BlockFormat, right: BlockFormat) -> str:
    """Why no kernel multiplies the two; empty where one does."""
    if _family(left) == _family(right):
        return ""
    return (
        f"no product of {left.name} with {right.name}: both need elements of as many bits, and "
        "scales of one kind for as many columns"
    )


def check_pair(left: BlockFormat, right: BlockFormat) -> None:
    """ValueError where no kernel multiplies the two."""
    if reason := why_not_pair(left, right):
        raise ValueError(reason)


def launch(
    left: Operand,
    right: Operand,
    out: Tensor,
    starts: Tensor | None,
    extent: Extent,
    plan: GemmPlan,
    *,
    grouping: Grouping,
    adds: bool,
) -> None:
    """Make `out`, two-dim: [M, N], or experts' [E * M, N].

    Args:
        starts: int [num_groups + 1] on the device; None where nothing is grouped.
        adds: to what `out` holds.
    """
    tile = plan.tile
    uses_tma = plan.uses_tma and all(_fits_tma(each.codes) for each in (left, right))
    left_scales, right_scales = _scales_of(left, out), _scales_of(right, out)
    packed = 2 if left.block_format.is_packed else 1
    step = tile.depth // packed
    product_kernel[(min(extent.num_tiles, _num_programs(out.device, plan)),)](
        _source(left.codes, [tile.rows, step], uses_tma),
        _source(right.codes, [tile.columns, step], uses_tma),
        _scales_source(left_scales, tile.rows, plan, left.block_format),
        _scales_source(right_scales, tile.columns, plan, right.block_format),
        out if left.factor.values is None else left.factor.values,
        out if right.factor.values is None else right.factor.values,
        out,
        out if starts is None else starts,
        extent.rows,
        extent.columns,
        extent.depth,
        extent.num_groups,
        left.codes.stride(0),
        right.codes.stride(0),
        out.stride(0),
        left_scales.row,
        left_scales.column,
        right_scales.row,
        right_scales.column,
        right_scales.group,
        left.factor.row,
        left.factor.group,
        right.factor.row,
        right.factor.group,
        **constants(left, right, plan, grouping=grouping, num_groups=extent.num_groups, adds=adds)
        | {"USES_TMA": uses_tma, "WIDENS": not out.is_cuda},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        # A multiplication and an addition may become one rounding: sums are compared by a bound.
        enable_fp_fusion=True,
    )


def constants(
    left: Operand,
    right: Operand,
    plan: GemmPlan,
    *,
    grouping: Grouping,
    num_groups: int,
    adds: bool,
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    tile, block_format = plan.tile, left.block_format
    scale = "none" if plan.kind in ("direct", "blockwise") else block_format.scale
    return {
        "GROUPING": grouping,
        "GROUPS": triton.next_power_of_2(num_groups),
        "KIND": plan.kind,
        "LEFT_FORMAT": left.block_format.element.name,
        "RIGHT_FORMAT": right.block_format.element.name,
        "SCALE": "none" if scale == "fp32" else scale,
        "LEFT_BLOCK_ROWS": 1 if left.scales is None else left.scales.block_rows,
        "RIGHT_BLOCK_ROWS": 1 if right.scales is None else right.scales.block_rows,
        "BLOCK": block_format.block_columns or 1,
        "HAS_LEFT_FACTOR": left.factor.values is not None,
        "HAS_RIGHT_FACTOR": right.factor.values is not None,
        "ADDS": adds,
        "DECODES": plan.decodes,
        "WIDENS": False,
        "USES_TMA": plan.uses_tma,
        "LEFT_SWIZZLED": left.scales is not None and left.scales.is_swizzled,
        "RIGHT_SWIZZLED": right.scales is not None and right.scales.is_swizzled,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "PARTS": tile.parts,
        "WINDOW": tile.window,
        "FLATTENS": tile.flattens,
        "WARP_SPECIALIZES": tile.warp_specializes,
    }


def _family(block_format: BlockFormat) -> tuple[int, int | None, str]:
    return block_format.element.bits, block_format.block_columns, block_format.scale


def _num_programs(device: torch.device, plan: GemmPlan) -> int:
    if device.type == "cpu":
        return _INTERPRETED_PROGRAMS
    units = torch.cuda.get_device_properties(device).multi_processor_count
    return int(units) * plan.tile.programs_per_unit


def _fits_tma(codes: Tensor) -> bool:
    stride_bytes = codes.stride(0) * codes.element_size()
    is_aligned = codes.data_ptr() % _TMA_ALIGNMENT_BYTES == 0
    return codes.numel() > 0 and is_aligned and stride_bytes % _TMA_ALIGNMENT_BYTES == 0


def _source(matrix: Tensor, block: list[int], uses_tma: bool) -> Any:
    return TensorDescriptor.from_tensor(matrix, block) if uses_tma else matrix


def _scales_of(operand: Operand, unused: Tensor) -> Scales:
    return Scales(unused) if operand.scales is None else operand.scales


def _scales_source(scales: Scales, rows: int, plan: GemmPlan, block_format: BlockFormat) -> Any:
    if not scales.is_swizzled:
        return scales.values
    assert block_format.block_columns is not None
    across = plan.tile.depth // block_format.block_columns // 4
    return TensorDescriptor.from_tensor(scales.values, [rows // 128, across, 2, 256])
