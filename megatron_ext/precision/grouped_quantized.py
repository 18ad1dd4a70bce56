"""Matrices of few bits of all experts of a rank, as one product over the experts reads them.

| layout | codes | scales, and each expert's own scale where a tensor has one |
|---|---|---|
| `rows` | [T, K]: tokens sorted by expert | [T, across]; one for a tensor: [E, 1] |
| `stacked` | [E, N, K]: weights | [E, down, across] |
| `columns` | [N, T]: tokens last, for wgrad | [N, across]; a row: [N, E]; a tensor: [1, E] |

`tensor_scale` is float32 [E]. Which tokens are an expert's stands beside it: starts, int [E + 1] on
the device, tokens of expert e are [starts[e], starts[e + 1]). In `columns` blocks lie along the
tokens, so starts are multiples of the block there: tokens are filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_ext.precision.block_format import BlockFormat
from megatron_ext.precision.quantized import Quantized

Layout = Literal["rows", "stacked", "columns"]


@dataclass(frozen=True, slots=True)
class GroupedQuantized:
    """Codes and scales of one matrix for each expert; the layouts are above."""

    block_format: BlockFormat
    layout: Layout
    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """In elements: [T, K], [E, N, K] or [N, T]."""
        *outer, columns = self.codes.shape
        return *outer, columns * (2 if self.block_format.is_packed else 1)

    def part(self, expert: int, first: int, last: int) -> Quantized:
        """One expert's matrix, a view; its tokens are [first, last)."""
        tensor_scale = None if self.tensor_scale is None else self.tensor_scale[expert]
        if self.layout == "stacked":
            codes, scales = self.codes[expert], self.scales[expert]
        elif self.layout == "rows":
            codes = self.codes[first:last]
            one = self.block_format.block_rows is None
            scales = self.scales[expert : expert + 1] if one else self.scales[first:last]
        else:
            packed = 2 if self.block_format.is_packed else 1
            codes = self.codes[:, first // packed : last // packed]
            block = self.block_format.block_columns
            bounds = (expert, expert + 1) if block is None else (first // block, -(-last // block))
            scales = self.scales[:, slice(*bounds)]
        return Quantized(self.block_format, codes, scales, tensor_scale)


def joined(parts: Sequence[Quantized], layout: Layout) -> GroupedQuantized:
    """Each expert's matrix, put together. ValueError: no experts, or blocks over several rows."""
    if not parts:
        raise ValueError("no experts")
    block_format = parts[0].block_format
    check_layout(block_format, layout)
    codes, scales = [part.codes for part in parts], [part.scales for part in parts]
    tensor_scale = None
    if parts[0].tensor_scale is not None:
        tensor_scale = torch.stack([_tensor_scale(part) for part in parts])
    if layout == "stacked":
        stacks = torch.stack(codes), torch.stack(scales)
        return GroupedQuantized(block_format, layout, *stacks, tensor_scale)
    dim = 0 if layout == "rows" else 1
    return GroupedQuantized(
        block_format, layout, torch.cat(codes, dim), torch.cat(scales, dim), tensor_scale
    )


def check_layout(block_format: BlockFormat, layout: Layout) -> None:
    """ValueError where a block would reach over two experts' rows."""
    if layout == "rows" and block_format.block_rows not in (None, 1):
        raise ValueError(
            f"{block_format.name} has blocks of {block_format.block_rows} rows; tokens sorted by "
            "expert need blocks of one row"
        )


def _tensor_scale(part: Quantized) -> Tensor:
    assert part.tensor_scale is not None
    return part.tensor_scale
