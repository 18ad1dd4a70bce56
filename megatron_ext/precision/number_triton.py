"""Small floats in Triton: `formats.py`, `scales.py`, `random_bits.py` in whole-number arithmetic.

Rounding to the nearest adds a number M whose last bit is one step of x: the hardware's own rounding
of x + M, ties to even, is that of the format, and the bits of (x + M) - M count the steps,

    p = max(power of two below |x|, smallest normal),    M = p 2^(23 - m)
    k = bits(|x| + M) - bits(M),     code = k + (log2 p - e_min) 2^m

which needs nothing that a device might lack. Where it converts by itself (`cast_fp8`, `cast_fp4`),
that is used: the same bits. Scales are few, so that theirs are written as the definition reads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_ext.precision.element_format import E4M3, ElementFormat
from megatron_ext.precision.random_bits import MULTIPLIER_1, MULTIPLIER_2

_INFINITY = tl.constexpr(0x7F80_0000)
_MAGNITUDE = tl.constexpr(0x7FFF_FFFF)
_FIRST = tl.constexpr(MULTIPLIER_1)
_SECOND = tl.constexpr(MULTIPLIER_2)
SMALLEST_SCALE = tl.constexpr(2.0**-126)


@triton.constexpr_function  # type: ignore[untyped-decorator]
def max_code(element: ElementFormat) -> int:
    """Of the largest value, without sign."""
    if element.infinity_code is not None:
        return element.infinity_code - 1
    return (1 << (element.bits - 1)) - 1 if element.nan_code is None else element.nan_code - 1


@triton.constexpr_function  # type: ignore[untyped-decorator]
def e4m3() -> ElementFormat:
    """The elements that scales are written in, too."""
    return E4M3


@triton.jit  # type: ignore[untyped-decorator]
def bits_of(values: tl.tensor) -> tl.tensor:
    return values.to(tl.int32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def float_of(bits: tl.tensor) -> tl.tensor:
    return bits.to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def encode(
    values: tl.tensor,
    uniform: tl.tensor,
    ELEMENT: tl.constexpr,
    IS_STOCHASTIC: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Codes (int32) and the values (float32) they stand for.

    A NaN must be positive; where the format has none, its code says nothing.
    """
    DROP: tl.constexpr = 23 - ELEMENT.mantissa_bits
    SMALLEST: tl.constexpr = (127 + ELEMENT.min_exponent) << 23
    LARGEST: tl.constexpr = (max_code(ELEMENT) << DROP) + ((127 - ELEMENT.bias) << 23)
    bits = bits_of(values)
    magnitude = bits & _MAGNITUDE
    limited = tl.minimum(magnitude, LARGEST)
    power = tl.maximum(limited & _INFINITY, SMALLEST)
    if IS_STOCHASTIC:
        # Exact: one over the step is a power of two.
        inverse_step = float_of(((254 << 23) - power) + (ELEMENT.mantissa_bits << 23))
        steps = (float_of(limited) * inverse_step + uniform).to(tl.int32)
        step = float_of(power - (ELEMENT.mantissa_bits << 23))
        code = tl.minimum(steps + ((power - SMALLEST) >> DROP), max_code(ELEMENT))
        rounded = tl.minimum(steps.to(tl.float32) * step, ELEMENT.max_value)
    else:
        unit = power + (DROP << 23)
        total = float_of(limited) + float_of(unit)
        code = (bits_of(total) - unit) + ((power - SMALLEST) >> DROP)
        rounded = total - float_of(unit)
    sign = bits & ~_MAGNITUDE
    rounded = float_of(bits_of(rounded) | sign)
    code |= (bits >> 31) & (1 << (ELEMENT.bits - 1))
    if ELEMENT.nan_code is not None:
        code = tl.where(magnitude > _INFINITY, ELEMENT.nan_code, code)
    return code, rounded


@triton.jit  # type: ignore[untyped-decorator]
def cast_fp8(values: tl.tensor, ELEMENT: tl.constexpr) -> tl.tensor:
    """Codes (uint8) by the device's own conversion, which saturates."""
    if ELEMENT.mantissa_bits == 3:
        return values.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    codes = values.to(tl.float8e5).to(tl.uint8, bitcast=True)
    # It has another NaN.
    return tl.where(values != values, ELEMENT.nan_code, codes).to(tl.uint8)


