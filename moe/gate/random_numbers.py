"""Random numbers that belong to a token, wherever and whenever it is computed.

A generator's numbers depend on how many were drawn before, so on the cut into ranks and
micro-batches. Here they are a function of what a token is:

    key(token)  = mix(mix(mix(seed, step), layer), token)        64 bits
    number j    = mix(key + (j + 1) * golden)

with `mix` the finaliser of SplitMix64 (Steele et al., OOPSLA 2014). So any cut, a resumed run and a
layer that is computed a second time for its gradient draw the same numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
_BITS = 24


def token_keys(token_ids: Tensor, *, seed: int, step: int, layer: int) -> Tensor:
    """One key for each token of a layer in a step: int64 [num_tokens].

    Args:
        token_ids: int64 [num_tokens], what tells tokens of one step apart.
    """
    key = torch.zeros((), dtype=torch.int64, device=token_ids.device)
    for number in (seed, step, layer):
        key = _mix(key + number + _GOLDEN)
    return _mix(key ^ _mix(token_ids))


def random_bits(keys: Tensor, num_per_key: int) -> Tensor:
    """Random int64 numbers >= 0: [num_keys, num_per_key]."""
    steps = torch.arange(1, num_per_key + 1, device=keys.device) * _GOLDEN
    return _mix(keys[:, None] + steps) & torch.iinfo(torch.int64).max


def normal(keys: Tensor, num_per_key: int) -> Tensor:
    """Standard normal numbers, float32 [num_keys, num_per_key] (Box and Muller).

    Computed in float64, so that how a device rounds a logarithm is not seen in the result.
    """
    bits = random_bits(keys, num_per_key)
    radius, angle = (
        (((bits >> shift) & ((1 << _BITS) - 1)).double() + 0.5) / (1 << _BITS) for shift in (38, 8)
    )
    return ((-2.0 * radius.log()).sqrt() * (2.0 * math.pi * angle).cos()).float()


def _mix(number: Tensor) -> Tensor:
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        number = (number ^ _shift_right(number, shift)) * multiplier
    return number ^ _shift_right(number, 31)


def _shift_right(number: Tensor, shift: int) -> Tensor:
    """As if it had no sign."""
    return (number >> shift) & ((1 << (64 - shift)) - 1)
