"""Quantising and multiplying, as the formulas read; what kernels are compared with, bit for bit.

    x_h = x S H                          in groups along the columns (`hadamard.py`)
    s   = scale of each block of x_h     (`scales.py`)
    c   = encode(x_h * (1 / s))          (`formats.py`)
    x  ~= decode(c) * s H S

Everything in float32, one rounding for each operation, so the bits are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.precision.block_format import BlockFormat
from megatron_ext.precision.element_format import E4M3
from megatron_ext.precision.formats import encode, round_to
from megatron_ext.precision.hadamard import block_hadamard
from megatron_ext.precision.packing import pack, pack_bits
from megatron_ext.precision.quantized import Quantized, spread
from megatron_ext.precision.quantizer import Quantizer
from megatron_ext.precision.random_bits import derive_seed, uniform_numbers
from megatron_ext.precision.scales import (
    SMALLEST_SCALE,
    ceil_power_of_two,
    decode_scale_e4m3,
    encode_e8m0,
    encode_scale_e4m3,
    floor_power_of_two,
    reciprocal,
)

ReduceAmax = Callable[[Tensor], Tensor]

# Optimal clipping of a standard normal for E2M1, over its largest value 6 (QuEST).
QUEST_FACTOR = 2.92247856 / 6.0
# 2^floor(log2(x sqrt(2))) is the power of two nearest to x. On normal numbers the square error is
# 0.0134 then, as the paper's Table 2 has it; with 2^floor(log2 x), as its code reads, 0.022.
SQRT_2 = 2.0**0.5
# Quartet II: less than the largest magnitude, so that the error is least before it is corrected.
EDEN_FACTOR = (17.0 / 16.0) * 0.93
EDEN_SCALES_MAX = 255.99
# A block stored with its largest value at 4 has a scale half as large again.
FOUR_OVER_SIX_SCALES_MAX = 256.0
# SAWB: where 4 bits clip a tensor, from its root mean square and its mean magnitude.
SAWB_SQUARE, SAWB_SIZE = 12.68, 12.80
# The largest value of a block is below 2^(e_max + 1) scales; 3/4 of it fits E2M1 (Quartet).
HEADROOM = 4.0 / 3.0


def quantize(
    matrix: Tensor,
    quantizer: Quantizer,
    *,
    seed: int = 0,
    signs: Tensor | None = None,
    reduce_amax: ReduceAmax | None = None,
) -> Quantized:
    """Store a matrix.

    Args:
        matrix: [rows, columns], any float dtype; products contract over the columns.
        seed: of stochastic rounding; elements count row by row.
        signs: float32 [hadamard_group], +1 or -1, where the quantizer has signs.
        reduce_amax: makes the largest magnitude of this part that of the whole tensor, where ranks
            hold a part each; float32 [] -> float32 []. Asked only by formats with one scale for
            the tensor.

    Raises:
        ValueError: groups do not divide the columns.
    """
    check_groups(matrix, quantizer)
    values = transformed(matrix, quantizer, signs)
    block_format = quantizer.block_format
    rows, columns = values.shape
    tensor_scale = _tensor_scale(values, quantizer, reduce_amax)
    scales = _stored_scales(values, quantizer, tensor_scale, reduce_amax)
    stored = Quantized(block_format, values.new_empty(0, 0), scales, tensor_scale)
    scaled = values * spread(reciprocal(stored.block_scales()), block_format, rows, columns)
    uniform = None
    if quantizer.rounding == "stochastic":
        uniform = uniform_numbers(seed, (rows, columns), values.device)
    codes = encode(scaled, block_format.element, uniform)
    codes = pack(codes) if block_format.is_packed else codes
    kept = None
    if quantizer.keeps_mask:
        kept = pack_bits(scaled.abs() < block_format.element.max_value)
    stored = Quantized(block_format, codes, scales, tensor_scale, kept)
    if quantizer.scale_rule == "eden":
        stored = replace(stored, scales=_unbiased_scales(values, stored, quantizer, seed))
    return stored


def check_groups(matrix: Tensor, quantizer: Quantizer) -> None:
    """ValueError where a block or a Hadamard group would reach past the end of a row."""
    columns = matrix.shape[1]
    if columns % quantizer.hadamard_group:
        raise ValueError(
            f"Hadamard groups of {quantizer.hadamard_group} do not divide a contracted dim of "
            f"{columns}"
        )
    block = quantizer.block_format.block_columns
    if quantizer.block_format.is_packed and block and columns % block:
        raise ValueError(
            f"{quantizer.block_format.name} has blocks of {block} along the contracted dim; "
            f"{columns} is no multiple"
        )


def transformed(matrix: Tensor, quantizer: Quantizer, signs: Tensor | None) -> Tensor:
    """float32 [rows, columns] in the basis in which it is rounded."""
    values = matrix.float()
    if quantizer.hadamard_group == 1:
        return values
    return block_hadamard(values, quantizer.hadamard_group, signs)


def multiply(left: Quantized | Tensor, right: Quantized | Tensor) -> Tensor:
    """left right^T of what is stored, in float32: [m, k] x [n, k] -> [m, n]."""
    return read(left) @ read(right).t()


def read(operand: Quantized | Tensor) -> Tensor:
    """Values as float32."""
    return operand.values() if isinstance(operand, Quantized) else operand.float()


def tree_sum(values: Tensor) -> Tensor:
    """Sum over the last dim by neighbours, then neighbours of those sums, and so on.

    An order that kernels can follow: float32 [..., n] -> [...]. An odd one out is added to 0.
    """
    while values.shape[-1] > 1:
        if values.shape[-1] % 2:
            values = F.pad(values, (0, 1))
        values = values[..., ::2] + values[..., 1::2]
    return values.squeeze(-1)


def sawb_clip(values: Tensor) -> Tensor:
    """c1 sqrt(E[x^2]) - c2 E|x|, where that is a magnitude the tensor has: float32 []."""
    share = 1.0 / max(values.numel(), 1)
    size = values.abs().flatten()
    square = (tree_sum(size.square()) * share).sqrt()
    clip = square * SAWB_SQUARE - tree_sum(size) * share * SAWB_SIZE
    largest = size.amax()
    return torch.where(clip > 0, torch.minimum(clip, largest), largest)


def block_amax(values: Tensor, block_format: BlockFormat) -> Tensor:
    """Largest magnitude of each block: float32 [down, across]; NaN where a block has one."""
    return _blocks(values.abs(), block_format).amax(dim=(1, 3))


def _blocks(values: Tensor, block_format: BlockFormat) -> Tensor:
    """[down, block rows, across, block columns], the last blocks filled up with zeros."""
    rows, columns = values.shape
    down, across = block_format.grid(rows, columns)
    block_rows = block_format.block_rows or rows
    block_columns = block_format.block_columns or columns
    padded = F.pad(values, (0, across * block_columns - columns, 0, down * block_rows - rows))
    return padded.view(down, block_rows, across, block_columns)


def _tensor_scale(
    values: Tensor, quantizer: Quantizer, reduce_amax: ReduceAmax | None
) -> Tensor | None:
    """float32 []: what all blocks' scales are relative to."""
    block_format = quantizer.block_format
    if quantizer.scale_rule == "headroom":
        return torch.full((), HEADROOM, device=values.device)
    if not block_format.has_tensor_scale:
        return None
    largest = _tensor_amax(values, reduce_amax)
    # The largest block gets the largest scale; less where a scale may still grow afterwards.
    factor, scales_max = 1.0, E4M3.max_value
    if quantizer.scale_rule == "eden":
        factor, scales_max = EDEN_FACTOR, EDEN_SCALES_MAX
    elif quantizer.tries_four:
        scales_max = FOUR_OVER_SIX_SCALES_MAX
    scale = largest * (factor / (scales_max * block_format.element.max_value))
    return torch.where(scale < SMALLEST_SCALE, 1.0, scale)


