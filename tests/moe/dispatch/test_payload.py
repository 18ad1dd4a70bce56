"""Rows in 8 bits: never further off than their formats say, and on the wire as long as promised."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe.dispatch.payload import Payload, pack_rows, rounded_rows, row_bytes, unpack_rows

KINDS: list[Payload] = ["int8", "float8_e4m3fn"]


def bound(rows: Tensor, payload: Payload) -> Tensor:
    """Largest error of each value; a few float32 roundings of value and scale on top."""
    largest = rows.abs().amax(dim=1, keepdim=True)
    exact = rows.abs()
    slack = 4 * 2.0**-24 * exact
    if payload == "int8":
        return largest / 254 + slack
    # Half a step of 3 bits behind the first one; below 2^-6 steps are of one size, 2^-9.
    return torch.maximum(exact / 16, largest / 448 * 2.0**-10) + slack


@given(
    payload=st.sampled_from(KINDS),
    num_rows=st.integers(0, 6),
    hidden_size=st.integers(1, 33),
    exponent=st.integers(-60, 60),
    seed=st.integers(0, 99),
)
def test_error_is_below_its_bound(
    payload: Payload, num_rows: int, hidden_size: int, exponent: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Values of very different size in one row.
    spread = torch.randn(num_rows, hidden_size, generator=generator) * 4
    rows = torch.randn(num_rows, hidden_size, generator=generator) * spread.exp2()
    rows *= 2.0**exponent
    packed = pack_rows(rows, payload=payload)
    assert packed.dtype == torch.uint8
    assert packed.shape == (num_rows, hidden_size + 4)
    assert row_bytes(hidden_size, payload=payload, dtype=rows.dtype) == hidden_size + 4
    found = unpack_rows(packed, payload=payload, dtype=torch.float64)
    if num_rows:
        assert bool(((found - rows.double()).abs() <= bound(rows.double(), payload)).all())
    # The largest value of a row has the smallest error, and rounding again changes nothing.
    once = rounded_rows(rows, payload=payload)
    torch.testing.assert_close(rounded_rows(once, payload=payload), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("payload", KINDS)
def test_zeros_tiny_values_and_what_is_not_finite(payload: Payload) -> None:
    rows = torch.tensor([[0.0, 0.0], [1e-42, -1e-42], [1.0, torch.inf], [torch.nan, 1.0]])
    found = rounded_rows(rows, payload=payload)
    assert found[0].tolist() == [0.0, 0.0]
    assert float(found[1].abs().max()) <= 1e-38
    # A step with such values is refused, so they must not look like numbers.
    assert not found[2].isfinite().all()
    assert not found[3].isfinite().all()


def test_rows_as_they_are() -> None:
    rows = torch.randn(3, 5, dtype=torch.bfloat16)
    assert rounded_rows(rows, payload="none") is rows
    assert row_bytes(5, payload="none", dtype=rows.dtype) == 10
