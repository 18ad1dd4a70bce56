"""Products as `reference.py` defines them, with the signatures that all backends keep to."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from megatron_ext.precision import reference
from megatron_ext.precision.grouped_quantized import GroupedQuantized
from megatron_ext.precision.quantized import Quantized


def multiply_reference(
    left: Quantized | Tensor,
    right: Quantized | Tensor,
    *,
    out_dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """left right^T in float32: [m, k] x [n, k] -> [m, n]; added to `out` if there is one."""
    product = reference.multiply(left, right)
    return product.to(out_dtype) if out is None else out.add_(product)


def grouped_multiply_reference(
    left: GroupedQuantized,
    right: GroupedQuantized,
    starts: Tensor,
    *,
    out_dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    alignment: int = 1,
) -> Tensor:
    """One expert's product after another; arguments as `grouped_gemm_triton.py` has them."""
    del alignment
    is_rows = left.layout == "rows"
    (rows, _), columns = left.shape, right.shape[1 if is_rows else 0]
    num_experts = starts.numel() - 1
    shape = (rows, columns) if is_rows else (num_experts, rows, columns)
    result = torch.zeros(shape, dtype=out_dtype, device=starts.device) if out is None else out
    bounds = starts.tolist()
    for expert, (first, last) in enumerate(pairwise(bounds)):
        if first < last:
            operands = left.part(expert, first, last), right.part(expert, first, last)
            part = result[first:last] if is_rows else result[expert]
            part.add_(reference.multiply(*operands).to(result.dtype))
    return result
