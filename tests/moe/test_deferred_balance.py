"""The gradient computed after the batch is autograd's over the whole batch, however it was cut."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.balance import balance_loss, excess_load
from moe.deferred_balance import Gate, GateInputs, push_back
from moe.router import count_tokens, router_logits, softmax_topk
from tests.rank_pool import Ranks

NUM_EXPERTS, HIDDEN_SIZE = 5, 8


def tensors(seed: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the gate's weight, and w of a made-up load."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator)
    weight = torch.randn(NUM_EXPERTS, HIDDEN_SIZE, generator=generator).requires_grad_()
    excess = excess_load(torch.randint(0, 50, (NUM_EXPERTS,), generator=generator))
    return tokens, weight, excess


def gate_of(weight: Tensor) -> Gate:
    return lambda part: router_logits(part, weight).softmax(dim=-1)


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
    (found,) = inputs.gradient(gate_of(weight), [weight], excess)
    torch.testing.assert_close(
        found.double(), wanted, rtol=0, atol=1e-6 * max(1.0, float(wanted.abs().max()))
    )
    inputs.clear()
    assert inputs.num_bytes == 0
    assert weight.grad is None


def shares(world_sizes: Sequence[int]) -> dict[int, Tensor]:
    """For each number of ranks that this one belongs to, dL/dW of all of them."""
    found = {}
    for size in world_sizes:
        group = dist.new_group(list(range(size)))
        if dist.get_rank() >= size:
            continue
        generator = random.Random(size)
        # Unequal parts of ranks, some of them empty, in unequal micro-batches.
        borders = sorted(generator.choices(range(102), k=size - 1))
        tokens, weight, _ = tensors(size, 101)
        start, end = ([0, *borders, 101][dist.get_rank() + i] for i in (0, 1))
        cuts = sorted(generator.choices(range(end - start + 1), k=dist.get_rank() % 4))
        inputs, counts = GateInputs(), torch.zeros(NUM_EXPERTS, dtype=torch.int64)
        for part in tokens[start:end].tensor_split(cuts):
            inputs.add(part)
            counts += count_tokens(softmax_topk(part @ weight.T, topk=2).experts, num_experts=5)
        dist.all_reduce(counts, group=group)
        (share,) = inputs.gradient(gate_of(weight), [weight], excess_load(counts))
        dist.all_reduce(share, group=group)
        found[size] = share / len(tokens)
    return found


def test_any_number_of_ranks_gives_the_formula(ranks: Ranks) -> None:
    """2501.11873, Eq. 2 over the whole batch, for each world size from 1 to 8."""
    sizes = range(1, 9)
    reports = ranks.run(8, shares, sizes)
    for size in sizes:
        tokens, weight, _ = tensors(size, 101)
        exact = weight.detach().double().requires_grad_()
        logits = tokens.double() @ exact.T
        chosen = logits.topk(2, dim=-1).indices.reshape(-1)
        f = torch.bincount(chosen, minlength=NUM_EXPERTS).double() / len(chosen)
        loss = NUM_EXPERTS * (f * logits.softmax(dim=-1).mean(dim=0)).sum()
        (wanted,) = torch.autograd.grad(loss, exact)
        for report in reports[:size]:
            difference = float((report[size].double() - wanted).norm() / wanted.norm())
            assert difference <= 1e-6, f"{size} ranks: {difference:.2e}"


def test_inputs_are_kept_as_they_are() -> None:
    tokens = torch.randn(4, HIDDEN_SIZE, dtype=torch.bfloat16, requires_grad=True)
    carried = tokens * 1.0
    inputs = GateInputs()
    inputs.add(carried)
    assert inputs.num_bytes == 4 * HIDDEN_SIZE * 2
    (kept,) = inputs._parts
    assert kept.data_ptr() == carried.data_ptr()
    assert kept.grad_fn is None


@pytest.mark.gpu
def test_inputs_on_the_host_leave_the_device() -> None:
    tokens, weight, excess = (tensor.detach().cuda() for tensor in tensors(3, 4096))
    weight.requires_grad_()
    gradients = []
    for on_host in (False, True):
        inputs = GateInputs(on_host=on_host)
        for part in torch.split(tokens, 1000):
            inputs.add(part * 1.0)
        assert {part.device.type for part in inputs._parts} == {"cpu" if on_host else "cuda"}
        assert all(part.is_pinned() for part in inputs._parts) == on_host
        gradients += inputs.gradient(gate_of(weight), [weight], excess)
    assert torch.equal(*gradients)


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
