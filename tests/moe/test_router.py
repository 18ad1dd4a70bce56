"""The gate against its formula; the z-loss and how it is attached."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.router import RouterOptions, count_tokens, route, router_logits, softmax_topk, z_loss
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


def test_a_bias_moves_the_choice_and_not_the_weights() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
    options = RouterOptions(topk=1, score_function="sigmoid", is_renormalised=False)
    routing = route(logits, options, bias=torch.tensor([0.0, 0.0, 9.0]))
    assert routing.experts.tolist() == [[2]]
    assert routing.weights.item() == 0.5
    assert torch.equal(routing.probabilities, route(logits, options).probabilities)


def test_noise_decides_and_probabilities_are_without() -> None:
    logits, noisy = torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 3.0]])
    routing = route(logits, RouterOptions(topk=1, is_renormalised=False), noisy_logits=noisy)
    assert routing.experts.tolist() == [[2]]
    torch.testing.assert_close(routing.weights, noisy.softmax(dim=-1)[:, 2:])
    torch.testing.assert_close(routing.probabilities, logits.softmax(dim=-1))


def test_choice_within_groups_stays_there() -> None:
    logits = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    routing = route(logits, RouterOptions(topk=4, num_groups=4, group_topk=2))
    groups = (routing.experts // 3).sort(dim=-1).values
    assert all(len(set(row)) == 2 for row in groups.tolist())


def test_expert_choice_loads_all_alike() -> None:
    logits = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    routing = route(logits, RouterOptions(topk=2, is_expert_choice=True, scaling_factor=3.0))
    assert routing.counts.tolist() == [10] * 8
    assert routing.dropped is not None
    assert routing.dropped.tolist() == [0] * 8
    assert count_tokens(routing.experts, num_experts=8).tolist() == [10] * 8
    kept = routing.experts < 8
    scores = 3.0 * logits.softmax(dim=-1)
    expected = scores.gather(1, routing.experts.clamp(max=7)).masked_fill(~kept, 0.0)
    torch.testing.assert_close(routing.weights, expected)


def test_of_no_tokens_nothing_is_chosen() -> None:
    for options in (
        RouterOptions(topk=2),
        RouterOptions(topk=2, is_expert_choice=True),
        RouterOptions(topk=2, capacity_factor=1.0),
    ):
        routing = route(torch.zeros(0, 4), options)
        assert routing.num_tokens == 0
        assert routing.counts.tolist() == [0] * 4
        assert routing.num_rows() == 0
