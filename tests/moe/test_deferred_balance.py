"""The gradient computed after the batch is autograd's over the whole batch, however it was cut."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.balance import balance_loss, excess_load
from moe.deferred_balance import GateInputs, push_back
from moe.router import router_logits

NUM_EXPERTS, HIDDEN_SIZE = 5, 8


def tensors(seed: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the gate's weight, and w of a made-up load."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator)
    weight = torch.randn(NUM_EXPERTS, HIDDEN_SIZE, generator=generator).requires_grad_()
    excess = excess_load(torch.randint(0, 50, (NUM_EXPERTS,), generator=generator))
    return tokens, weight, excess


@settings(max_examples=40)
@given(st.lists(st.integers(0, 12), max_size=6), st.integers(0, 2**31))
def test_any_cut_gives_the_gradient_of_the_whole(lengths: list[int], seed: int) -> None:
    tokens, weight, excess = tensors(seed, sum(lengths))
    exact = weight.detach().double().requires_grad_()
    loss = balance_loss((tokens.double() @ exact.T).softmax(dim=-1), excess)
    (wanted,) = torch.autograd.grad(loss, exact)
    inputs = GateInputs()
    for part in torch.split(tokens, lengths) if lengths else ():
        inputs.add(part)
    assert inputs.num_bytes == tokens.nbytes
    (found,) = inputs.gradient(
        lambda part: router_logits(part, weight).softmax(dim=-1), [weight], excess
    )
    torch.testing.assert_close(
        found.double(), wanted, rtol=0, atol=1e-6 * max(1.0, float(wanted.abs().max()))
    )
    inputs.clear()
    assert inputs.num_bytes == 0
    assert weight.grad is None


def test_inputs_are_kept_as_they_are() -> None:
    tokens = torch.randn(4, HIDDEN_SIZE, dtype=torch.bfloat16, requires_grad=True)
    carried = tokens * 1.0
    inputs = GateInputs()
    inputs.add(carried)
    assert inputs.num_bytes == 4 * HIDDEN_SIZE * 2
    (kept,) = inputs._parts
    assert kept.data_ptr() == carried.data_ptr()
    assert kept.grad_fn is None


def test_push_back_reaches_the_tokens_and_nothing_else() -> None:
    tokens, weight, excess = tensors(3, 10)
    tokens.requires_grad_()

    def gate(part: Tensor) -> Tensor:
        return router_logits(part, weight).softmax(dim=-1)

    def through(part: Tensor) -> Tensor:
        return (router_logits(part, weight).sin()).sum()

    plain_tokens, plain_weight = torch.autograd.grad(through(tokens), [tokens, weight])
    (of_loss,) = torch.autograd.grad(balance_loss(gate(tokens), excess), tokens)
    asked: list[int] = []

    def weights() -> Tensor:
        asked.append(1)
        return excess

    loss = through(push_back(tokens, gate, weights))
    assert not asked, "w may change until backward"
    found_tokens, found_weight = torch.autograd.grad(loss, [tokens, weight])
    torch.testing.assert_close(found_tokens, plain_tokens + of_loss)
    assert torch.equal(found_weight, plain_weight)
    # A rank may have nothing.
    empty = tokens[:0].detach().requires_grad_()
    (grad,) = torch.autograd.grad(through(push_back(empty, gate, weights)), empty)
    assert grad.shape == empty.shape
    assert len(asked) == 1
