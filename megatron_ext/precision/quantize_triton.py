"""Quantising in Triton: a matrix is read once, and its copy in few bits, that of its transpose, or
both are written.

    x_h = x S H,   s = scale of each block of x_h,   c = encode(x_h * (1 / s))

Same bits as `reference.quantize`, but for the sign of what stands for NaN. A scale of the whole row
or tensor is known only after all of it has been read: then there is a pass before, for the largest
magnitude, and between the two whoever shares the tensor can agree on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.precision.copy_request import CopyRequest
from megatron_ext.precision.quantize_launch_triton import Source, launch
from megatron_ext.precision.quantized import Quantized
from megatron_ext.precision.quantizer import Quantizer
from megatron_ext.precision.reference import ReduceAmax

MAX_GROUP = 128


def quantize_triton(
    matrix: Tensor,
    quantizer: Quantizer,
    *,
    seed: int = 0,
    signs: Tensor | None = None,
    reduce_amax: ReduceAmax | None = None,
) -> Quantized:
    """`reference.quantize` in one pass: [rows, columns] -> codes and scales.

    A transposed view is read as it lies.

    Raises:
        ValueError: groups do not divide the columns, or no kernel does this.
    """
    request = CopyRequest(quantizer, seed, signs)
    _check_rule(quantizer)
    if matrix.stride(0) == 1 and matrix.stride(1) >= max(matrix.shape[0], 2):
        _, stored = launch(Source(readable(matrix.t())), None, request, reduce_amax)
    else:
        stored, _ = launch(Source(readable(matrix)), request, None, reduce_amax)
    assert stored is not None
    return stored


def quantize_both_triton(
    matrix: Tensor,
    row: CopyRequest,
    transposed: CopyRequest,
    *,
    reduce_amax: ReduceAmax | None = None,
) -> tuple[Quantized, Quantized]:
    """The copy of a matrix and of its transpose, in one pass: the bits of two calls.

    Raises:
        ValueError: as `quantize_triton`.
    """
    for request in (row, transposed):
        _check_rule(request.quantizer)
    return both_of(Source(readable(matrix)), row, transposed, reduce_amax)


def both_of(
    source: Source, row: CopyRequest, transposed: CopyRequest, reduce_amax: ReduceAmax | None
) -> tuple[Quantized, Quantized]:
    """Copies of a source, checked."""
    first, second = launch(source, row, transposed, reduce_amax)
    assert first is not None
    assert second is not None
    return first, second


def why_not_quantize(quantizer: Quantizer, device: torch.device) -> str:
    """Why this cannot be done; empty where it can, on any device Triton knows."""
    del device
    block_format = quantizer.block_format
    is_nvfp4 = block_format.scale == "e4m3"
    if quantizer.hadamard_group > MAX_GROUP:
        return f"Hadamard groups above {MAX_GROUP}"
    if quantizer.scale_rule == "sawb":
        return "scales from moments of the whole tensor"
    if quantizer.scale_rule == "quest" and block_format.block_columns is None:
        return "quest with one scale for a row or the tensor"
    if quantizer.scale_rule == "eden" and not (is_nvfp4 and block_format.block_rows == 1):
        return "eden without scales in E4M3 of blocks of one row"
    if quantizer.tries_four and not is_nvfp4:
        return "four over six without scales in E4M3"
    return ""


def _check_rule(quantizer: Quantizer) -> None:
    if reason := why_not_quantize(quantizer, torch.device("cpu")):
        raise ValueError(f"no Triton kernel for {reason}; use another backend for it")


def readable(matrix: Tensor) -> Tensor:
    """In a dtype and with columns side by side, as kernels read it."""
    if matrix.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        matrix = matrix.float()
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
