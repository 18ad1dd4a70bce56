"""Linear + cross entropy in chunks, its vocabulary on 1, 2 and 4 ranks, against the definition."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext.linear_cross_entropy import linear_cross_entropy
from megatron_ext.linear_cross_entropy_reference import (
    reference_cross_entropy,
    reference_linear_cross_entropy,
)
from megatron_ext.softmax_cross_entropy import Kernel
from tests.megatron_ext.tolerance import assert_as_good_as_plain
from tests.rank_pool import Ranks

HIDDEN_SIZE = 24
# A power of two, so that scaling in backward rounds nothing away.
UPSTREAM = 0.5


@dataclass(frozen=True)
class Case:
    name: str
    num_tokens: int
    vocab_size: int = 252
    max_chunk_tokens: int | None = None
    z_loss_coeff: float = 0.0
    weights: Literal["none", "mask", "any"] = "none"
    scale: float = 3.0
    """Standard deviation of the logits."""
    offset: float = 0.0


CASES = (
    Case("one token", 1),
    Case("no token", 0, z_loss_coeff=1e-2),
    Case("one chunk", 37),
    Case("z-loss", 37, z_loss_coeff=1e-2, weights="any"),
    Case("a masked third", 37, z_loss_coeff=1e-2, weights="mask", max_chunk_tokens=16),
    Case("all different weights", 37, weights="any", max_chunk_tokens=16),
    Case("chunks that fit", 32, max_chunk_tokens=8),
    Case("a last chunk of one", 33, max_chunk_tokens=8, z_loss_coeff=1e-3),
    Case("chunks of one", 5, max_chunk_tokens=1),
    Case("chunks of the default", 1300, weights="mask"),
    # More rows than the torch version holds in cache at once.
    Case("several blocks", 90, vocab_size=20_000, max_chunk_tokens=64, z_loss_coeff=1e-4),
    Case("a sure answer", 20, scale=60.0),
    # exp overflows in float32 above 88.
    Case("large logits", 20, offset=1000.0, z_loss_coeff=1e-6, max_chunk_tokens=8),
)


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    token_weights: Tensor | None


def make_inputs(case: Case, dtype: torch.dtype, *, num_shards: int, device: str = "cpu") -> Inputs:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(case.num_tokens)
    hidden = torch.randn(case.num_tokens, HIDDEN_SIZE, generator=generator)
    weight = torch.randn(case.vocab_size, HIDDEN_SIZE, generator=generator)
    weight *= case.scale / HIDDEN_SIZE**0.5
    if case.offset:
        hidden[:, -1] = 1.0
        weight[:, -1] = case.offset
    labels = torch.randint(case.vocab_size, (case.num_tokens,), generator=generator)
    # The first and last id of every shard.
    shard = case.vocab_size // num_shards
    borders = [(shard * i, shard * (i + 1) - 1) for i in range(num_shards)]
    for row, label in zip(range(case.num_tokens), itertools.chain(*borders), strict=False):
        labels[row] = label
    token_weights = torch.rand(case.num_tokens, generator=generator)
    if case.weights == "mask":
        token_weights = (token_weights > 1 / 3).float()
    return Inputs(
        hidden.to(device, dtype),
        weight.to(device, dtype),
        labels.to(device),
        None if case.weights == "none" else token_weights.to(device),
    )


def definition(
    inputs: Inputs, case: Case, dtype: torch.dtype, *, is_plain: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, cross entropies, gradients of hidden and weight, by the reference.

    is_plain: the product stays in `dtype`, and the loss sees its rounded logits.
    """
    hidden = inputs.hidden.detach().to(dtype, copy=True).requires_grad_()
    weight = inputs.weight.detach().to(dtype, copy=True).requires_grad_()
    options: Any = {"token_weights": inputs.token_weights, "z_loss_coeff": case.z_loss_coeff}
    if is_plain:
        logits = (hidden @ weight.t()).float()
        loss, cross_entropy = reference_cross_entropy(logits, inputs.labels, **options)
    else:
        loss, cross_entropy = reference_linear_cross_entropy(
            hidden, weight, inputs.labels, **options
        )
    grad_hidden, grad_weight = torch.autograd.grad(loss * UPSTREAM, (hidden, weight))
    return loss.detach(), cross_entropy, grad_hidden, grad_weight


