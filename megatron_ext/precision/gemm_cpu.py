"""Products on the CPU of what is stored in few bits.

Codes are looked up a byte at a time (two values where two codes share a byte) and multiplied by
their blocks' scales. An element of 4 bits or fewer of mantissa times a power of two is a bfloat16,
so where the result is to be bfloat16 as well, formats with E8M0 scales are multiplied as such: the
products are exact, the sums float32, and the result is rounded once, as in the reference. All else
is multiplied in float32; torch has no CPU product of bfloat16 with a float32 result.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from megatron_ext.precision.element_format import ElementFormat
from megatron_ext.precision.formats import code_values
from megatron_ext.precision.grouped_quantized import GroupedQuantized
from megatron_ext.precision.quantized import Quantized

# Scales within these codes leave every value, and the product of any two, a normal float32: what
# is not may be taken for 0 by the matrix instructions of bfloat16.
_SMALLEST_SCALE_CODE, _LARGEST_SCALE_CODE = 127 - 48, 127 + 48


def multiply_cpu(
    left: Quantized | Tensor,
    right: Quantized | Tensor,
    *,
    out_dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """left right^T: [m, k] x [n, k] -> [m, n]; added to `out` if there is one."""
    in_bfloat16 = out_dtype == torch.bfloat16 and out is None
    if in_bfloat16 and _is_bfloat16(left) and _is_bfloat16(right):
        return stored_values(left, torch.bfloat16) @ stored_values(right, torch.bfloat16).t()
    operands = stored_values(left), stored_values(right).t()
    if out is not None:
        return out.addmm_(*operands)
    return torch.mm(*operands).to(out_dtype)


def stored_values(operand: Quantized | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`reference.read`: [rows, columns] of a dtype that has every value."""
    if not isinstance(operand, Quantized):
        return operand.to(dtype)
    block_format = operand.block_format
    rows, columns = operand.shape
    down, across = block_format.grid(rows, columns)
    values = _looked_up(operand.codes, block_format.element, dtype)
    scales = operand.block_scales().to(dtype)
    height, width = block_format.block_rows or rows, block_format.block_columns or columns
    if rows == down * height and columns == across * width:
        blocks = values.view(down, height, across, width)
        return blocks.mul_(scales[:, None, :, None]).view(rows, columns)
    return operand.values().to(dtype)


def _is_bfloat16(operand: Quantized | Tensor) -> bool:
    if not isinstance(operand, Quantized):
        return operand.dtype == torch.bfloat16
    if operand.block_format.scale != "e8m0" or operand.tensor_scale is not None:
        return False
    # Blocks of zeros have the code 0, and their values are zeros in any dtype.
    codes = operand.scales
    if not codes.numel():
        return True
    return bool(
        ((codes == 0) | (codes >= _SMALLEST_SCALE_CODE)).all()
        and codes.max() <= _LARGEST_SCALE_CODE
    )


def _looked_up(codes: Tensor, element: ElementFormat, dtype: torch.dtype) -> Tensor:
    table = _table(element, dtype)
    found = table.index_select(0, codes.reshape(-1).to(torch.int32))
    return found.view(dtype).view(codes.shape[0], -1)


@cache
def _table(element: ElementFormat, dtype: torch.dtype) -> Tensor:
    """What a byte stands for: one value, or a pair in a word of twice the size."""
    values = code_values(element).to(dtype)
    if element.bits == 8:
        return values
    byte = torch.arange(256)
    pairs = torch.stack((values[byte & 0xF], values[byte >> 4]), dim=1)
    return pairs.view(torch.int64 if dtype == torch.float32 else torch.int32).view(-1)


def grouped_multiply_cpu(
    left: GroupedQuantized,
    right: GroupedQuantized,
    starts: Tensor,
    *,
    out_dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    alignment: int = 1,
) -> Tensor:
    """One expert's product after another; arguments as `grouped_multiply_reference`."""
    del alignment
    is_rows = left.layout == "rows"
    (rows, _), columns = left.shape, right.shape[1 if is_rows else 0]
    shape = (rows, columns) if is_rows else (starts.numel() - 1, rows, columns)
    result = torch.zeros(shape, dtype=out_dtype) if out is None else out
    bounds = starts.tolist()
    for expert, (first, last) in enumerate(pairwise(bounds)):
        if first < last:
            operands = left.part(expert, first, last), right.part(expert, first, last)
            part = result[first:last] if is_rows else result[expert]
            part.add_(multiply_cpu(*operands).to(result.dtype))
    return result
