"""The order in which Blackwell's matrix instructions (and cuBLASLt) read scales of small blocks.

Scales [rows, columns] are cut into blocks of 128 x 4, each 512 bytes in a row. In a block, scale
(r, c) stands at byte

    16 (r mod 32) + 4 floor(r / 32) + c

so the four scales that one thread of a warp holds for 128 columns are one word. Missing rows and
columns are filled up with zeros.

Source: cuBLAS documentation, "1D Block Scaling Factors Layout".
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

BLOCK_ROWS, BLOCK_COLUMNS = 128, 4
_LANES = 32


def swizzled_scales(scales: Tensor) -> Tensor:
    """One byte a scale: [..., rows, columns] -> [..., blocks down, blocks across, 512], a copy."""
    *outer, rows, columns = scales.shape
    padded = F.pad(scales, (0, -columns % BLOCK_COLUMNS, 0, -rows % BLOCK_ROWS))
    down, across = padded.shape[-2] // BLOCK_ROWS, padded.shape[-1] // BLOCK_COLUMNS
    # [..., down, quarter, lane, across, column] -> [..., down, across, lane, quarter, column]
    blocks = padded.reshape(*outer, down, 4, _LANES, across, BLOCK_COLUMNS)
    order = blocks.movedim(-2, -4).transpose(-3, -2)
    return order.reshape(*outer, down, across, BLOCK_ROWS * BLOCK_COLUMNS).contiguous()


def unswizzled_scales(swizzled: Tensor, rows: int, columns: int) -> Tensor:
    """Back to [..., rows, columns]."""
    *outer, down, across, _ = swizzled.shape
    blocks = swizzled.reshape(*outer, down, across, _LANES, 4, BLOCK_COLUMNS).transpose(-3, -2)
    whole = blocks.movedim(-4, -2).reshape(*outer, down * BLOCK_ROWS, across * BLOCK_COLUMNS)
    return whole[..., :rows, :columns].contiguous()
