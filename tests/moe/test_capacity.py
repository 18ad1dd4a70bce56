"""A limit on each expert's tokens: none above it, none refused below it, and the right ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe.capacity import DropPolicy, expert_capacity, within_capacity
from moe.gate.random_numbers import random_bits, token_keys
from moe.router import RouterOptions, route

POLICIES: tuple[DropPolicy, ...] = ("probs", "position", "random")


def keys_of(num_tokens: int, *, step: int = 0) -> Tensor:
    return token_keys(torch.arange(num_tokens), seed=7, step=step, layer=0)


@given(
    num_tokens=st.integers(0, 20),
    num_experts=st.integers(1, 5),
    topk=st.integers(1, 3),
    factor=st.sampled_from([0.1, 0.5, 1.0, 1.25, 9.0]),
    policy=st.sampled_from(POLICIES),
    skew=st.sampled_from([0.0, 5.0]),
    seed=st.integers(0, 99),
)
def test_a_choice_is_kept_or_dropped_and_no_expert_is_overfull(
    num_tokens: int,
    num_experts: int,
    topk: int,
    factor: float,
    policy: DropPolicy,
    skew: float,
    seed: int,
) -> None:
    topk = min(topk, num_experts)
    logits = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    logits[:, 0] += skew
    keys = keys_of(num_tokens)
    free = route(logits, RouterOptions(topk=topk))
    options = RouterOptions(topk=topk, capacity_factor=factor, drop_policy=policy)
    found = route(logits, options, keys=keys)
    capacity = math.ceil(factor * num_tokens * topk / num_experts)
    assert found.dropped is not None
    assert torch.equal(found.demand, free.counts), "every choice is counted once"
    assert found.counts.tolist() == [min(count, capacity) for count in free.counts.tolist()]
    assert torch.equal(found.wanted, free.experts)
    assert found.num_rows() == int((found.experts < num_experts).sum())
    kept = found.experts == free.experts
    assert bool((kept | (found.experts == num_experts)).all())
    assert torch.equal(found.weights, torch.where(kept, free.weights, 0.0)), "weights stay"
    assert torch.equal(found.probabilities, free.probabilities)
    # Who was refused comes after everybody who was taken.
    lots = random_bits(keys, topk)
    for expert in range(num_experts):
        places = (free.experts == expert).nonzero().tolist()

        def turn(place: list[int]) -> tuple[float, ...]:
            token, j = place
            if policy == "probs":
                return (-float(free.weights[token, j]), token)
            return (token,) if policy == "position" else (int(lots[token, j]),)

        served = sorted(places, key=turn)[:capacity]
        taken = [place for place in places if bool(kept[place[0], place[1]])]
        assert sorted(taken) == sorted(served)


def test_lots_are_drawn_again_in_each_step_and_spare_nobody() -> None:
    num_tokens, num_steps = 40, 200
    experts, weights = torch.zeros(num_tokens, 1, dtype=torch.int64), torch.ones(num_tokens, 1)

    def taken(step: int) -> Tensor:
        return within_capacity(
            experts,
            weights,
            num_experts=1,
            capacity=10,
            policy="random",
            keys=keys_of(num_tokens, step=step),
        ).flatten()

    assert torch.equal(taken(0), taken(0))
    times = torch.stack([taken(step) for step in range(num_steps)]).sum(dim=0)
    # Binomial with p = 1/4 over 200 steps: five standard deviations.
    assert float((times - num_steps / 4).abs().max()) < 5 * (num_steps * 3 / 16) ** 0.5


def test_dropped_shares_of_a_known_load() -> None:
    # 6, 2, 0 and 0 of 8 tokens, room for 2 each: 4 of 8 choices are lost.
    logits = torch.full((8, 4), 0.0)
    logits[:6, 0], logits[6:, 1] = 5.0, 5.0
    options = RouterOptions(topk=1, capacity_factor=1.0, is_renormalised=False)
    found = route(logits, options)
    assert found.counts.tolist() == [2, 2, 0, 0]
    assert found.dropped is not None
    assert found.dropped.tolist() == [4, 0, 0, 0]
    assert route(logits, options, is_limited=False).dropped is None


def test_capacity_is_rounded_up() -> None:
    assert expert_capacity(1, topk=2, num_experts=64, factor=1.0) == 1
    assert expert_capacity(100, topk=2, num_experts=8, factor=1.25) == 32
    assert expert_capacity(0, topk=2, num_experts=8, factor=1.25) == 0


def test_lots_need_keys() -> None:
    with pytest.raises(ValueError, match="a key for each token"):
        route(
            torch.zeros(2, 2),
            RouterOptions(topk=1, capacity_factor=1.0, drop_policy="random"),
        )