@triton.jit  # type: ignore[untyped-decorator]
def cast_fp4(first: tl.tensor, second: tl.tensor) -> tl.tensor:
    """Pairs of E2M1 in a byte (uint8), the first lower, by Blackwell's own conversion."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b8 a, b, c, d;
        cvt.rn.satfinite.e2m1x2.f32 a, $5, $1;
        cvt.rn.satfinite.e2m1x2.f32 b, $6, $2;
        cvt.rn.satfinite.e2m1x2.f32 c, $7, $3;
        cvt.rn.satfinite.e2m1x2.f32 d, $8, $4;
        mov.b32 $0, {a, b, c, d};
        }""",
        "=r,f,f,f,f,f,f,f,f",
        [first, second],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )


@triton.jit  # type: ignore[untyped-decorator]
def decode(codes: tl.tensor, ELEMENT: tl.constexpr) -> tl.tensor:
    """Values (float32) of codes (int32)."""
    MANTISSA: tl.constexpr = ELEMENT.mantissa_bits
    magnitude = codes & ((1 << (ELEMENT.bits - 1)) - 1)
    normal = float_of((magnitude << (23 - MANTISSA)) + ((127 - ELEMENT.bias) << 23))
    subnormal = magnitude.to(tl.float32) * ELEMENT.min_step
    values = tl.where(magnitude < (1 << MANTISSA), subnormal, normal)
    if ELEMENT.nan_code is not None:
        values = tl.where(magnitude > max_code(ELEMENT), float("nan"), values)
    if ELEMENT.infinity_code is not None:
        values = tl.where(magnitude == ELEMENT.infinity_code, float("inf"), values)
    return float_of(bits_of(values) | ((codes >> (ELEMENT.bits - 1)) << 31))


@triton.jit  # type: ignore[untyped-decorator]
def floor_power_of_two(values: tl.tensor) -> tl.tensor:
    return float_of(bits_of(values) & _INFINITY)


@triton.jit  # type: ignore[untyped-decorator]
def ceil_power_of_two(values: tl.tensor) -> tl.tensor:
    below = floor_power_of_two(values)
    return tl.where(below == values, below, below * 2.0)


@triton.jit  # type: ignore[untyped-decorator]
def encode_scale(scales: tl.tensor, uniform: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Codes (int32) of E8M0 or, `FORMAT` "e4m3_stochastic" at random, of E4M3."""
    bits = bits_of(scales)
    is_finite = (bits & _MAGNITUDE) < _INFINITY
    if FORMAT == "e8m0":
        return tl.where(is_finite, bits >> 23, 255)
    codes, _ = encode(scales, uniform, e4m3(), FORMAT == "e4m3_stochastic")
    if FORMAT == "e4m3_stochastic":
        # A scale whose correction is infinite is as large as it can be.
        return tl.where((bits & _MAGNITUDE) > _INFINITY, 0x7F, codes)
    return tl.where(is_finite, codes, 0x7F)


@triton.jit  # type: ignore[untyped-decorator]
def decode_scale(codes: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """float32 of codes (int32)."""
    if FORMAT == "e8m0":
        values = float_of(tl.maximum(codes << 23, 1 << 22))
        return tl.where(codes == 255, float("nan"), values)
    return decode(codes, e4m3())


@triton.jit  # type: ignore[untyped-decorator]
def reciprocal(scales: tl.tensor) -> tl.tensor:
    is_zero = scales < SMALLEST_SCALE
    one = tl.full(scales.shape, 1.0, tl.float32)
    return tl.where(is_zero, 0.0, tl.div_rn(one, tl.where(is_zero, 1.0, scales)))


@triton.jit  # type: ignore[untyped-decorator]
def mix(words: tl.tensor) -> tl.tensor:
    """uint32."""
    words ^= words >> 16
    words *= _FIRST
    words ^= words >> 15
    words *= _SECOND
    return words ^ (words >> 16)


@triton.jit  # type: ignore[untyped-decorator]
def uniform_numbers(position: tl.tensor, key: tl.tensor, IS_LARGE: tl.constexpr) -> tl.tensor:
    """In [0, 1), float32.

    Args:
        position: int64; row-major in the tensor.
        key: int32: `mix_int` of the seed.
        IS_LARGE: positions reach beyond 32 bits.
    """
    words = position.to(tl.uint32) ^ key.to(tl.uint32, bitcast=True)
    if IS_LARGE:
        words ^= mix((position >> 32).to(tl.uint32))
    return (mix(words) >> 8).to(tl.int32).to(tl.float32) * (2.0**-24)
