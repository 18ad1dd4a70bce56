"""Quantising by the CUDA kernels of csrc/quantize: a matrix is read once, and its copy in few bits,
that of its transpose, or both are written.

    x_h = x S H,   s = scale of each block of x_h,   c = encode(x_h * (1 / s))

Same bits as `reference.quantize`, but for the sign of what stands for NaN. A scale of the whole
row or tensor is known only after all of it has been read: then there is a pass before, for the
largest magnitude, and between the two whoever shares the tensor can agree on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_ext.precision.copy_request import CopyRequest
from megatron_ext.precision.cuda_extension import cuda_ops, why_no_cuda_extension
from megatron_ext.precision.quantized import Quantized
from megatron_ext.precision.quantizer import Quantizer
from megatron_ext.precision.reference import ReduceAmax, check_groups

MAX_HADAMARD_GROUP = 128

_ELEMENTS = {"e4m3": 0, "e5m2": 1, "e2m1": 2}
_SCALE_FORMATS = {"fp32": 0, "e8m0": 1, "e4m3": 2}
_SCALE_RULES = {"absmax": 0, "quest": 1, "headroom": 2, "eden": 3}


@dataclass(frozen=True, slots=True)
class KernelCopy:
    """A copy as kernels take it: numbers of its rule, what is written, what is read.

    Attributes:
        rule: `rule_numbers` of its quantizer.
        stored: codes and scales, allocated; of the transpose, rows are the matrix's columns.
        signs: float32 [hadamard_group] or None.
        amax: float32 [1] or [rows]; None: found on the way.
    """

    rule: list[int]
    stored: Quantized
    seed: int
    signs: Tensor | None
    amax: Tensor | None


class Kernels(Protocol):
    """What csrc/quantize/quantize.h offers."""

    def quantize(
        self, matrix: Tensor, row: KernelCopy | None, transposed: KernelCopy | None
    ) -> None: ...

    def largest_magnitudes(
        self, matrix: Tensor, rule: list[int], signs: Tensor | None, transposed: bool, amax: Tensor
    ) -> None: ...


class ExtensionKernels:
    """Those of the built extension, on the current stream."""

    def quantize(
        self, matrix: Tensor, row: KernelCopy | None, transposed: KernelCopy | None
    ) -> None:
        cuda_ops().quantize(matrix, *_arguments(row), *_arguments(transposed))

    def largest_magnitudes(
        self, matrix: Tensor, rule: list[int], signs: Tensor | None, transposed: bool, amax: Tensor
    ) -> None:
        cuda_ops().largest_magnitudes(matrix, rule, signs, transposed, amax)


def quantize_cuda(
    matrix: Tensor,
    quantizer: Quantizer,
    *,
    seed: int = 0,
    signs: Tensor | None = None,
    reduce_amax: ReduceAmax | None = None,
) -> Quantized:
    """`reference.quantize` on a GPU: [rows, columns] -> codes and scales.

    Raises:
        ValueError: groups do not divide the columns, or no kernel does this.
        RuntimeError: the extension is not there, with the reason.
    """
    request = CopyRequest(quantizer, seed, signs)
    row, _ = quantize_both_cuda(matrix, request, None, reduce_amax=reduce_amax)
    assert row is not None
    return row


def quantize_both_cuda(
    matrix: Tensor,
    row: CopyRequest | None,
    transposed: CopyRequest | None,
    *,
    reduce_amax: ReduceAmax | None = None,
    kernels: Kernels | None = None,
) -> tuple[Quantized | None, Quantized | None]:
    """The copy of a matrix and of its transpose, in one pass where both have the same elements.

    `transposed` gives what `reference.quantize(matrix.t(), ...)` gives; square blocks are stored
    with the codes of the row copy.

    Args:
        matrix: [rows, columns], any float dtype.
        kernels: None: those of the extension.

    Raises:
        ValueError, RuntimeError: as `quantize_cuda`.
    """
    kernels = ExtensionKernels() if kernels is None else kernels
    if matrix.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        matrix = matrix.float()
    matrix = matrix.contiguous()
    copies = [
        None if request is None else _prepared(matrix, request, is_transposed, reduce_amax, kernels)
        for request, is_transposed in ((row, False), (transposed, True))
    ]
    if matrix.numel():
        kernels.quantize(matrix, copies[0], copies[1])
    stored = [None if copy is None else copy.stored for copy in copies]
    return stored[0], stored[1]


def why_not_quantize(quantizer: Quantizer, device: torch.device) -> str:
    """Why this cannot be done on a device; empty where it can."""
    return why_no_cuda_extension(device) or _why_no_kernel(quantizer, is_transposed=False) or ""


def why_not_transposed(quantizer: Quantizer) -> str:
    """Why `quantize_both_cuda` cannot make such a copy of the transpose; empty where it can."""
    return _why_no_kernel(quantizer, is_transposed=True) or ""


def rule_numbers(quantizer: Quantizer) -> list[int]:
    """A quantizer as `struct Rule` of csrc/quantize/quantize.h."""
    block_format = quantizer.block_format
    return [
        _ELEMENTS[block_format.element.name],
        block_format.block_rows or 0,
        block_format.block_columns or 0,
        _SCALE_FORMATS[block_format.scale],
        int(block_format.has_tensor_scale),
        _SCALE_RULES[quantizer.scale_rule],
        quantizer.hadamard_group,
        int(quantizer.rounding == "stochastic"),
        int(quantizer.rounds_scale_up),
        int(quantizer.power_of_two_scales),
        int(quantizer.tries_four),
        int(quantizer.keeps_mask),
    ]


def _why_no_kernel(quantizer: Quantizer, *, is_transposed: bool) -> str | None:
    """Every operand of every recipe has one."""
    block_format = quantizer.block_format
    is_square = (block_format.block_rows or 1) > 1
    is_nvfp4 = block_format.scale == "e4m3"
    if quantizer.hadamard_group > MAX_HADAMARD_GROUP:
        return f"Hadamard groups above {MAX_HADAMARD_GROUP}"
    if is_square and (quantizer.hadamard_group > 1 or quantizer.scale_rule != "absmax"):
        return "square blocks with a Hadamard transform or another scale rule than absmax"
    if is_square and is_transposed and quantizer.rounding == "stochastic":
        return "the transpose of square blocks rounded at random"
    if quantizer.scale_rule == "quest" and block_format.block_columns is None:
        return "quest with one scale for a row or the tensor"
    if quantizer.scale_rule == "eden" and not is_nvfp4:
        return "eden without scales in E4M3"
    if quantizer.tries_four and not is_nvfp4:
        return "four over six without scales in E4M3"
    return None


def _prepared(
    matrix: Tensor,
    request: CopyRequest,
    is_transposed: bool,
    reduce_amax: ReduceAmax | None,
    kernels: Kernels,
) -> KernelCopy:
    quantizer = request.quantizer
    if reason := _why_no_kernel(quantizer, is_transposed=is_transposed):
        raise ValueError(f"no CUDA kernel for {reason}; use another backend for it")
    check_groups(matrix.t() if is_transposed else matrix, quantizer)
    rows, columns = matrix.shape[::-1] if is_transposed else matrix.shape
    rule = rule_numbers(quantizer)
    amax = None
    by_row = quantizer.block_format.block_rows == 1 and not quantizer.block_format.block_columns
    if by_row or quantizer.needs_tensor_amax:
        amax = torch.zeros(rows if by_row else 1, dtype=torch.float32, device=matrix.device)
        if matrix.numel():
            kernels.largest_magnitudes(matrix, rule, request.signs, is_transposed, amax)
        if reduce_amax is not None and not by_row:
            amax = reduce_amax(amax.view(())).view(1)
    stored = _allocated(quantizer, rows, columns, matrix.device)
    return KernelCopy(rule, stored, request.seed, request.signs, amax)


def _allocated(quantizer: Quantizer, rows: int, columns: int, device: torch.device) -> Quantized:
    block_format = quantizer.block_format
    if quantizer.keeps_mask and columns % 8:
        raise ValueError(f"bits of a mask are packed by eight; a row has {columns}")
    scale_dtype = torch.float32 if block_format.scale == "fp32" else torch.uint8

    def empty(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    return Quantized(
        block_format,
        empty(rows, columns * block_format.element.bits // 8),
        empty(*block_format.grid(rows, columns), dtype=scale_dtype),
        torch.empty((), dtype=torch.float32, device=device) if quantizer.has_tensor_scale else None,
        empty(rows, columns // 8) if quantizer.keeps_mask else None,
    )


def _arguments(
    copy: KernelCopy | None,
) -> tuple[list[int], list[Tensor], Tensor | None, Tensor | None, int]:
    """Of one copy, in the order of the op's schema (csrc/bindings.cpp)."""
    if copy is None:
        return [], [], None, None, 0
    stored = copy.stored
    tensors = [stored.codes, stored.scales]
    tensors += [each for each in (stored.tensor_scale, stored.kept) if each is not None]
    seed = copy.seed & 0xFFFF_FFFF_FFFF_FFFF
    return copy.rule, tensors, copy.signs, copy.amax, seed - (seed >> 63 << 64)
