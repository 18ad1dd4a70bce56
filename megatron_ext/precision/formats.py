"""Number formats of 8 and 4 bits: which values there are, and how a number is rounded to one.

A value of a format with m mantissa bits and exponents from e_min up to e_max is

    (-1)^s * 2^max(e, e_min) * (k / 2^m)        one step between neighbours: 2^(max(e, e_min) - m)

so rounding x is rounding x / step to a whole number, step taken from x's own power of two:

    nearest:     q = rint(|x| / step) * step               ties to even
    stochastic:  q = floor(|x| / step + u) * step          u uniform in [0, 1): E[q] = |x|

Steps are powers of two, so the division is exact and every backend that has IEEE float32 gets the
same bits, fused multiply-add or not.

The formats are in `element_format.py`; E8M0, which has no sign and no zero, in `scales.py`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megatron_ext.precision.element_format import ElementFormat

Overflow = Literal["saturate", "special"]

_FLOAT32_EXPONENT = 0x7F80_0000
_FLOAT32_BIAS = 127
_FLOAT32_MANTISSA_BITS = 23


def round_to(values: Tensor, element: ElementFormat, uniform: Tensor | None = None) -> Tensor:
    """The nearest values of the format, or random neighbours; too large ones become the largest.

    Args:
        values: float32, any shape. NaN stays NaN; infinities become the largest value.
        uniform: float32 in [0, 1), shape of values: rounds up where |x| / step + uniform passes
            the next whole number. None: to the nearest, ties to even.

    Returns:
        float32, shape of values; signs of zeros are kept.
    """
    clamped = values.clamp(-element.max_value, element.max_value)
    step = _step(clamped, element)
    if uniform is None:
        return torch.round(clamped / step) * step
    rounded = torch.floor(clamped.abs() / step + uniform) * step
    return torch.copysign(rounded.clamp(max=element.max_value), clamped)


def encode(
    values: Tensor,
    element: ElementFormat,
    uniform: Tensor | None = None,
    *,
    overflow: Overflow = "saturate",
) -> Tensor:
    """Codes of `round_to(values)`, one in each byte.

    Args:
        values, uniform: as for `round_to`.
        overflow: "special" makes what rounds beyond the largest value infinite, or NaN in a format
            without infinities, as IEEE casts do. A format with neither always saturates.

    Returns:
        uint8, shape of values. NaN is the format's NaN; in a format without NaN it is a zero of the
        other sign, as ml_dtypes casts: whoever scales blocks puts NaN into the scale (`scales.py`).
    """
    rounded = round_to(values, element, uniform)
    codes = _codes_of(rounded.nan_to_num(nan=-0.0), element)
    sign = torch.signbit(values).to(torch.uint8) << (element.bits - 1)
    if overflow == "special" and element.nan_code is not None:
        special = element.infinity_code if element.infinity_code is not None else element.nan_code
        codes = torch.where(_overflows(values, element), special, codes)
    codes = codes | sign
    if element.nan_code is None:
        minus_zero = sign ^ (1 << (element.bits - 1))
        return torch.where(values.isnan(), minus_zero, codes).to(torch.uint8)
    return torch.where(values.isnan(), sign | element.nan_code, codes).to(torch.uint8)


def decode(codes: Tensor, element: ElementFormat) -> Tensor:
    """Values of codes: uint8, any shape, one in each byte -> float32. Exact."""
    return code_values(element, codes.device)[codes.to(torch.int32)]


def code_values(element: ElementFormat, device: torch.device | None = None) -> Tensor:
    """The value of every code, in order of the codes: float32 [2^bits]."""
    code = torch.arange(1 << element.bits, dtype=torch.int64)
    magnitude = code & ((1 << (element.bits - 1)) - 1)
    fraction = (magnitude & ((1 << element.mantissa_bits) - 1)).double()
    exponent = magnitude >> element.mantissa_bits
    fraction = fraction / (1 << element.mantissa_bits) + (exponent > 0)
    power = (exponent.clamp(min=1) - element.bias).double()
    values = fraction * torch.exp2(power)
    if element.infinity_code is not None:
        values[magnitude == element.infinity_code] = float("inf")
        values[magnitude > element.infinity_code] = float("nan")
    elif element.nan_code is not None:
        values[magnitude == element.nan_code] = float("nan")
    is_negative = code != magnitude
    return torch.where(is_negative, -values, values).float().to(device or "cpu")


def _step(values: Tensor, element: ElementFormat) -> Tensor:
    """Distance of the format's values around finite values; a power of two, float32."""
    # The exponent bits alone are the largest power of two below a number.
    power = (values.view(torch.int32) & _FLOAT32_EXPONENT).view(torch.float32)
    smallest = 2.0**element.min_exponent
    return power.clamp(min=smallest) * 2.0**-element.mantissa_bits


def _codes_of(rounded: Tensor, element: ElementFormat) -> Tensor:
    """Codes without sign of values of the format: int32."""
    bits = rounded.abs().view(torch.int32)
    drop = _FLOAT32_MANTISSA_BITS - element.mantissa_bits
    normal = (bits >> drop) - ((_FLOAT32_BIAS - element.bias) << element.mantissa_bits)
    subnormal = (rounded.abs() / element.min_step).to(torch.int32)
    return torch.where(rounded.abs() < 2.0**element.min_exponent, subnormal, normal)


def _overflows(values: Tensor, element: ElementFormat) -> Tensor:
    """What the next step above the largest value is nearer to, ties to even as the step decides."""
    step = 2.0 ** (element.max_exponent - element.mantissa_bits)
    half_way = element.max_value + step / 2
    last_is_even = int(element.max_value / step) % 2 == 0
    return values.abs() > half_way if last_is_even else values.abs() >= half_way