def _tensor_amax(values: Tensor, reduce_amax: ReduceAmax | None) -> Tensor:
    largest = values.abs().amax()
    return largest if reduce_amax is None else reduce_amax(largest)


def _stored_scales(
    values: Tensor,
    quantizer: Quantizer,
    tensor_scale: Tensor | None,
    reduce_amax: ReduceAmax | None,
) -> Tensor:
    """Scales of blocks as they are stored: [down, across]."""
    block_format = quantizer.block_format
    ideal = _ideal_scales(values, quantizer, reduce_amax)
    if block_format.scale == "e8m0":
        return encode_e8m0(ideal)
    if block_format.scale == "fp32":
        return ideal
    assert tensor_scale is not None
    relative = ideal * reciprocal(tensor_scale)
    codes = encode_scale_e4m3(relative)
    if not quantizer.tries_four:
        return codes
    wider = encode_scale_e4m3(relative * 1.5)
    errors = [
        _square_errors(values, block_format, each, tensor_scale, quantizer)
        for each in (codes, wider)
    ]
    return torch.where(errors[1] < errors[0], wider, codes)


def _ideal_scales(values: Tensor, quantizer: Quantizer, reduce_amax: ReduceAmax | None) -> Tensor:
    """Before they are written in the scales' format; powers of two where that is E8M0."""
    block_format = quantizer.block_format
    element = block_format.element
    if quantizer.scale_rule == "quest":
        blocks = _blocks(values, block_format).transpose(1, 2).flatten(2)
        share = 1.0 / blocks.shape[2]
        mean = tree_sum(blocks) * share
        # In this order; the square of a mean rounded away can leave less than nothing.
        variance = (tree_sum(blocks.square()) * share - mean.square()).clamp(min=0.0)
        return floor_power_of_two(variance.sqrt() * (QUEST_FACTOR * SQRT_2))
    if quantizer.scale_rule == "sawb":
        clip = sawb_clip(values)
        clip = clip if reduce_amax is None else reduce_amax(clip)
        return clip.view(1, 1) * (1.0 / element.max_value)
    if block_format.block_rows is None and block_format.block_columns is None:
        largest = _tensor_amax(values, reduce_amax).view(1, 1)
    else:
        largest = block_amax(values, block_format)
    if block_format.scale == "e8m0" and not quantizer.rounds_scale_up:
        return floor_power_of_two(largest) * 2.0**-element.max_exponent
    scales = largest * (1.0 / element.max_value)
    if quantizer.scale_rule == "eden":
        scales = scales * EDEN_FACTOR
    if block_format.scale == "e8m0" or quantizer.power_of_two_scales:
        return ceil_power_of_two(scales)
    return scales


