"""Rounding elements on the CPU: the bits of `formats.encode` and `random_bits`, in fewer passes.

4 bits, a = |x|: three straight lines, each rounded to even, of which the least counts

    code(a) = min(rint(2 a), rint(a) + 2, rint(a / 2) + 4, 7)

(2 and 4 are even, so ties stay ties). At random, with p = 1, 2 or 4 the power of two below a:

    code(a) = floor(2 a / p + u) + 2 log2(p), at most 7

8 bits to the nearest are torch's own casts of clamped values. What is not finite goes through
`formats.encode`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.precision.element_format import E1M2, E2M1, E4M3, E5M2, ElementFormat
from megatron_ext.precision.formats import code_values, encode
from megatron_ext.precision.random_bits import MULTIPLIER_1, MULTIPLIER_2, mix_int

_EXPONENT = 0x7F80_0000
_SIGNED = 1 << 31


def encode_elements(
    scaled: Tensor, element: ElementFormat, uniform: Tensor | None, factors: Tensor
) -> Tensor:
    """`formats.encode(scaled, element, uniform)`: uint8, one code in each byte.

    Args:
        scaled: float32 values times their blocks' factors.
        factors: one a block; where they are finite numbers, so is everything in `scaled`.
    """
    is_finite = bool(factors.isfinite().all())
    if element == E2M1 and is_finite:
        return _encode_e2m1(scaled, uniform)
    if element == E1M2 and uniform is None and is_finite:
        codes = scaled.abs().mul_(2.0).round_().clamp_(max=7.0).to(torch.int32)
        return codes.add_(_sign(scaled)).to(torch.uint8)
    if element in (E4M3, E5M2) and uniform is None and is_finite:
        return _cast(scaled, element)
    return encode(scaled, element, uniform)


def _cast(scaled: Tensor, element: ElementFormat) -> Tensor:
    assert element.native is not None
    clamped = scaled.clamp(-element.max_value, element.max_value)
    codes = clamped.to(getattr(torch, element.native)).view(torch.uint8)
    if element.nan_code == 0x7F:
        return codes
    # torch has several NaNs; ours is one.
    return torch.where((codes & 0x7F) == 0x7F, codes - 1, codes)


def _encode_e2m1(scaled: Tensor, uniform: Tensor | None) -> Tensor:
    size = scaled.abs()
    if uniform is None:
        codes = (size * 2.0).round_()
        torch.minimum(codes, size.round().add_(2.0), out=codes)
        size.mul_(0.5).round_().add_(4.0)
        codes = torch.minimum(codes, size, out=codes).clamp_(max=7.0).to(torch.int32)
    else:
        size.clamp_(max=E2M1.max_value)
        power = size.view(torch.int32).bitwise_and(_EXPONENT)
        power.clamp_(min=127 << 23)
        # 2 / p by its exponent: exact.
        twice = torch.sub(255 << 23, power).view(torch.float32)
        codes = size.mul_(twice).add_(uniform).floor_().to(torch.int32)
        codes.add_(power.bitwise_right_shift_(22)).sub_(254).clamp_(max=7)
    return codes.add_(_sign(scaled)).to(torch.uint8)


def _sign(scaled: Tensor) -> Tensor:
    """The top bit of a code of 4 bits: int32."""
    return (scaled.view(torch.int32) >> 28).bitwise_and_(8)


def decode_elements(codes: Tensor, element: ElementFormat) -> Tensor:
    """`formats.decode`: float32, shape of codes."""
    return code_values(element).index_select(0, codes.view(-1).to(torch.int32)).view(codes.shape)


def pack_rows(codes: Tensor) -> Tensor:
    """Two codes in a byte, the first in the lower half: uint8 [n, m] -> [n / 2, m]."""
    return codes[::2] | (codes[1::2] << 4)


def pack_bits_rows(mask: Tensor) -> Tensor:
    """Eight bits in a byte, the first the lowest: bool [n, m] -> uint8 [n / 8, m]."""
    bits = mask.view(torch.uint8)
    for shift in (1, 2, 4):
        bits = bits[::2] | (bits[1::2] << shift)
    return bits


def uniform_at(seed: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """`uniform_numbers` of the elements at sum(index * stride): float32 [*sizes]."""
    index = torch.zeros(*(1 for _ in sizes), dtype=torch.int32)
    for dim, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
        shape = [1] * len(sizes)
        shape[dim] = size
        steps = torch.arange(size, dtype=torch.int64) * stride
        index = index + steps.to(torch.int32).view(shape)
    words = index.bitwise_xor(_int32(mix_int(seed & 0xFFFF_FFFF)))
    # Arithmetic shifts fill in the sign; the masks take it out again.
    spare = (words >> 16).bitwise_and_(0xFFFF)
    words.bitwise_xor_(spare).mul_(_int32(MULTIPLIER_1))
    torch.bitwise_right_shift(words, 15, out=spare).bitwise_and_(0x1_FFFF)
    words.bitwise_xor_(spare).mul_(_int32(MULTIPLIER_2))
    torch.bitwise_right_shift(words, 16, out=spare).bitwise_and_(0xFFFF)
    words.bitwise_xor_(spare).bitwise_right_shift_(8).bitwise_and_(0xFF_FFFF)
    return words.to(torch.float32).mul_(2.0**-24)


def _int32(word: int) -> int:
    """The same 32 bits as a signed number."""
    return word - 2 * _SIGNED if word >= _SIGNED else word
