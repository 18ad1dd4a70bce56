"""Storing a matrix in few bits, by whichever backend can; the definition is `reference.quantize`.

Three ways in, all with the same arguments:

    quantize                Q(x)
    quantize_both           Q(x) and Q'(x^T): both gradients of a linear layer need one of each
    requantize_transposed   Q'(q^T) of what is stored already (Quartet's backward pass)

The first is an operator of torch's own (`megatron_ext::quantize`), so that torch.compile and fake
tensors know its shapes. Eager calls go past the dispatcher, which costs as much as a small kernel
(about 13 microseconds a call).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from megatron_ext.precision.backend import choose, implementation, makes_both
from megatron_ext.precision.block_format import BlockFormat, named_block_format
from megatron_ext.precision.copy_request import CopyRequest
from megatron_ext.precision.linear_recipe import BackendName
from megatron_ext.precision.quantized import Quantized
from megatron_ext.precision.quantizer import Quantizer, Rounding, ScaleRule
from megatron_ext.precision.reference import check_groups

ReduceAmax = Callable[[Tensor], Tensor]


def quantize(
    matrix: Tensor,
    quantizer: Quantizer,
    *,
    seed: int = 0,
    signs: Tensor | None = None,
    reduce_amax: ReduceAmax | None = None,
    backend: BackendName = "auto",
) -> Quantized:
    """Store a matrix.

    Args:
        matrix: [rows, columns], any float dtype; products contract over the columns.
        seed: of stochastic rounding; elements count row by row.
        signs: float32 [hadamard_group], +1 or -1, where the quantizer has signs.
        reduce_amax: makes the largest magnitude of this part that of the whole tensor, where ranks
            hold a part each; cannot be traced.
        backend: who computes; the bits are the same.

    Raises:
        ValueError: groups do not divide the columns.
        UserError: the backend cannot store this format here.
    """
    check_groups(matrix, quantizer)
    name = choose(backend, "quantize", quantizer, matrix.device)
    if is_traced(matrix):
        if reduce_amax is not None and quantizer.needs_tensor_amax:
            raise ValueError("the largest magnitude of all ranks cannot be agreed on while tracing")
        tensors = _quantize_op(matrix, signs, *_fields(quantizer), seed, name)
        return _from_list(tensors, quantizer)
    run: Callable[..., Quantized] = implementation(name, "quantize")
    return run(matrix, quantizer, seed=seed, signs=signs, reduce_amax=reduce_amax)


def quantize_both(
    matrix: Tensor,
    row: CopyRequest,
    transposed: CopyRequest,
    *,
    reduce_amax: ReduceAmax | None = None,
    num_columns: int | None = None,
    backend: BackendName = "auto",
) -> tuple[Quantized, Quantized]:
    """Store a matrix [rows, columns] and its transpose, the bits of two calls of `quantize`.

    The matrix is read once where the backend has a kernel for that and there is nothing to fill up.

    Args:
        num_columns: of the transpose; those beyond `rows` are zeros. None: as many as rows.

    Raises:
        ValueError, UserError: as `quantize`.
    """
    missing = 0 if num_columns is None else num_columns - matrix.shape[0]
    names = {
        choose(backend, "quantize", request.quantizer, matrix.device)
        for request in (row, transposed)
    }
    name = names.pop()
    is_one_pass = not (names or missing or is_traced(matrix))
    if is_one_pass and makes_both(name, row.quantizer, transposed.quantizer):
        run = implementation(name, "quantize_both")
        both: tuple[Quantized, Quantized] = run(matrix, row, transposed, reduce_amax=reduce_amax)
        return both
    filled = torch.nn.functional.pad(matrix.t(), (0, missing)) if missing else matrix.t()
    stored = [
        quantize(
            values,
            request.quantizer,
            seed=request.seed,
            signs=request.signs,
            reduce_amax=reduce_amax,
            backend=backend,
        )
        for values, request in ((matrix, row), (filled, transposed))
    ]
    return stored[0], stored[1]


def requantize_transposed(
    stored: Quantized,
    quantizer: Quantizer,
    *,
    seed: int = 0,
    signs: Tensor | None = None,
    reduce_amax: ReduceAmax | None = None,
    num_columns: int | None = None,
    backend: BackendName = "auto",
) -> Quantized:
    """Store the transpose of what is stored: [rows, columns] -> [columns, rows].

    Args:
        num_columns: of the result; those beyond `rows` are zeros. None: as many as there are rows.
    """
    values = stored.values().t()
    if num_columns is not None:
        values = torch.nn.functional.pad(values, (0, num_columns - values.shape[1]))
    return quantize(
        values, quantizer, seed=seed, signs=signs, reduce_amax=reduce_amax, backend=backend
    )


def is_traced(tensor: Tensor) -> bool:
    """Whether torch only wants to know what would be computed."""
    return torch.compiler.is_compiling() or isinstance(tensor, FakeTensor)


@torch.library.custom_op("megatron_ext::quantize", mutates_args=())
def _quantize_op(
    matrix: Tensor,
    signs: Tensor | None,
    block_format: str,
    rounding: str,
    scale_rule: str,
    hadamard_group: int,
    rounds_scale_up: bool,
    power_of_two_scales: bool,
    tries_four: bool,
    keeps_mask: bool,
    seed: int,
    backend: str,
) -> list[Tensor]:
    """Codes, scales and, where there are such, the tensor's scale and the mask."""
    quantizer = _quantizer(
        block_format,
        rounding,
        scale_rule,
        hadamard_group,
        rounds_scale_up,
        power_of_two_scales,
        tries_four,
        keeps_mask,
    )
    run = implementation(cast(BackendName, backend), "quantize")
    stored: Quantized = run(matrix, quantizer, seed=seed, signs=signs)
    return [tensor for tensor in stored.tensors() if tensor is not None]


