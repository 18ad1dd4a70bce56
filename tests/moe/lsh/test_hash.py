"""Codes: as the definition says, for any scale, for many sizes, and near rows together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.lsh.buckets import num_buckets
from moe.lsh.hash import codes_of, draw_rotations, hash_rows
from moe.lsh.reference import codes_reference


@given(
    num_rows=st.integers(0, 9),
    hidden_size=st.integers(1, 17),
    num_hashes=st.integers(1, 7),
    hash_dim=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_codes_are_those_of_the_definition(
    num_rows: int, hidden_size: int, num_hashes: int, hash_dim: int, seed: int
) -> None:
    hash_dim = min(hash_dim, hidden_size)
    rotations = draw_rotations(hidden_size, num_hashes=num_hashes, hash_dim=hash_dim, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, hidden_size, generator=generator, dtype=torch.float64)
    codes = hash_rows(rows, rotations.double())
    assert codes.tolist() == codes_reference(rows, rotations).tolist()
    assert all(0 <= code < num_buckets(num_hashes, hash_dim) for code in codes.tolist())
    assert torch.equal(hash_rows(rows * 2.0**-40, rotations.double()), codes)


@pytest.mark.parametrize(("num_hashes", "hash_dim"), [(6, 4), (10, 3), (5, 30)])
def test_rotations_are_orthonormal(num_hashes: int, hash_dim: int) -> None:
    rotations = draw_rotations(32, num_hashes=num_hashes, hash_dim=hash_dim, seed=0)
    blocks = rotations.flatten(0, 1)[None] if num_hashes * hash_dim <= 32 else rotations
    products = blocks @ blocks.transpose(1, 2)
    torch.testing.assert_close(products, torch.eye(products.shape[1]).expand_as(products))
    again = draw_rotations(32, num_hashes=num_hashes, hash_dim=hash_dim, seed=0)
    assert torch.equal(again, rotations)
    other = draw_rotations(32, num_hashes=num_hashes, hash_dim=hash_dim, seed=1)
    assert not torch.equal(other, rotations)


def test_ties_zeros_and_signs_have_a_code() -> None:
    # Equal sizes: the first; 0 is not negative. Digits of base 4, the first hash last.
    projected = torch.tensor([[[0.0, 0.0], [0.0, -0.0]], [[-2.0, 2.0], [1.0, -3.0]]])
    assert codes_of(projected).tolist() == [0, 2 + 3 * 4]


def test_near_rows_meet_more_often() -> None:
    """In 2,000 pairs at several angles, with 3 hashes of 4 directions."""
    rotations = draw_rotations(64, num_hashes=3, hash_dim=4, seed=3)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2000, 64, generator=generator)
    other = torch.randn(2000, 64, generator=generator)
    codes = hash_rows(rows, rotations)
    shares = [
        float((hash_rows(rows + distance * other, rotations) == codes).float().mean())
        for distance in (0.0, 0.1, 0.3, 1.0, 100.0)
    ]
    assert shares[0] == 1.0
    # Unrelated rows meet in one of 8^3 buckets.
    assert shares == sorted(shares, reverse=True)
    assert shares[1] > 0.6
    assert shares[-1] < 0.02


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="no 9 orthogonal directions among 8"):
        draw_rotations(8, num_hashes=1, hash_dim=9, seed=0)
    with pytest.raises(ValueError, match=r"20 hashes of 8 directions make .* buckets"):
        draw_rotations(8, num_hashes=20, hash_dim=8, seed=0)
