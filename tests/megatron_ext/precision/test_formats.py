"""Formats against ml_dtypes, an independent library; rounding at random against its expectation."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_ext.precision.element_format import E2M1, E4M3, E5M2, ElementFormat
from megatron_ext.precision.formats import code_values, decode, encode, round_to
from megatron_ext.precision.packing import pack, pack_bits, unpack, unpack_bits
from megatron_ext.precision.random_bits import derive_seed, random_words, uniform_numbers
from megatron_ext.precision.scales import cast_e8m0, decode_e8m0, encode_e8m0

ELEMENTS = {
    "float8_e4m3fn": E4M3,
    "float8_e5m2": E5M2,
    "float4_e2m1fn": E2M1,
}


def every_bfloat16() -> Tensor:
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def some_float32() -> Tensor:
    """Any bits, and more of those near the formats' values."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(-(2**31), 2**31, (1 << 18,), generator=generator)
    near = torch.randn(1 << 18, generator=generator) * torch.exp2(
        torch.randint(-18, 18, (1 << 18,), generator=generator).float()
    )
    return torch.cat((words.to(torch.int32).view(torch.float32), near))


def half_way_between(element: ElementFormat) -> Tensor:
    """Ties, and their float32 neighbours."""
    values = code_values(element)
    values = torch.sort(values[values.isfinite()]).values
    ties = (values[1:] + values[:-1]) / 2
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    return torch.cat((ties, torch.nextafter(ties, up), torch.nextafter(ties, down)))


@pytest.mark.parametrize("name", ELEMENTS)
def test_casts_agree_with_ml_dtypes(name: str) -> None:
    element, dtype = ELEMENTS[name], getattr(ml_dtypes, name)
    for values in (every_bfloat16(), some_float32(), half_way_between(element)):
        with np.errstate(invalid="ignore"):
            expected = values.numpy().astype(dtype).view(np.uint8)
        found = encode(values, element, overflow="special").numpy()
        is_nan = np.isnan(values.numpy())
        assert np.array_equal(found[~is_nan], expected[~is_nan])
        # Which NaN, and what stands for NaN where there is none, is the library's own choice.
        assert np.array_equal(found[is_nan] & 0x7, expected[is_nan] & 0x7)


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_code_goes_round(name: str) -> None:
    element = ELEMENTS[name]
    codes = torch.arange(1 << element.bits, dtype=torch.uint8)
    values = decode(codes, element)
    with np.errstate(invalid="ignore"):
        expected = codes.numpy().view(getattr(ml_dtypes, name)).astype(np.float32)
    assert np.array_equal(values.numpy(), expected, equal_nan=True)
    is_finite = values.isfinite()
    assert torch.equal(encode(values, element)[is_finite], codes[is_finite])
    assert float(values[is_finite].max()) == element.max_value
    assert element.max_exponent == math.floor(math.log2(element.max_value))


def test_every_scale_code_goes_round() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = decode_e8m0(codes)
    expected = codes.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert np.array_equal(values.numpy(), expected, equal_nan=True)
    assert torch.equal(encode_e8m0(values), codes)
    for numbers in (every_bfloat16(), some_float32()):
        # Below 2^-127 the library rounds to 2^-127, and so do we.
        with np.errstate(invalid="ignore"):
            found = numbers.numpy().astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
        assert np.array_equal(cast_e8m0(numbers).numpy(), found)


@pytest.mark.parametrize("name", ELEMENTS)
def test_too_large_becomes_the_largest(name: str) -> None:
    element = ELEMENTS[name]
    values = torch.tensor([math.inf, -math.inf, 3e38, -3e38, element.max_value * 1.001])
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    assert torch.equal(round_to(values, element), signs * element.max_value)
    assert torch.equal(decode(encode(values, element), element), signs * element.max_value)
    assert round_to(torch.tensor(math.nan), element).isnan()
    almost_one = torch.full((5,), 1 - 2.0**-24)
    assert torch.equal(round_to(values, element, almost_one), signs * element.max_value)


@pytest.mark.parametrize("name", ELEMENTS)
def test_rounding_at_random_is_unbiased(name: str) -> None:
    """Each x lies between neighbours a < b and must become b with chance p = (x - a) / (b - a).

    Counts over n draws are binomial: within 5 standard deviations, sqrt(n p (1 - p)), for each of
    200 numbers. A draw has 24 bits, which moves p by less than 2^-24.
    """
    element, num_draws = ELEMENTS[name], 20_000
    generator = torch.Generator().manual_seed(3)
    numbers = (torch.rand(200, generator=generator) * 2 - 1) * element.max_value
    numbers[:100] *= 2.0**-6
    uniform = uniform_numbers(5, (num_draws, 200))
    rounded = round_to(numbers.expand(num_draws, -1).contiguous(), element, uniform)
    low = round_to(numbers.abs(), element, torch.zeros(200))
    high = round_to(numbers.abs(), element, torch.full((200,), 1 - 2.0**-24))
    assert ((rounded.abs() == low) | (rounded.abs() == high)).all()
    chance = (numbers.abs() - low) / (high - low).clamp(min=1e-30)
    ups = (rounded.abs() == high).sum(0)
    deviation = (num_draws * chance * (1 - chance)).sqrt()
    assert ((ups - num_draws * chance).abs() <= 5 * deviation + 1).all()
    assert torch.equal(torch.signbit(rounded[0]), torch.signbit(numbers))


def test_random_numbers_are_a_function_of_seed_and_position() -> None:
    whole = uniform_numbers(9, (1000, 7))
    assert torch.equal(uniform_numbers(9, (1000, 7)), whole)
    assert torch.equal(uniform_numbers(9, (10, 7)), whole[:10])
    assert not torch.equal(uniform_numbers(10, (1000, 7)), whole)
    # Fixed for all times and backends.
    assert random_words(1, 4).tolist() == [1492470133, 3529208806, 3405767568, 3831518755]
    assert derive_seed(1, 2) != derive_seed(2, 1)
    # Mean and variance of a uniform number, within 5 standard deviations.
    many = uniform_numbers(11, (1 << 20,))
    assert abs(float(many.mean()) - 0.5) < 5 * (1 / 12) ** 0.5 / 2**10
    assert abs(float(many.var()) - 1 / 12) < 5 * (1 / 180) ** 0.5 / 2**10
    # Neighbours, and the same element under the next seed, are not correlated.
    other = uniform_numbers(12, (1 << 20,))
    for left, right in ((many[1:], many[:-1]), (many, other)):
        correlation = float(((left - 0.5) * (right - 0.5)).mean()) * 12
        assert abs(correlation) < 5 / 2**10


def test_packing_is_torchs() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(3, 2)
    packed = pack(codes)
    assert packed.shape == (3, 16)
    assert torch.equal(unpack(packed), codes)
    # torch counts pairs as elements: the first in the lower half, as in ml_dtypes' uint4 layout.
    assert packed.view(torch.float4_e2m1fn_x2).shape == (3, 16)
    assert packed[0, 0] == 0x10
    with pytest.raises(ValueError, match="pairs"):
        pack(codes[:, :3])
    mask = codes % 3 == 0
    assert torch.equal(unpack_bits(pack_bits(mask)), mask)
    assert pack_bits(mask).shape == (3, 4)
    with pytest.raises(ValueError, match="by eight"):
        pack_bits(mask[:, :3])
