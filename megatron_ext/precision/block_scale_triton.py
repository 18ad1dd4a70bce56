"""Scales of blocks in Triton: `reference.py`'s formulas on groups in registers (`group_triton.py`).

    s = rule(block),   stored = its code,   x is then multiplied with 1 / decode(stored)

Where a row or the tensor has one scale its largest magnitude was found by a pass before (`given`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_ext.precision.element_format import E4M3
from megatron_ext.precision.group_triton import block_max, over_rows, spread, tree_sum
from megatron_ext.precision.number_triton import (
    SMALLEST_SCALE,
    ceil_power_of_two,
    decode_scale,
    encode,
    encode_scale,
    floor_power_of_two,
    reciprocal,
    uniform_numbers,
)
from megatron_ext.precision.quantizer import Quantizer
from megatron_ext.precision.reference import (
    EDEN_FACTOR,
    EDEN_SCALES_MAX,
    FOUR_OVER_SIX_SCALES_MAX,
    HEADROOM,
    QUEST_FACTOR,
    SQRT_2,
)

_EDEN = tl.constexpr(EDEN_FACTOR)
_QUEST = tl.constexpr(QUEST_FACTOR * SQRT_2)
_HEADROOM = tl.constexpr(HEADROOM)


@triton.constexpr_function  # type: ignore[untyped-decorator]
def tensor_factor(quantizer: Quantizer) -> float:
    """The tensor's scale over its largest magnitude."""
    factor, scales_max = 1.0, E4M3.max_value
    if quantizer.scale_rule == "eden":
        factor, scales_max = EDEN_FACTOR, EDEN_SCALES_MAX
    elif quantizer.tries_four:
        scales_max = FOUR_OVER_SIX_SCALES_MAX
    return factor / (scales_max * quantizer.block_format.element.max_value)


@triton.jit  # type: ignore[untyped-decorator]
def tensor_scale_of(amax: tl.tensor, Q: tl.constexpr) -> tl.tensor:
    """What blocks' scales are relative to: float32 scalar. amax: pointer."""
    if Q.scale_rule == "headroom":
        scale = tl.full((), _HEADROOM, tl.float32)
    elif Q.block_format.has_tensor_scale:
        scale = tl.load(amax) * tensor_factor(Q)
        scale = tl.where(scale < SMALLEST_SCALE, 1.0, scale)
    else:
        scale = tl.full((), 1.0, tl.float32)
    return scale


@triton.jit  # type: ignore[untyped-decorator]
def ideal_scales(
    values: tl.tensor,
    given: tl.tensor,
    Q: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """Before they are written in the scales' format: [outer, group / BLOCK, inner]."""
    FORMAT: tl.constexpr = Q.block_format
    if Q.scale_rule == "quest":
        share: tl.constexpr = 1.0 / (BLOCK * ROWS)
        mean = over_rows(tree_sum(values, BLOCK), ROWS, WIDTH, True) * share
        squares = over_rows(tree_sum(values * values, BLOCK), ROWS, WIDTH, True) * share
        variance = squares - mean * mean
        variance = tl.where(variance < 0.0, 0.0, variance)
        scales = floor_power_of_two(tl.sqrt_rn(variance) * _QUEST)
    else:
        if FORMAT.block_columns is None:
            largest = given
        else:
            largest = over_rows(block_max(values, BLOCK), ROWS, WIDTH, False)
        if FORMAT.scale == "e8m0" and not Q.rounds_scale_up:
            scales = floor_power_of_two(largest) * (2.0**-FORMAT.element.max_exponent)
        else:
            scales = largest * (1.0 / FORMAT.element.max_value)
            if Q.scale_rule == "eden":
                scales = scales * _EDEN
            if FORMAT.scale == "e8m0" or Q.power_of_two_scales:
                scales = ceil_power_of_two(scales)
    return scales


@triton.jit  # type: ignore[untyped-decorator]
def _square_errors(
    values: tl.tensor,
    scales: tl.tensor,
    Q: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """Sum over each block of (x - nearest stored value)^2."""
    scaled = values * spread(reciprocal(scales), BLOCK)
    # By a name: triton 3.6 passes no field of a constant on.
    ELEMENT: tl.constexpr = Q.block_format.element
    _, nearest = encode(scaled, scaled, ELEMENT, False)
    error = values - nearest * spread(scales, BLOCK)
    return over_rows(tree_sum(error * error, BLOCK), ROWS, WIDTH, True)


@triton.jit  # type: ignore[untyped-decorator]
def stored_scales(
    values: tl.tensor,
    given: tl.tensor,
    tensor_scale: tl.tensor,
    Q: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Scales as stored (codes int32, or float32) and what decoded codes are multiplied with."""
    FORMAT: tl.constexpr = Q.block_format
    ideal = ideal_scales(values, given, Q, BLOCK, ROWS, WIDTH)
    if FORMAT.scale == "fp32":
        stored = ideal
        scales = ideal
    elif FORMAT.scale == "e8m0":
        stored = encode_scale(ideal, ideal, "e8m0")
        scales = decode_scale(stored, "e8m0")
    else:
        relative = ideal * reciprocal(tl.full(ideal.shape, 1.0, tl.float32) * tensor_scale)
        stored = encode_scale(relative, relative, "e4m3")
        if Q.tries_four:
            wider = encode_scale(relative * 1.5, relative, "e4m3")
            six = decode_scale(stored, "e4m3") * tensor_scale
            four = decode_scale(wider, "e4m3") * tensor_scale
            error_six = _square_errors(values, six, Q, BLOCK, ROWS, WIDTH)
            error_four = _square_errors(values, four, Q, BLOCK, ROWS, WIDTH)
            stored = tl.where(error_four < error_six, wider, stored)
        scales = decode_scale(stored, "e4m3")
    if Q.has_tensor_scale:
        scales = scales * tensor_scale
    return stored, scales


@triton.jit  # type: ignore[untyped-decorator]
def unbiased_scales(
    values: tl.tensor,
    rounded: tl.tensor,
    scales: tl.tensor,
    stored: tl.tensor,
    position: tl.tensor,
    key: tl.tensor,
    Q: tl.constexpr,
    IS_LARGE: tl.constexpr,
) -> tl.tensor:
    """EDEN: codes of scales times <x, x> / <x, q> of their group, rounded at random.

    Args:
        rounded: decoded codes; their product with `scales` is q.
        position: of the scales, row by row in the copy.
    """
    found = rounded * spread(scales, Q.block_format.block_columns)
    length = tree_sum(values * values, values.shape[1])
    overlap = tree_sum(values * found, values.shape[1])
    factor = tl.where(overlap > 0.0, tl.div_rn(length, overlap), 1.0)
    uniform = uniform_numbers(position, key, IS_LARGE)
    return encode_scale(decode_scale(stored, "e4m3") * factor, uniform, "e4m3_stochastic")
