"""The balance losses are the formulas of the papers, and do not care how tokens are ordered."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.balance import balance_loss, device_excess, excess_load, sequence_balance_loss
from moe.router import count_tokens


def load_balancing_loss(probabilities: Tensor, experts: Tensor) -> Tensor:
    """LBL = E sum_i f_i P_i (2501.11873, Eq. 2) as it is written there."""
    num_tokens, num_experts = probabilities.shape
    loss = probabilities.new_zeros(())
    for i in range(num_experts):
        f_i = (experts == i).sum() / experts.numel()
        loss = loss + num_experts * f_i * probabilities[:, i].sum() / num_tokens
    return loss


def case(num_tokens: int, num_experts: int, topk: int, seed: int) -> tuple[Tensor, Tensor]:
    """Float64 logits that lean towards some experts, and the choice."""
    generator = torch.Generator().manual_seed(seed)
    lean = torch.randn(num_experts, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    logits = (noise + lean).requires_grad_()
    return logits, logits.topk(topk, dim=-1).indices


def check_equal(found: Tensor, expected: Tensor) -> None:
    # w is float32, all else float64, where an even load leaves rounding errors of an exact zero.
    atol = max(1e-6 * float(expected.detach().abs().max()), 1e-12)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(2, 9), st.integers(0, 2**31))
def test_loss_and_gradient_are_the_formula(num_tokens: int, num_experts: int, seed: int) -> None:
    logits, experts = case(num_tokens, num_experts, 2, seed)
    wanted = num_tokens * load_balancing_loss(logits.softmax(dim=-1), experts)
    excess = excess_load(count_tokens(experts, num_experts=num_experts))
    found = num_tokens + balance_loss(logits.softmax(dim=-1), excess)
    check_equal(found, wanted)
    (grad,) = torch.autograd.grad(found, logits)
    check_equal(grad, torch.autograd.grad(wanted, logits)[0])


def test_nearly_even_load_keeps_its_digits() -> None:
    """In float32, E f_i near 1 would lose what w is made of."""
    counts = torch.tensor([1_000_001, 999_999, 1_000_000, 1_000_000])
    logits = torch.randn(50, 4, requires_grad=True)
    exact = counts.double() / 1e6 - 1.0
    wanted = torch.autograd.grad((logits.double().softmax(dim=-1) @ exact).sum(), logits)[0]
    found = torch.autograd.grad(balance_loss(logits.softmax(dim=-1), excess_load(counts)), logits)[
        0
    ]
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))


def test_even_and_empty_have_no_excess() -> None:
    assert torch.equal(excess_load(torch.tensor([7, 7, 7])), torch.zeros(3))
    assert torch.equal(excess_load(torch.zeros(3, dtype=torch.int64)), torch.zeros(3))
    # All choices on one of E experts: w = E - 1 there and -1 elsewhere.
    assert torch.equal(excess_load(torch.tensor([0, 5, 0])), torch.tensor([-1.0, 2.0, -1.0]))


def test_device_loss_is_the_formula() -> None:
    """DeepSeekMoE, Eq. 15-17: sum over devices of f'_d P'_d."""
    logits, experts = case(30, 6, 2, seed=5)
    probabilities = logits.softmax(dim=-1)
    load = count_tokens(experts, num_experts=6).double() * 6 / experts.numel()
    mean = probabilities.mean(dim=0)
    wanted = sum(load[d : d + 2].mean() * mean[d : d + 2].sum() for d in (0, 2, 4))
    excess = excess_load(count_tokens(experts, num_experts=6))
    found = balance_loss(probabilities, device_excess(excess, num_groups=3)) / 30 + 1
    check_equal(found, torch.as_tensor(wanted))
    # A device for each expert is the expert-level loss; one for all has nothing to balance.
    assert torch.equal(device_excess(excess, num_groups=6), excess)
    assert float(device_excess(excess, num_groups=1).abs().max()) < 1e-6
    with pytest.raises(ValueError, match="6 experts cannot be divided into 4 groups"):
        device_excess(excess, num_groups=4)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 2**31))
def test_sequences_are_batches_of_their_own(lengths: list[int], seed: int) -> None:
    logits, experts = case(sum(lengths), 5, 2, seed)
    probabilities = logits.softmax(dim=-1)
    wanted = logits.sum() * 0
    for own_probabilities, own_experts in zip(
        torch.split(probabilities, lengths), torch.split(experts, lengths), strict=True
    ):
        if n := len(own_experts):
            wanted = wanted + n * (load_balancing_loss(own_probabilities, own_experts) - 1.0)
    sequences = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    found = sequence_balance_loss(probabilities, experts, sequences, num_sequences=len(lengths))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    if sum(lengths):
        grads = [
            torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (found, wanted)
        ]
        check_equal(*grads)


def test_refused_choices_do_not_count_in_a_sequence() -> None:
    probabilities = torch.rand(4, 3, dtype=torch.float64)
    experts = torch.tensor([[0, 3], [1, 2], [3, 3], [3, 0]])
    sequences = torch.tensor([0, 0, 1, 1])
    found = sequence_balance_loss(probabilities, experts, sequences, num_sequences=2)
    excess = torch.stack([excess_load(torch.tensor(c)) for c in ([1, 1, 1], [1, 0, 0])])
    torch.testing.assert_close(found, (probabilities * excess[sequences]).sum())