def check_case(
    case: Case,
    dtype: torch.dtype,
    group: dist.ProcessGroup,
    *,
    device: str = "cpu",
    kernel: Kernel | None = None,
) -> None:
    """This rank's columns of the case against the definition in float64."""
    rank, size = group.rank(), group.size()
    inputs = make_inputs(case, dtype, num_shards=size, device=device)
    own = slice(case.vocab_size // size * rank, case.vocab_size // size * (rank + 1))
    hidden = inputs.hidden.clone().requires_grad_()
    weight = inputs.weight[own].clone().requires_grad_()
    loss, cross_entropy = linear_cross_entropy(
        hidden,
        weight,
        inputs.labels,
        group=group,
        token_weights=inputs.token_weights,
        z_loss_coeff=case.z_loss_coeff,
        kernel=kernel,
        max_chunk_tokens=case.max_chunk_tokens,
    )
    torch.autograd.backward(loss * UPSTREAM)
    assert not cross_entropy.requires_grad
    assert loss.dtype == cross_entropy.dtype == torch.float32
    assert hidden.grad is not None
    assert weight.grad is not None
    # Each rank's part is rounded at its own size, which may be more than that of the sum.
    grad_hidden = hidden.grad.double()
    part_size = grad_hidden.abs().max() if grad_hidden.numel() else grad_hidden.new_zeros(())
    if size > 1:
        dist.all_reduce(part_size, group=group)
        dist.all_reduce(grad_hidden, group=group)

    exact = definition(inputs, case, torch.float64, is_plain=False)
    plain = definition(inputs, case, dtype, is_plain=True)
    logits = (inputs.hidden.double() @ inputs.weight.double().t()).abs()
    largest_logit = float(logits.max()) if logits.numel() else 0.0
    found = {
        "loss": (loss.detach(), largest_logit * max(1, case.num_tokens)),
        "cross entropy": (cross_entropy, largest_logit),
        "gradient of hidden": (grad_hidden.to(dtype), float(part_size)),
        "gradient of weight": (weight.grad, 0.0),
    }
    for (name, (value, largest)), plain_value, exact_value in zip(
        found.items(), plain, exact, strict=True
    ):
        rows = own if name == "gradient of weight" else slice(None)
        what = f"{case.name}, {name}, rank {rank} of {size}"
        assert value.dtype == (torch.float32 if "gradient" not in name else dtype), what
        assert_as_good_as_plain(
            value,
            plain=plain_value[rows] if value.dim() else plain_value,
            exact=exact_value[rows] if value.dim() else exact_value,
            what=what,
            largest=largest,
        )
        if dtype == torch.float32 and case.scale < 10 and not case.offset:
            wanted = exact_value[rows] if value.dim() else exact_value
            error = torch.linalg.vector_norm(value.double() - wanted)
            assert error <= 1e-5 * torch.linalg.vector_norm(wanted), what


def check_all(dtype: torch.dtype) -> None:
    group = dist.group.WORLD
    assert group is not None
    for case in CASES:
        check_case(case, dtype, group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_loss_and_gradients_equal_the_definition(
    ranks: Ranks, num_ranks: int, dtype: torch.dtype
) -> None:
    ranks.run(num_ranks, check_all, dtype)


def check_on_gpu() -> None:
    group = dist.group.WORLD
    assert group is not None
    kernels: tuple[Kernel, ...] = ("torch", "triton")
    for case, dtype, kernel in itertools.product(CASES, (torch.float32, torch.bfloat16), kernels):
        check_case(case, dtype, group, device="cuda", kernel=kernel)


@pytest.mark.gpu
def test_loss_and_gradients_on_a_gpu(ranks: Ranks) -> None:
    ranks.run(1, check_on_gpu)


def masked_tokens() -> None:
    group = dist.group.WORLD
    assert group is not None
    hidden = torch.randn(3, HIDDEN_SIZE, requires_grad=True)
    weight = torch.randn(8, HIDDEN_SIZE, requires_grad=True)
    mask = torch.tensor([1.0, 0.0, 1.0])
    arguments: Any = {"group": group, "token_weights": mask, "z_loss_coeff": 1e-2}
    loss, _ = linear_cross_entropy(hidden, weight, torch.tensor([0, 7, 3]), **arguments)
    torch.autograd.backward(loss)
    assert hidden.grad is not None
    assert not hidden.grad[1].any()
    assert hidden.grad[0].any()
    other, _ = linear_cross_entropy(hidden, weight, torch.tensor([0, 2, 3]), **arguments)
    assert torch.equal(loss, other)


def test_masked_tokens_have_no_loss_and_no_gradient(ranks: Ranks) -> None:
    ranks.run(1, masked_tokens)


def upstream() -> None:
    group = dist.group.WORLD
    assert group is not None
    hidden = torch.randn(40, HIDDEN_SIZE, requires_grad=True)
    weight = torch.randn(16, HIDDEN_SIZE, requires_grad=True)
    labels = torch.randint(16, (40,))

    def grads(factor: float) -> tuple[Tensor, ...]:
        loss, _ = linear_cross_entropy(hidden, weight, labels, group=group, max_chunk_tokens=16)
        return torch.autograd.grad(factor * loss + hidden.sum() + weight.sum(), (hidden, weight))

    ones = [one - 1 for one in grads(1.0)]
    for factor in (0.0, -3.0):
        for found, one in zip(grads(factor), ones, strict=True):
            torch.testing.assert_close(found - 1, factor * one, rtol=1e-5, atol=1e-5)

    # Only what is asked for is computed.
    loss, _ = linear_cross_entropy(hidden, weight.detach(), labels, group=group)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], ones[0])
    loss, _ = linear_cross_entropy(hidden.detach(), weight, labels, group=group)
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], ones[1])
    with torch.no_grad():
        silent, _ = linear_cross_entropy(hidden, weight, labels, group=group)
    assert not silent.requires_grad
    assert torch.equal(silent, loss)

    loss, _ = linear_cross_entropy(hidden, weight, labels, group=group)
    torch.autograd.backward(loss, retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        torch.autograd.backward(loss)


def test_the_gradient_from_behind_scales_both_gradients(ranks: Ranks) -> None:
    ranks.run(1, upstream)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Elements of the largest tensor that any operator returned."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_elements: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.num_elements = max(self.num_elements, value.numel())
        return result


def largest_tensor(*, has_backward: bool) -> int:
    group = dist.group.WORLD
    assert group is not None
    hidden = torch.randn(1024, 4, requires_grad=has_backward)
    weight = torch.randn(1000, 4, requires_grad=has_backward)
    labels = torch.randint(1000, (1024,))
    with Largest() as largest:
        loss, _ = linear_cross_entropy(hidden, weight, labels, group=group, max_chunk_tokens=128)
        if has_backward:
            torch.autograd.backward(loss)
    return int(largest.num_elements)


@pytest.mark.parametrize("has_backward", [True, False])
def test_no_more_logits_exist_than_a_chunk_has(ranks: Ranks, has_backward: bool) -> None:
    (found,) = ranks.run(1, largest_tensor, has_backward=has_backward)
    assert found == 128 * 1000
