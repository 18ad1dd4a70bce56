"""Random numbers that belong to tokens: the same in any cut, and random."""

from __future__ import annotations

import pytest
import torch

from moe.gate.random_numbers import normal, random_bits, token_keys

IDS = torch.arange(3000) + (5 << 32)
MASK = (1 << 64) - 1


def mix(number: int) -> int:
    """SplitMix64's finaliser, in Python's integers."""
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & MASK
    return number ^ (number >> 31)


def test_bits_are_those_of_splitmix64() -> None:
    keys = torch.tensor([0, 1, -1, 2**62, -(2**63)])
    found = random_bits(keys, 3).tolist()
    for key, row in zip(keys.tolist(), found, strict=True):
        states = [(key + (j + 1) * 0x9E3779B97F4A7C15) & MASK for j in range(3)]
        assert row == [mix(state) & (MASK >> 1) for state in states]


def test_any_part_of_the_tokens_draws_the_same() -> None:
    keys = token_keys(IDS, seed=1, step=2, layer=3)
    whole = normal(keys, 7)
    order = torch.randperm(len(IDS))
    parts = [
        normal(token_keys(ids, seed=1, step=2, layer=3), 7)
        for ids in torch.split(IDS[order], [1, 999, 2000])
    ]
    assert torch.equal(torch.cat(parts), whole[order])


@pytest.mark.parametrize("other", [{"seed": 9}, {"step": 9}, {"layer": 9}], ids=str)
def test_seed_step_and_layer_each_change_all_numbers(other: dict[str, int]) -> None:
    place = {"seed": 1, "step": 2, "layer": 3}
    first = random_bits(token_keys(IDS, **place), 4)
    second = random_bits(token_keys(IDS, **place | other), 4)
    assert not bool((first == second).any())


def test_numbers_are_standard_normal_and_independent() -> None:
    numbers = normal(token_keys(IDS, seed=0, step=0, layer=0), 8).double()
    assert bool(numbers.isfinite().all())
    count = numbers.numel()
    # Five standard errors each.
    assert abs(float(numbers.mean())) < 5 / count**0.5
    assert abs(float(numbers.square().mean()) - 1) < 5 * (2 / count) ** 0.5
    assert abs(float(numbers.pow(4).mean()) - 3) < 5 * (96 / count) ** 0.5
    correlation = numbers.T @ numbers / len(IDS) - torch.eye(8)
    assert float(correlation.fill_diagonal_(0.0).abs().max()) < 5 / len(IDS) ** 0.5
    neighbours = (numbers[1:] * numbers[:-1]).mean()
    assert abs(float(neighbours)) < 5 / count**0.5