def _square_errors(
    values: Tensor,
    block_format: BlockFormat,
    codes: Tensor,
    tensor_scale: Tensor,
    quantizer: Quantizer,
) -> Tensor:
    """Sum over each block of (x - nearest stored value)^2: float32 [down, across]."""
    rows, columns = values.shape
    scales = decode_scale_e4m3(codes) * tensor_scale
    factors = spread(reciprocal(scales), block_format, rows, columns)
    nearest = round_to(values * factors, block_format.element)
    error = values - nearest * spread(scales, block_format, rows, columns)
    return tree_sum(_blocks(error.square(), block_format).transpose(1, 2).flatten(2))


def _unbiased_scales(values: Tensor, stored: Quantized, quantizer: Quantizer, seed: int) -> Tensor:
    """EDEN: scales of a Hadamard group times <x, x> / <x, q>, rounded at random (Quartet II)."""
    assert stored.tensor_scale is not None
    rows = values.shape[0]
    group = max(quantizer.hadamard_group, stored.block_format.block_columns or 1)
    original, found = values.view(rows, -1, group), stored.values().view(rows, -1, group)
    length, overlap = tree_sum(original.square()), tree_sum(original * found)
    factor = torch.where(overlap > 0, length / overlap, 1.0)
    scales = decode_scale_e4m3(stored.scales)
    factor = torch.repeat_interleave(factor, scales.shape[1] // factor.shape[1], dim=1)
    uniform = uniform_numbers(derive_seed(seed, 1), tuple(scales.shape), values.device)
    return encode(scales * factor, E4M3, uniform)