@_quantize_op.register_fake
def _(matrix: Tensor, signs: Tensor | None, *fields: Any) -> list[Tensor]:
    quantizer = _quantizer(*fields[:-2])
    return empty_tensors(quantizer, matrix.shape[0], matrix.shape[1], matrix.device)


def empty_tensors(
    quantizer: Quantizer, rows: int, columns: int, device: torch.device
) -> list[Tensor]:
    """Of the shapes and dtypes that a matrix is stored in."""
    block_format = quantizer.block_format
    scale_dtype = torch.float32 if block_format.scale == "fp32" else torch.uint8
    packed = 2 if block_format.is_packed else 1

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    tensors = [
        empty(torch.uint8, rows, columns // packed),
        empty(scale_dtype, *block_format.grid(rows, columns)),
    ]
    if quantizer.has_tensor_scale:
        tensors.append(empty(torch.float32))
    if quantizer.keeps_mask:
        tensors.append(empty(torch.uint8, rows, columns // 8))
    return tensors


def _fields(quantizer: Quantizer) -> tuple[Any, ...]:
    return (
        quantizer.block_format.name,
        quantizer.rounding,
        quantizer.scale_rule,
        quantizer.hadamard_group,
        quantizer.rounds_scale_up,
        quantizer.power_of_two_scales,
        quantizer.tries_four,
        quantizer.keeps_mask,
    )


def _quantizer(
    block_format: str, rounding: str, scale_rule: str, hadamard_group: int, *switches: bool
) -> Quantizer:
    assert rounding in get_args(Rounding)
    assert scale_rule in get_args(ScaleRule)
    up, power_of_two, tries_four, keeps_mask = switches
    return Quantizer(
        named_block_format(block_format),
        cast(Rounding, rounding),
        cast(ScaleRule, scale_rule),
        hadamard_group,
        rounds_scale_up=up,
        power_of_two_scales=power_of_two,
        tries_four=tries_four,
        keeps_mask=keeps_mask,
    )


def _from_list(tensors: list[Tensor], quantizer: Quantizer) -> Quantized:
    codes, scales, *others = tensors
    tensor_scale = others.pop(0) if quantizer.has_tensor_scale else None
    kept = others.pop(0) if quantizer.keeps_mask else None
    block_format: BlockFormat = quantizer.block_format
    return Quantized(block_format, codes, scales, tensor_scale, kept)
