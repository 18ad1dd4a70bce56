"""Experts choose tokens: as many each as it may, those with the best scores."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.gate.expert_choice import expert_choice


@given(
    num_tokens=st.integers(0, 9),
    num_experts=st.integers(1, 5),
    capacity=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_each_expert_takes_its_best_tokens(
    num_tokens: int, num_experts: int, capacity: int, seed: int
) -> None:
    capacity = min(capacity, num_tokens)
    scores = torch.rand(
        num_tokens, num_experts, generator=torch.Generator().manual_seed(seed)
    ).requires_grad_()
    experts, weights = expert_choice(scores, capacity=capacity)
    for expert in range(num_experts):
        column = scores.detach()[:, expert].tolist()
        best = sorted(range(num_tokens), key=lambda t: -column[t])[:capacity]
        taken = (experts == expert).any(dim=-1).nonzero().flatten().tolist()
        assert taken == sorted(best)
    for token, (row, weight) in enumerate(zip(experts.tolist(), weights.tolist(), strict=True)):
        chosen = [expert for expert in row if expert < num_experts]
        assert len(set(chosen)) == len(chosen)
        values = scores[token, chosen].tolist()
        assert values == sorted(values, reverse=True), "best first, nowhere last"
        assert weight == values + [0.0] * (len(row) - len(chosen))
    (grad,) = torch.autograd.grad(weights.sum(), scores)
    is_chosen = torch.zeros(num_tokens, num_experts + 1).scatter_(1, experts, 1.0)
    assert torch.equal(grad, is_chosen[:, :num_experts])
