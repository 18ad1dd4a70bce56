"""A shuffle of any number of items that needs no memory: each position is computed by itself.

A Feistel network is a bijection of the numbers below 2^b, whatever its round function is: with the
number's halves (l, r), a round replaces l by l XOR F(r), the next one r by r XOR F(l). For n items
that are no power of two it is applied again until the result is below n (cycle walking), at most
two times on average since 2^b < 2 n; what remains is a bijection of 0 .. n - 1.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_NUM_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

UInt64s = npt.NDArray[np.uint64]


def derive_seed(*parts: int | str) -> int:
    """A 64-bit seed that depends on all parts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def permute(
    positions: npt.ArrayLike, num_items: int, seed: int | npt.ArrayLike
) -> npt.NDArray[np.int64]:
    """The items at these positions of a shuffled list of 0 .. num_items - 1.

    Args:
        positions: numbers below `num_items`, [n].
        num_items: length of the list.
        seed: below 2^64; one for all positions or one for each, [n].
    """
    values = np.array(positions, np.uint64, ndmin=1)
    assert len(values) == 0 or int(values.max()) < num_items
    seeds = np.array(seed, np.uint64, ndmin=1)
    bits = max(2, (num_items - 1).bit_length())
    walking = np.arange(len(values))
    while len(walking):
        keys = seeds if len(seeds) == 1 else seeds[walking]
        moved = _feistel(values[walking], keys, bits)
        values[walking] = moved
        walking = walking[moved >= np.uint64(num_items)]
    return values.astype(np.int64)


def _feistel(values: UInt64s, seeds: UInt64s, bits: int) -> UInt64s:
    right_bits = np.uint64(bits // 2)
    right_mask = np.uint64((1 << (bits // 2)) - 1)
    left_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    left, right = values >> right_bits, values & right_mask
    keys = seeds
    for _ in range(_NUM_ROUNDS // 2):
        keys = mix(keys + _GOLDEN)
        left = left ^ (mix(right ^ keys) & left_mask)
        keys = mix(keys + _GOLDEN)
        right = right ^ (mix(left ^ keys) & right_mask)
    return (left << right_bits) | right


def mix(values: UInt64s) -> UInt64s:
    """The finalizer of SplitMix64: every bit of the input moves every bit of the output."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
