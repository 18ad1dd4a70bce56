"""Scales of blocks: what a block's values are divided by before they are rounded.

    stored = encode(x * (1 / s)),     read back: decode(stored) * s

The reciprocal is taken once a block, by IEEE division, so every backend has the same bits.

| rule | s of a block, from its largest magnitude a (or its standard deviation) |
|---|---|
| `absmax` | a / M, M the largest value of the element format |
| `quest` | power of two nearest to 2.92247856 std / M: the clipping that loses least (QuEST) |
| `headroom` | 4/3 of the power of two below a / 2^e_max: nothing is clipped (Quartet, backward) |
| `sawb` | (12.68 sqrt(E[x^2]) - 12.80 E|x|) / M, over the tensor (LUQ, forward) |
| `eden` | 0.93 * 17/16 of absmax: less error, corrected afterwards (Quartet II, backward) |

and then written in the scale's own format:

    float32   as it is; `power_of_two`: the next one above
    E8M0      a power of two: floor as in the OCP specification, where the largest values may be
              clipped, or ceil, where none is (NVIDIA's MXFP8 recipe, arXiv 2506.08027)
    E4M3      after division by one float32 scale for the tensor, a / (448 * M)     (NVFP4)

A block of zeros, or one too small for its scale's format, has scale 0 and is read back as zeros.
NaN or an infinity in a block makes its scale NaN, so it is seen in whatever is made of the block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.precision.element_format import E4M3
from megatron_ext.precision.formats import decode, encode

# Below it a reciprocal overflows float32.
SMALLEST_SCALE = 2.0**-126
# E8M0: the code is the exponent + 127; the last is NaN.
E8M0_BIAS, E8M0_NAN = 127, 255

_EXPONENT_BITS = 23


def floor_power_of_two(values: Tensor) -> Tensor:
    """Largest power of two that is not above: float32 >= 2^-126, any shape; zeros stay zeros."""
    return (values.view(torch.int32) & 0x7F80_0000).view(torch.float32)


def ceil_power_of_two(values: Tensor) -> Tensor:
    """Smallest power of two that is not below; what lies above 2^127 becomes infinite."""
    below = floor_power_of_two(values)
    return torch.where(below == values, below, below * 2.0)


def encode_e8m0(scales: Tensor) -> Tensor:
    """Codes of powers of two (float32, any shape): uint8. What is not finite becomes NaN."""
    exponent = scales.view(torch.int32) >> _EXPONENT_BITS
    return torch.where(scales.isfinite(), exponent, E8M0_NAN).to(torch.uint8)


def cast_e8m0(values: Tensor) -> Tensor:
    """Codes of the nearest powers of two, ties (1.5 2^k) upwards: float32, any shape -> uint8.

    Negative numbers, zero, infinities and NaN become NaN, as in the OCP specification.
    """
    bits = values.view(torch.int32)
    # What lies between 2^-127 and 2^-126 becomes the latter, as in ml_dtypes.
    half = torch.where(bits < 1 << _EXPONENT_BITS, (1 << 22) - 1, 1 << 22)
    exponent = (bits + half) >> _EXPONENT_BITS
    valid = values.isfinite() & (values > 0) & (exponent < E8M0_NAN)
    return torch.where(valid, exponent, E8M0_NAN).to(torch.uint8)


def decode_e8m0(codes: Tensor) -> Tensor:
    """Powers of two: uint8, any shape -> float32; 255 is NaN."""
    words = codes.to(torch.int32)
    normal = (words << _EXPONENT_BITS).view(torch.float32)
    values = torch.where(words == 0, 2.0**-127, normal)
    return torch.where(words == E8M0_NAN, float("nan"), values)


def encode_scale_e4m3(scales: Tensor) -> Tensor:
    """Codes of the nearest E4M3 values of scales >= 0; NaN and infinity become NaN: uint8."""
    return encode(torch.where(scales.isfinite(), scales, float("nan")), E4M3)


def decode_scale_e4m3(codes: Tensor) -> Tensor:
    """float32, shape of codes."""
    return decode(codes, E4M3)


def reciprocal(scales: Tensor) -> Tensor:
    """What a block's values are multiplied with: 1 / s, and 0 for a scale that stands for zeros."""
    is_zero = scales < SMALLEST_SCALE
    return torch.where(is_zero, 0.0, 1.0 / scales)
