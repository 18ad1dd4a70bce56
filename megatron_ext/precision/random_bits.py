"""Random numbers that are a function of where they are used, the same bits on every backend.

The number of element i is a hash of (seed, i):

    u_i = mix(i xor mix(seed)) / 2^32, of which the upper 24 bits are used: every value is a float32

mix is a bijection of 32 bits: shifts, exclusive ors and two multiplications (constants of Chris
Wellons' search for the least biased such function, "lowbias32"). Nothing is drawn, so a layer that
is computed a second time for its gradient, another order of kernels, or a resumed run has the same
numbers. More than 2^32 elements of one tensor: the upper half of i goes into the seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIER_1, MULTIPLIER_2 = 0x7FEB_352D, 0x846C_A68B
_MASK = 0xFFFF_FFFF


def mix(words: Tensor) -> Tensor:
    """Bijection of 32-bit words: int64 with values below 2^32, any shape."""
    words = words ^ (words >> 16)
    words = (words * MULTIPLIER_1) & _MASK
    words = words ^ (words >> 15)
    words = (words * MULTIPLIER_2) & _MASK
    return words ^ (words >> 16)


def mix_int(word: int) -> int:
    """`mix` of one number."""
    word = (word ^ (word >> 16)) & _MASK
    word = (word * MULTIPLIER_1) & _MASK
    word ^= word >> 15
    word = (word * MULTIPLIER_2) & _MASK
    return word ^ (word >> 16)


def random_words(seed: int, count: int, *, device: torch.device | None = None) -> Tensor:
    """The words of elements 0 .. count - 1: int64 [count], each below 2^32."""
    index = torch.arange(count, dtype=torch.int64, device=device)
    high = index >> 32
    key = mix_int(seed & _MASK)
    return mix((index & _MASK) ^ key ^ mix(high) if count > _MASK else index ^ key)


def uniform_numbers(
    seed: int, shape: tuple[int, ...], device: torch.device | None = None
) -> Tensor:
    """Uniform in [0, 1) in steps of 2^-24, by position in a contiguous tensor: float32 [*shape]."""
    count = torch.Size(shape).numel()
    words = random_words(seed, count, device=device)
    return ((words >> 8).to(torch.float32) * 2.0**-24).view(shape)


def random_signs(seed: int, count: int, device: torch.device | None = None) -> Tensor:
    """+1 or -1 by the lowest bit of each word: float32 [count]."""
    words = random_words(seed, count, device=device)
    return 1.0 - 2.0 * (words & 1).to(torch.float32)


def derive_seed(*parts: int) -> int:
    """One seed of 31 bits from several numbers (run, step, layer, operand), order matters."""
    seed = 0
    for part in parts:
        seed = mix_int(seed ^ mix_int(part & _MASK) ^ (part >> 32 & _MASK))
    return seed & 0x7FFF_FFFF
