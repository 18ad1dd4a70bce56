"""Groups of numbers in registers, in Triton: transform, sums by neighbours, maxima, packing.

Values are [outer, group, inner]: groups lie along the middle dim. Rows of a matrix are
[groups, g, 1]; its transpose is [groups, g, columns], so a thread that holds whole groups
transforms them without a word to its neighbours.

A round of the transform needs the partner of each number over a span: the sum of the pair's bits
less its own, which is a shuffle between threads, and nothing at all within one.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from megatron_ext.precision.number_triton import bits_of, float_of


@triton.constexpr_function  # type: ignore[untyped-decorator]
def root_share(group: int) -> float:
    return 1.0 / math.sqrt(group)


@triton.constexpr_function  # type: ignore[untyped-decorator]
def rounds(group: int) -> int:
    return group.bit_length() - 1


@triton.jit  # type: ignore[untyped-decorator]
def _butterfly(values: tl.tensor, SPAN: tl.constexpr, INNER: tl.constexpr) -> tl.tensor:
    SHAPE: tl.constexpr = values.shape
    pairs = tl.reshape(values, (values.numel // (2 * SPAN * INNER), 2, SPAN * INNER))
    bits = bits_of(pairs)
    partner = float_of(tl.sum(bits, axis=1, keep_dims=True) - bits)
    sign = 1.0 - 2.0 * tl.arange(0, 2).to(tl.float32)[None, :, None]
    # The product is exact, so there is one rounding.
    return tl.reshape(tl.fma(pairs, tl.broadcast_to(sign, pairs.shape), partner), SHAPE)


@triton.jit  # type: ignore[untyped-decorator]
def hadamard(
    values: tl.tensor, signs: tl.tensor, GROUP: tl.constexpr, HAS_SIGNS: tl.constexpr
) -> tl.tensor:
    """Groups of `GROUP` along dim 1."""
    if GROUP == 1:
        return values
    if HAS_SIGNS:
        place = tl.arange(0, values.shape[1]) % GROUP
        values = values * tl.load(signs + place)[None, :, None]
    for each in tl.static_range(rounds(GROUP)):
        values = _butterfly(values, 1 << each, values.shape[2])
    return values * root_share(GROUP)


@triton.jit  # type: ignore[untyped-decorator]
def tree_sum(values: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """[outer, group, inner] -> [outer, group / BLOCK, inner]."""
    for _ in tl.static_range(rounds(BLOCK)):
        # Not by a name: a constant cannot be said twice.
        values = tl.sum(
            tl.reshape(values, (values.shape[0], values.shape[1] // 2, 2, values.shape[2])), axis=2
        )
    return values


@triton.jit  # type: ignore[untyped-decorator]
def block_max(values: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Largest magnitudes, as `tree_sum` has blocks; NaN is the largest of all."""
    magnitude = bits_of(values) & 0x7FFF_FFFF
    shape: tl.constexpr = (
        values.shape[0],
        values.shape[1] // BLOCK,
        BLOCK,
        values.shape[2],
    )
    return float_of(tl.max(tl.reshape(magnitude, shape), axis=2))


@triton.jit  # type: ignore[untyped-decorator]
def spread(blocks: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """[outer, blocks, inner] -> [outer, blocks BLOCK, inner]."""
    shape: tl.constexpr = (blocks.shape[0], blocks.shape[1], BLOCK, blocks.shape[2])
    wide = tl.broadcast_to(blocks[:, :, None, :], shape)
    return tl.reshape(wide, (shape[0], shape[1] * BLOCK, shape[3]))


@triton.jit  # type: ignore[untyped-decorator]
def over_rows(
    blocks: tl.tensor, ROWS: tl.constexpr, WIDTH: tl.constexpr, SUMS: tl.constexpr
) -> tl.tensor:
    """What a block of `ROWS` rows has together, in each of its rows. WIDTH: blocks of a row."""
    if ROWS == 1:
        return blocks
    SHAPE: tl.constexpr = blocks.shape
    if blocks.shape[2] == 1:
        cube = tl.reshape(blocks, (blocks.numel // (ROWS * WIDTH), ROWS, WIDTH))
    else:
        cube = tl.reshape(blocks, (blocks.numel // ROWS, ROWS, 1))
    if SUMS:  # noqa: SIM108  (Triton has no such expression of a constant)
        found = tree_sum(cube, ROWS)
    else:
        found = block_max(cube, ROWS)
    return tl.reshape(tl.broadcast_to(found, cube.shape), SHAPE)


@triton.jit  # type: ignore[untyped-decorator]
def packed(parts: tl.tensor, BITS: tl.constexpr, COUNT: tl.constexpr) -> tl.tensor:
    """`COUNT` neighbours along dim 1 in one word, the first lowest: int32."""
    shape: tl.constexpr = (parts.shape[0], parts.shape[1] // COUNT, COUNT, parts.shape[2])
    place = (tl.arange(0, COUNT) * BITS)[None, None, :, None]
    return tl.sum(tl.reshape(parts, shape) << place, axis=2)
