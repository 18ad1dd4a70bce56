"""Cross entropy over a vocabulary on one and two ranks, against torch's in float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.loss import vocab_parallel_cross_entropy
from tests.megatron_ext.tolerance import assert_as_good_as_plain
from tests.rank_pool import Ranks


@dataclass(frozen=True)
class Case:
    name: str
    num_rows: int
    vocab_size: int
    z_loss_coeff: float = 0.0
    scale: float = 3.0
    """Standard deviation of the logits."""
    offset: float = 0.0


CASES = (
    Case("one row", 1, 6),
    Case("no row", 0, 6),
    Case("odd rows", 37, 254),
    Case("z-loss", 37, 254, z_loss_coeff=1e-2),
    # More rows than one block (8 MiB of float32) holds, on one rank and on two.
    Case("several blocks", 90, 50_000, z_loss_coeff=1e-4),
    Case("a sure answer", 20, 64, scale=60.0),
    # exp overflows in float32 above 88.
    Case("large logits", 20, 64, offset=1000.0, z_loss_coeff=1e-6),
)


def check(dtype: torch.dtype) -> None:
    """In each rank: its columns of the loss and of the gradient, for every case."""
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    assert group is not None
    for case in CASES:
        logits, labels, grad = tensors(case, dtype, num_shards=size)
        own = slice(case.vocab_size // size * rank, case.vocab_size // size * (rank + 1))
        local = logits[:, own].clone().requires_grad_()
        loss, cross_entropy = vocab_parallel_cross_entropy(
            local, labels, group=group, z_loss_coeff=case.z_loss_coeff
        )
        (local_grad,) = torch.autograd.grad(loss, local, grad)
        assert not cross_entropy.requires_grad
        assert loss.dtype == cross_entropy.dtype == torch.float32
        assert local_grad.dtype == dtype

        exact = reference(logits.double(), labels, grad.double(), case.z_loss_coeff)
        plain = reference(logits, labels, grad, case.z_loss_coeff)
        found = (loss.detach(), cross_entropy, local_grad)
        names = ("loss", "cross entropy", "gradient")
        for name, value, plain_value, exact_value in zip(names, found, plain, exact, strict=True):
            columns = own if name == "gradient" else slice(None)
            # lse - logit: both are rounded at their own size, however small the difference is.
            on_the_way = float(logits.abs().max()) if logits.numel() else 0.0
            assert_as_good_as_plain(
                value,
                plain=plain_value[..., columns],
                exact=exact_value[..., columns],
                what=f"{case.name}, {name}, rank {rank} of {size}",
                largest=on_the_way if value.dtype == torch.float32 else 0.0,
            )


def tensors(case: Case, dtype: torch.dtype, *, num_shards: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and the gradient of the loss; the same on every rank."""
    generator = torch.Generator().manual_seed(case.num_rows)
    shape = (case.num_rows, case.vocab_size)
    logits = torch.randn(shape, generator=generator) * case.scale + case.offset
    labels = torch.randint(case.vocab_size, (case.num_rows,), generator=generator)
    # The first and last id of every shard.
    shard = case.vocab_size // num_shards
    borders = [(shard * i, shard * (i + 1) - 1) for i in range(num_shards)]
    for row, label in zip(range(case.num_rows), itertools.chain(*borders), strict=False):
        labels[row] = label
    # A third of the tokens are masked: their loss has no gradient.
    grad = (torch.rand(case.num_rows, generator=generator) > 1 / 3).float()
    return logits.to(dtype), labels, grad


def reference(
    logits: Tensor, labels: Tensor, grad: Tensor, z_loss_coeff: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, cross entropy and gradient by torch, in float64 or as float32 of the logits."""
    leaf = logits.detach().clone().requires_grad_()
    wide = leaf if leaf.dtype == torch.float64 else leaf.float()
    cross_entropy = F.cross_entropy(wide, labels, reduction="none")
    loss = cross_entropy + z_loss_coeff * torch.logsumexp(wide, dim=1).square()
    (leaf_grad,) = torch.autograd.grad(loss, leaf, grad)
    return loss.detach(), cross_entropy.detach(), leaf_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_loss_and_gradient_equal_torch(ranks: Ranks, num_ranks: int, dtype: torch.dtype) -> None:
    ranks.run(num_ranks, check, dtype)


def masked_rows() -> None:
    group = dist.group.WORLD
    assert group is not None
    logits = torch.randn(3, 8).requires_grad_()
    labels = torch.tensor([0, 7, 3])
    loss, _ = vocab_parallel_cross_entropy(logits, labels, group=group, z_loss_coeff=1e-2)
    torch.autograd.backward((loss * torch.tensor([1.0, 0.0, 1.0])).sum())
    assert logits.grad is not None
    assert not logits.grad[1].any()
    assert logits.grad[0].any()
    # Without z-loss the gradient only moves probability from one token to others.
    plain = logits.detach().requires_grad_()
    torch.autograd.backward(vocab_parallel_cross_entropy(plain, labels, group=group)[0].sum())
    assert plain.grad is not None
    assert float(plain.grad.sum(dim=1).abs().max()) < 8 * torch.finfo(torch.float32).eps


def test_masked_tokens_have_no_gradient(ranks: Ranks) -> None:
    ranks.run(1, masked_rows)
