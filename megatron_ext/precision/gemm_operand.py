"""An operand as the kernels read it: two-dim codes, scales with their strides, factors of rows.

Scales of blocks of one row and 128 columns are transposed here, so that a step reads those of 128
rows as one run of memory (4 bytes for 128 elements: a small copy). Blackwell's scales are swizzled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.precision.block_format import BlockFormat
from megatron_ext.precision.gemm_config import GemmPlan
from megatron_ext.precision.grouped_quantized import GroupedQuantized
from megatron_ext.precision.quantized import Quantized
from megatron_ext.precision.scale_swizzle import BLOCK_ROWS, swizzled_scales


@dataclass(frozen=True, slots=True)
class Scales:
    """Of blocks: scale (r, c) of expert e is at values[(e group + r / block_rows) row + c column].

    Attributes:
        row, column: strides; group: rows of scales of an expert.
        block_rows: rows of the matrix that share one.
    """

    values: Tensor
    row: int = 0
    column: int = 0
    group: int = 0
    block_rows: int = 1
    is_swizzled: bool = False


@dataclass(frozen=True, slots=True)
class Factor:
    """What a row of the result is multiplied with in the end: values[e group + r row]."""

    values: Tensor | None = None
    row: int = 0
    group: int = 0


@dataclass(frozen=True, slots=True)
class Operand:
    """Codes [rows, columns]; experts' weights below one another."""

    codes: Tensor
    block_format: BlockFormat
    scales: Scales | None
    factor: Factor


def operand_of(stored: Quantized | GroupedQuantized, plan: GemmPlan, *, swizzles: bool) -> Operand:
    """swizzles: put scales in Blackwell's order."""
    codes = stored.codes.flatten(0, -2)
    if codes.stride(1) != 1:
        codes = codes.contiguous()
    block_format = stored.block_format
    if plan.kind in ("direct", "blockwise") and not plan.decodes:
        assert block_format.element.native is not None
        codes = codes.view(getattr(torch, block_format.element.native))
    scales = None
    if block_format.block_columns is not None:
        scales = _scales(stored, swizzles=swizzles)
    return Operand(codes, block_format, scales, _factor(stored))


def _scales(stored: Quantized | GroupedQuantized, *, swizzles: bool) -> Scales:
    values, block_rows = stored.scales, stored.block_format.block_rows or 1
    if swizzles:
        rows = stored.codes.shape[-2]
        if block_rows > 1:
            values = values.repeat_interleave(block_rows, dim=-2)[..., :rows, :]
        blocks = swizzled_scales(values)
        # [blocks down, blocks across, 2, 256]: the last dim is the longest TMA fetches at once.
        whole = blocks.view(-1, blocks.shape[-2], 2, 256)
        return Scales(whole, group=blocks.shape[-3] * BLOCK_ROWS, is_swizzled=True)
    group = values.shape[-2]
    values = values.flatten(0, -2)
    if block_rows == 1 and stored.block_format.scale == "fp32":
        turned = values.t().contiguous()
        return Scales(turned, row=1, column=turned.shape[1], group=group)
    values = values.contiguous()
    return Scales(values, row=values.shape[1], column=1, group=group, block_rows=block_rows)


def _factor(stored: Quantized | GroupedQuantized) -> Factor:
    if stored.tensor_scale is not None:
        return Factor(stored.tensor_scale, group=1)
    if stored.block_format.block_columns is not None:
        return Factor()
    values = stored.scales.contiguous()
    if stored.block_format.block_rows is None:
        return Factor(values, group=1)
    if isinstance(stored, Quantized) or stored.layout == "rows":
        return Factor(values, row=1)
    if stored.layout == "stacked":
        return Factor(values, row=1, group=values.shape[1])
    return Factor(values, row=values.shape[1], group=1)
