"""Products of what is stored in few bits, by whichever backend can: left right^T.

The definition is `reference.multiply`: values as they are read back, multiplied in float32.
Backends differ in the order of their sums. Like `quantize`, an operator of torch's own where torch
only wants to know shapes (`megatron_ext::multiply`).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from megatron_ext.precision.backend import choose, implementation
from megatron_ext.precision.block_format import named_block_format
from megatron_ext.precision.gemm_reference import multiply_reference
from megatron_ext.precision.linear_recipe import BackendName
from megatron_ext.precision.quantize import is_traced
from megatron_ext.precision.quantized import Quantized


def multiply(
    left: Quantized | Tensor,
    right: Quantized | Tensor,
    *,
    out_dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    """left right^T: [m, k] x [n, k] -> [m, n].

    Args:
        left, right: an operand that is no `Quantized` makes it a product in float32 by torch.
        out_dtype: of the result, rounded once from float32.
        out: float32 [m, n] that the product is added to, and which is returned.
        backend: who computes.

    Raises:
        ValueError: the contracted dims differ.
        UserError: the backend cannot multiply these formats here.
    """
    if left.shape[1] != right.shape[1]:
        raise ValueError(
            f"contracted dims differ: {tuple(left.shape)} and {tuple(right.shape)}, by columns"
        )
    if not isinstance(left, Quantized) or not isinstance(right, Quantized):
        return multiply_reference(left, right, out_dtype=out_dtype, out=out)
    formats = left.block_format, right.block_format
    name = choose(backend, "multiply", formats, left.codes.device)
    if is_traced(left.codes):
        product: Tensor = _multiply_op(*_in_parts(left), *_in_parts(right), out_dtype, name)
        return product if out is None else out.add_(product)
    run = implementation(name, "multiply")
    return cast(Tensor, run(left, right, out_dtype=out_dtype, out=out))


@torch.library.custom_op("megatron_ext::multiply", mutates_args=())
def _multiply_op(
    left_codes: Tensor,
    left_scales: Tensor,
    left_tensor_scale: Tensor | None,
    left_format: str,
    right_codes: Tensor,
    right_scales: Tensor,
    right_tensor_scale: Tensor | None,
    right_format: str,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    left = Quantized(named_block_format(left_format), left_codes, left_scales, left_tensor_scale)
    right = Quantized(
        named_block_format(right_format), right_codes, right_scales, right_tensor_scale
    )
    run = implementation(cast(BackendName, backend), "multiply")
    return cast(Tensor, run(left, right, out_dtype=out_dtype))


@_multiply_op.register_fake
def _(*parts: Any) -> Tensor:
    left_codes, right_codes, out_dtype = parts[0], parts[4], parts[8]
    return torch.empty(
        left_codes.shape[0], right_codes.shape[0], dtype=out_dtype, device=left_codes.device
    )


def _in_parts(operand: Quantized) -> tuple[Tensor, Tensor, Tensor | None, str]:
    return operand.codes, operand.scales, operand.tensor_scale, operand.block_format.name
