from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.data.permutation import derive_seed, permute

SEEDS = st.integers(0, 2**64 - 1)


@given(st.integers(1, 3000), SEEDS)
def test_every_item_comes_once(num_items: int, seed: int) -> None:
    items = permute(np.arange(num_items), num_items, seed)
    assert sorted(items.tolist()) == list(range(num_items))


@given(st.integers(1, 2**62), SEEDS, st.data())
def test_positions_are_computed_by_themselves(
    num_items: int, seed: int, data: st.DataObject
) -> None:
    positions = data.draw(st.lists(st.integers(0, num_items - 1), max_size=20))
    together = permute(positions, num_items, seed)
    alone = [int(permute([position], num_items, seed)[0]) for position in positions]
    assert together.tolist() == alone
    assert all(0 <= item < num_items for item in alone)


@given(st.integers(1, 200), st.lists(SEEDS, min_size=1, max_size=5))
def test_each_position_may_have_its_seed(num_items: int, seeds: list[int]) -> None:
    positions = np.arange(num_items)
    expected = [permute(positions, num_items, seed).tolist() for seed in seeds]
    mixed = permute(
        np.tile(positions, len(seeds)), num_items, np.repeat(np.array(seeds, np.uint64), num_items)
    )
    assert mixed.reshape(len(seeds), num_items).tolist() == expected


@pytest.mark.parametrize("num_items", [5, 24, 1000])
def test_items_are_spread_evenly(num_items: int) -> None:
    """Over many seeds each item stands at the first place equally often (chi-square)."""
    num_seeds = 40 * num_items
    seeds = np.array([derive_seed(i) for i in range(num_seeds)], np.uint64)
    first = permute(np.zeros(num_seeds, np.int64), num_items, seeds)
    counts = np.bincount(first, minlength=num_items)
    chi_square = float(((counts - 40) ** 2 / 40).sum())
    degrees = num_items - 1
    assert abs(chi_square - degrees) < 5 * (2 * degrees) ** 0.5


def test_neighbours_do_not_stay_together() -> None:
    items = permute(np.arange(100_000), 100_000, 7)
    assert (np.abs(np.diff(items)) == 1).mean() < 1e-3
    assert abs(np.corrcoef(np.arange(100_000), items)[0, 1]) < 0.02


def test_seeds_depend_on_all_parts() -> None:
    parts = [(1, 2), (2, 1), (12,), ("corpus", 1, 2), (-1, 2)]
    assert len({derive_seed(*part) for part in parts}) == len(parts)
