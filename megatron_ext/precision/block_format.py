"""How a matrix is stored: elements of one format, and a scale for each block of it.

| name | elements | block | scale |
|---|---|---|---|
| `fp8_tensor` | E4M3 | the tensor | float32 |
| `fp8_row` | E4M3 | a row | float32 |
| `fp8_1x128`, `fp8_128x128` | E4M3 | 1 x 128, 128 x 128 | float32 |
| `mxfp8` | E4M3 | 1 x 32 | E8M0 |
| `mxfp4` | E2M1 | 1 x 32 | E8M0 |
| `nvfp4`, `nvfp4_2d` | E2M1 | 1 x 16, 16 x 16 | E4M3, and one float32 for the tensor |

and the same with E5M2 elements as `..._e5m2` for the three formats of FP8 that torch multiplies.
Rows run along the dim a product is contracted over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from megatron_ext.precision.element_format import E1M2, E2M1, E3M0, E4M3, E5M2, ElementFormat

ScaleFormat = Literal["fp32", "e8m0", "e4m3"]


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """Storage of a matrix [rows, columns].

    Attributes:
        block_rows, block_columns: rows and columns that share a scale; None: all of them.
        scale: format of a block's scale.
        has_tensor_scale: scales are relative to one float32 of the whole tensor.
    """

    name: str
    element: ElementFormat
    block_rows: int | None
    block_columns: int | None
    scale: ScaleFormat
    has_tensor_scale: bool = False

    @property
    def is_packed(self) -> bool:
        return self.element.bits == 4

    def transposes(self) -> bool:
        """Whether a matrix and its transpose are stored with the same values."""
        return self.block_rows == self.block_columns

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Blocks of a matrix, down and across; the last of each may be partly filled."""
        down = 1 if self.block_rows is None else -(-rows // self.block_rows)
        across = 1 if self.block_columns is None else -(-columns // self.block_columns)
        return down, across

    def bytes_of(self, rows: int, columns: int) -> int:
        """Bytes of a stored matrix."""
        down, across = self.grid(rows, columns)
        scales = down * across * (4 if self.scale == "fp32" else 1)
        tensor_scale = 4 if self.has_tensor_scale else 0
        return rows * columns * self.element.bits // 8 + scales + tensor_scale


FP8_TENSOR = BlockFormat("fp8_tensor", E4M3, None, None, "fp32")
FP8_ROW = BlockFormat("fp8_row", E4M3, 1, None, "fp32")
FP8_1X128 = BlockFormat("fp8_1x128", E4M3, 1, 128, "fp32")
FP8_128X128 = BlockFormat("fp8_128x128", E4M3, 128, 128, "fp32")
MXFP8 = BlockFormat("mxfp8", E4M3, 1, 32, "e8m0")
MXFP4 = BlockFormat("mxfp4", E2M1, 1, 32, "e8m0")
NVFP4 = BlockFormat("nvfp4", E2M1, 1, 16, "e4m3", has_tensor_scale=True)
NVFP4_2D = BlockFormat("nvfp4_2d", E2M1, 16, 16, "e4m3", has_tensor_scale=True)
# Of `luq.py`, to compare with; no kernel stores or multiplies them.
INT4_TENSOR = BlockFormat("int4_tensor", E1M2, None, None, "fp32")
LOG4_TENSOR = BlockFormat("log4_tensor", E3M0, None, None, "fp32")


def _with_e5m2(block_format: BlockFormat) -> BlockFormat:
    return replace(block_format, name=f"{block_format.name}_e5m2", element=E5M2)


BLOCK_FORMATS: dict[str, BlockFormat] = {
    block_format.name: block_format
    for block_format in (
        FP8_TENSOR,
        FP8_ROW,
        FP8_1X128,
        FP8_128X128,
        MXFP8,
        MXFP4,
        NVFP4,
        NVFP4_2D,
        *(_with_e5m2(each) for each in (FP8_TENSOR, FP8_ROW, MXFP8)),
    )
}


def named_block_format(name: str) -> BlockFormat:
    """ValueError with the names there are."""
    known = BLOCK_FORMATS | {each.name: each for each in (INT4_TENSOR, LOG4_TENSOR)}
    if name not in known:
        raise ValueError(f"no block format {name!r}; there are {', '.join(known)}")
    return known[name]
