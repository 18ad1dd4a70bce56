"""The CPU's own way to store and multiply: the reference's bits, whatever is asked for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_ext.precision.block_format import BLOCK_FORMATS, MXFP4, MXFP8, NVFP4
from megatron_ext.precision.element_format import E1M2, E2M1, E3M0, E4M3, E5M2, ElementFormat
from megatron_ext.precision.encode_cpu import encode_elements, uniform_at
from megatron_ext.precision.formats import encode
from megatron_ext.precision.gemm_cpu import multiply_cpu, stored_values
from megatron_ext.precision.linear_recipe import linear_recipes
from megatron_ext.precision.luq import luq_recipe
from megatron_ext.precision.quantize_cpu import quantize_cpu
from megatron_ext.precision.quantized import Quantized
from megatron_ext.precision.quantizer import Quantizer
from megatron_ext.precision.random_bits import random_signs, uniform_numbers
from megatron_ext.precision.reference import multiply, quantize

RECIPES = [*linear_recipes().values(), luq_recipe()]
QUANTIZERS = sorted(
    {each for recipe in RECIPES for each in recipe.operands().values() if each is not None}
    | {Quantizer(each) for each in BLOCK_FORMATS.values()}
    | {Quantizer(each, rounding="stochastic") for each in BLOCK_FORMATS.values()}
    | {
        Quantizer(MXFP4, scale_rule="quest", hadamard_group=128, keeps_mask=True),
        Quantizer(MXFP8, hadamard_group=16, signs="fixed", keeps_mask=True),
        Quantizer(NVFP4, tries_four=True, hadamard_group=16, rounding="stochastic"),
        Quantizer(NVFP4, scale_rule="eden"),
    },
    key=str,
)


def drawn(rows: int, columns: int, *, seed: int, is_turned: bool, spread: int) -> Tensor:
    """Normal numbers times powers of two up to 2^spread, some zeros, some blocks of them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    powers = torch.randint(-spread, spread + 1, (rows, columns), generator=generator)
    values = values * torch.exp2(powers.float())
    values[:, seed % columns] = 0.0
    values[seed % rows, : columns // 2] = 0.0
    return values.t().contiguous().t() if is_turned else values


def signs_of(quantizer: Quantizer) -> Tensor | None:
    return None if quantizer.signs == "none" else random_signs(3, quantizer.hadamard_group)


def assert_same(found: Quantized, expected: Quantized) -> None:
    for one, other in zip(found.tensors(), expected.tensors(), strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


@given(
    quantizer=st.sampled_from(QUANTIZERS),
    rows=st.sampled_from([1, 2, 16, 31, 48, 128, 130]),
    groups=st.integers(1, 3),
    ragged=st.sampled_from([0, 0, 1, 40]),
    seed=st.integers(0, 2**31 - 1),
    is_turned=st.booleans(),
    spread=st.sampled_from([0, 2, 60]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    has_ranks=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_stored_bits_are_the_references(
    quantizer: Quantizer,
    rows: int,
    groups: int,
    ragged: int,
    seed: int,
    is_turned: bool,
    spread: int,
    dtype: torch.dtype,
    has_ranks: bool,
) -> None:
    columns = groups * max(quantizer.group, 8)
    if not quantizer.block_format.is_packed and quantizer.hadamard_group == 1:
        columns += 0 if quantizer.keeps_mask else ragged
    matrix = drawn(rows, columns, seed=seed, is_turned=is_turned, spread=spread).to(dtype)
    options = {
        "seed": seed,
        "signs": signs_of(quantizer),
        # As if another rank had a larger value.
        "reduce_amax": (lambda amax: amax * 1.75) if has_ranks else None,
    }
    found = quantize_cpu(matrix, quantizer, **options)  # type: ignore[arg-type]
    assert_same(found, quantize(matrix, quantizer, **options))  # type: ignore[arg-type]
    assert torch.equal(stored_values(found), found.values())


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen_where_the_reference_sees_it(
    quantizer: Quantizer, poison: float
) -> None:
    matrix = drawn(64, 256, seed=1, is_turned=False, spread=2)
    matrix[40, 100] = poison
    found = quantize_cpu(matrix, quantizer, seed=5, signs=signs_of(quantizer))
    expected = quantize(matrix, quantizer, seed=5, signs=signs_of(quantizer))
    assert expected.values()[40].isnan().any()
    assert torch.equal(found.values().nan_to_num(0.25), expected.values().nan_to_num(0.25))


@pytest.mark.parametrize("element", [E4M3, E5M2, E2M1, E1M2, E3M0], ids=lambda each: each.name)
def test_every_bfloat16_and_every_tie_is_encoded_as_defined(element: ElementFormat) -> None:
    """All finite bfloat16 numbers: every tie of every format is one; and their neighbours."""
    bits = torch.arange(1 << 16, dtype=torch.int32) << 16
    values = bits.view(torch.float32)
    values = values[values.isfinite()]
    beside = [values.view(torch.int32) + step for step in (-1, 0, 1)]
    near = torch.cat(beside).view(torch.float32)
    near = near[near.isfinite()]
    uniform = uniform_numbers(4, tuple(near.shape))
    for numbers in (None, uniform):
        found = encode_elements(near, element, numbers, torch.ones(1))
        assert torch.equal(found, encode(near, element, numbers))


@given(
    seed=st.integers(0, 2**31 - 1),
    rows=st.integers(1, 40),
    across=st.integers(1, 5),
    inside=st.integers(1, 33),
)
@settings(max_examples=50, deadline=None)
def test_random_numbers_follow_the_elements(seed: int, rows: int, across: int, inside: int) -> None:
    columns = across * inside
    expected = uniform_numbers(seed, (rows, columns)).view(rows, across, inside)
    found = uniform_at(seed, (inside, rows, across), (1, columns, inside))
    assert torch.equal(found, expected.permute(2, 0, 1))


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "nvfp4", "fp8_1x128", "fp8_row", "fp8_tensor"])
def test_products_are_the_references(name: str) -> None:
    """float32 sums in another order: 2^-24 sqrt(k) of the sum of magnitudes, by a wide margin.

    In bfloat16 a result is rounded once: half a step, at most 2^-8 of it.
    """
    quantizer = Quantizer(BLOCK_FORMATS[name])
    left = quantize(drawn(70, 256, seed=1, is_turned=False, spread=4), quantizer)
    right = quantize(drawn(50, 256, seed=2, is_turned=False, spread=4), quantizer)
    expected = multiply(left, right)
    bound = 2.0**-24 * 16 * (left.values().abs() @ right.values().abs().t())
    assert bool(((multiply_cpu(left, right) - expected).abs() <= bound).all())
    start = torch.full_like(expected, 3.0)
    added = multiply_cpu(left, right, out=start)
    assert added is start
    assert bool(((added - expected - 3.0).abs() <= bound + 2.0**-22 * (3 + expected.abs())).all())
    rounded = multiply_cpu(left, right, out_dtype=torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert bool(((rounded.float() - expected).abs() <= bound + 2.0**-8 * expected.abs()).all())


@pytest.mark.parametrize("power", [-100, 100])
def test_products_beyond_bfloat16s_normal_numbers_are_of_float32(power: int) -> None:
    """Values of 2^-100 are subnormal when multiplied; the product with 2^100 must not be zero."""
    small = quantize(torch.full((8, 32), 2.0**power), Quantizer(MXFP8))
    large = quantize(torch.full((8, 32), 2.0**-power), Quantizer(MXFP8))
    found = multiply_cpu(small, large, out_dtype=torch.bfloat16)
    assert torch.equal(found, torch.full((8, 8), 32.0, dtype=torch.bfloat16))
