"""Figures of expert load: their ends, their invariances, and their definitions written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe.expert_load import (
    dropped_share,
    expert_shares,
    load_entropy,
    max_over_mean,
    specialisation,
    top_share,
)

EVEN = torch.full((3, 8), 5)
ONE_EXPERT = torch.tensor([[0, 0, 12, 0]])


def random_counts(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 50, shape, generator=generator)


def test_an_even_load_and_one_expert_for_all() -> None:
    assert max_over_mean(EVEN).tolist() == pytest.approx([1, 1, 1])
    assert load_entropy(EVEN).tolist() == pytest.approx([1, 1, 1])
    assert max_over_mean(ONE_EXPERT).tolist() == [4.0]
    assert load_entropy(ONE_EXPERT).tolist() == [0.0]


def test_no_token_at_all() -> None:
    none = torch.zeros(2, 4, dtype=torch.int64)
    for figure in (expert_shares(none), max_over_mean(none), load_entropy(none)):
        assert figure.abs().sum() == 0
    assert dropped_share(none, none).tolist() == [0, 0]
    assert specialisation(none[None]).tolist() == [0]
    assert load_entropy(torch.tensor([[7]])).tolist() == [1.0]


@given(st.integers(0, 1000))
def test_entropy_is_that_of_its_definition(seed: int) -> None:
    counts = random_counts(seed, 6) + 1
    shares = [count / int(counts.sum()) for count in counts.tolist()]
    expected = -sum(q * math.log(q) for q in shares) / math.log(6)
    assert float(load_entropy(counts)) == pytest.approx(expected, abs=1e-12)
    assert float(max_over_mean(counts)) == pytest.approx(max(shares) * 6)


def test_dropped_share() -> None:
    computed = torch.tensor([[3, 3, 2], [4, 4, 2]])
    demand = torch.tensor([[3, 5, 2], [4, 4, 2]])
    assert dropped_share(computed, demand).tolist() == pytest.approx([0.2, 0.0])


def test_specialisation_from_none_to_full() -> None:
    alike = torch.tensor([[4, 2, 2], [40, 20, 20], [2, 1, 1]])
    apart = torch.tensor([[9, 0, 0], [0, 70, 0], [0, 0, 1]])
    assert float(specialisation(alike)) == pytest.approx(0, abs=1e-12)
    assert float(specialisation(apart)) == pytest.approx(1 - 1 / 3)
    assert float(top_share(apart, topk=1)) == 1.0
    assert float(top_share(alike, topk=1)) == 0.5


@given(st.integers(0, 1000), st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_specialisation_asks_for_shares_only(seed: int, factors: list[int]) -> None:
    counts = random_counts(seed, 3, 5) + 1
    more_text = counts * torch.tensor(factors)[:, None]
    assert float(specialisation(more_text)) == pytest.approx(float(specialisation(counts)))
    q = counts / counts.sum(dim=1, keepdim=True)
    distances = [sum(abs(float(x)) for x in row) / 2 for row in q - q.mean(dim=0)]
    assert float(specialisation(counts)) == pytest.approx(sum(distances) / 3, abs=1e-6)
    assert 0 <= float(specialisation(counts)) <= 2 / 3


def test_domains_without_text_are_left_out() -> None:
    counts = random_counts(1, 2, 5) + 1
    with_empty = torch.cat([counts, torch.zeros(1, 5, dtype=torch.int64)])
    assert float(specialisation(with_empty)) == pytest.approx(float(specialisation(counts)))
    assert float(top_share(with_empty, topk=2)) == pytest.approx(float(top_share(counts, topk=2)))
