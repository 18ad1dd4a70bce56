"""The gate against its formula; the z-loss and how it is attached."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.router import count_tokens, router_logits, softmax_topk, z_loss
from moe.side_loss import attach_loss


@given(
    num_tokens=st.integers(0, 9),
    num_experts=st.integers(1, 7),
    topk=st.integers(1, 7),
    is_renormalised=st.booleans(),
    scaling_factor=st.sampled_from([1.0, 2.5]),
    seed=st.integers(0, 99),
)
def test_choice_and_weights_are_the_formula(
    num_tokens: int,
    num_experts: int,
    topk: int,
    is_renormalised: bool,
    scaling_factor: float,
    seed: int,
) -> None:
    topk = min(topk, num_experts)
    logits = torch.randn(
        num_tokens, num_experts, generator=torch.Generator().manual_seed(seed)
    ).mul(3.0)
    routing = softmax_topk(
        logits, topk=topk, is_renormalised=is_renormalised, scaling_factor=scaling_factor
    )
    assert routing.num_tokens == num_tokens
    assert routing.topk == topk
    assert routing.num_experts == num_experts
    assert routing.counts.tolist() == [
        int((routing.experts == expert).sum()) for expert in range(num_experts)
    ]
    for row, chosen, weights in zip(
        logits.tolist(), routing.experts.tolist(), routing.weights.tolist(), strict=True
    ):
        likeliest = sorted(range(num_experts), key=lambda i: -row[i])[:topk]
        assert chosen == likeliest
        probability = [math.exp(x) / sum(math.exp(y) for y in row) for x in row]
        divisor = sum(probability[i] for i in likeliest) if is_renormalised else 1.0
        expected = [scaling_factor * probability[i] / divisor for i in likeliest]
        assert weights == pytest.approx(expected, rel=1e-5)


def test_renormalised_weights_are_the_softmax_of_the_chosen_logits() -> None:
    logits = torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
    routing = softmax_topk(logits, topk=3)
    expected = logits.gather(1, routing.experts).softmax(dim=-1)
    torch.testing.assert_close(routing.weights, expected)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(routing.weights, logits, grad),
        torch.autograd.grad(expected, logits, grad),
    )


def test_one_renormalised_expert_teaches_the_router_nothing() -> None:
    # Why config_check refuses topk 1 without moe_router_pre_softmax.
    logits = torch.randn(5, 4, requires_grad=True)
    routing = softmax_topk(logits, topk=1)
    (grad,) = torch.autograd.grad(routing.weights.sum(), logits)
    assert float(grad.abs().max()) <= 1e-7


def test_logits_are_float32_whatever_the_tokens_are() -> None:
    tokens = torch.randn(6, 16).bfloat16().requires_grad_()
    weight = torch.randn(4, 16).bfloat16().requires_grad_()
    logits = router_logits(tokens, weight)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, tokens.float() @ weight.float().T)
    grads = torch.autograd.grad(logits.sum(), (tokens, weight))
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.bfloat16]


def test_counts_of_nobody() -> None:
    assert count_tokens(torch.empty(0, 2, dtype=torch.int64), num_experts=3).tolist() == [0, 0, 0]


def test_z_loss_is_a_sum_over_tokens() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64)
    expected = sum(math.log(sum(math.exp(x) for x in row)) ** 2 for row in logits.tolist())
    assert float(z_loss(logits)) == pytest.approx(expected)
    assert float(z_loss(logits)) == pytest.approx(float(z_loss(logits[:2]) + z_loss(logits[2:])))
    assert float(z_loss(logits[:0])) == 0.0


def test_an_attached_loss_only_adds_its_gradient() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    carried = attach_loss(logits, 0.1 * z_loss(logits))
    assert torch.equal(carried, logits)
    (found,) = torch.autograd.grad(carried.sin().sum(), logits)
    (wanted,) = torch.autograd.grad(logits.sin().sum() + 0.1 * z_loss(logits), logits)
    torch.testing.assert_close(found, wanted)
