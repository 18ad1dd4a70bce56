"""Packed attention problems and two yardsticks: the formula in float64 and in plain precision."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class PackedCase:
    """Documents of these lengths in one row, with `padding` tokens behind them."""

    name: str
    lengths: tuple[int, ...]
    num_heads: int
    num_query_groups: int
    head_dim: int
    padding: int = 0

    @property
    def cu_seqlens(self) -> tuple[int, ...]:
        return (0, *accumulate(self.lengths))

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths) + self.padding

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths, default=0)

    @property
    def softmax_scale(self) -> float:
        return float(self.head_dim**-0.5)

    def tensors(
        self, *, dtype: torch.dtype, device: str = "cpu", seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """query, key, value (all requiring gradients) and the gradient of the output."""
        generator = torch.Generator().manual_seed(seed)

        def draw(num_heads: int) -> Tensor:
            shape = (self.num_tokens, num_heads, self.head_dim)
            return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

        query, key, value, grad = (
            draw(num)
            for num in (
                self.num_heads,
                self.num_query_groups,
                self.num_query_groups,
                self.num_heads,
            )
        )
        return query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), grad


CASES = (
    PackedCase("one token", (1,), 2, 2, 64),
    PackedCase("no document", (), 2, 2, 16, padding=3),
    PackedCase("empty documents", (0, 5, 0, 0, 123, 0), 2, 2, 64),
    PackedCase("block borders", (127, 128, 129, 256, 257), 2, 2, 64),
    PackedCase("primes, odd head", (7, 131, 61, 2), 3, 3, 33, padding=11),
    PackedCase("grouped", (200, 37, 300), 6, 2, 40, padding=5),
    PackedCase("one shared key", (150, 150, 3), 4, 1, 16),
    PackedCase("long and short", (700, 1, 40), 2, 1, 64, padding=1),
)


def results(attention: Attention, case: PackedCase, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Output and the gradients of query, key and value."""
    query, key, value, grad = tensors
    output = attention(query, key, value)
    leaves = (query, key, value)
    # With padding alone, a leaf may not be used at all: then its gradient is 0.
    grads = torch.autograd.grad(output, leaves, grad, allow_unused=True, materialize_grads=True)
    return [output.detach(), *grads]


def plain_attention(case: PackedCase) -> Attention:
    """Unfused attention with every step in the inputs' own precision."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads_per_group = case.num_heads // case.num_query_groups
        key, value = (x.repeat_interleave(heads_per_group, dim=1) for x in (key, value))
        outputs = []
        for start, end in pairwise(case.cu_seqlens):
            q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
            scores = q @ k.transpose(1, 2) * case.softmax_scale
            future = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device)
            scores = scores.masked_fill(future.triu(1), -torch.inf)
            outputs.append((torch.softmax(scores, dim=-1) @ v).transpose(0, 1))
        return torch.cat([*outputs, 0 * query[case.cu_seqlens[-1] :]])

    return attention


@dataclass(frozen=True, slots=True)
class Yardsticks:
    """Output and gradients of one case; `scales` are the largest numbers on the way to each."""

    plain: list[Tensor]
    exact: list[Tensor]
    scales: list[float]


@cache
def yardsticks(case: PackedCase, dtype: torch.dtype) -> Yardsticks:
    """The formula in plain `dtype` and, from the same inputs, in float64."""
    tensors = case.tensors(dtype=dtype)
    query, key, value, grad = (x.detach().double() for x in tensors)
    leaves = (query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), grad)
    exact = results(plain_attention(case), case, leaves)
    # dS = P (dP - rowsum(P dP)): two terms as large as dP are rounded, however small dS is.
    shared = value.detach().repeat_interleave(case.num_heads // case.num_query_groups, dim=1)
    grad_scores = 2 * case.softmax_scale * float((grad * shared).sum(dim=-1).abs().max())
    on_the_way = [0.0, grad_scores * _largest(key), grad_scores * _largest(query)]
    return Yardsticks(
        plain=results(plain_attention(case), case, tensors),
        exact=exact,
        scales=[
            max(float(x.abs().max()), scale)
            for x, scale in zip(exact, (*on_the_way, 0.0), strict=True)
        ],
    )


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


def assert_as_good_as_plain(found: list[Tensor], yardsticks: Yardsticks, *, what: str) -> None:
    """max|found - exact| <= 2 max|plain - exact| + one unit in the last place of the scale.

    The tolerance is the error that the same precision makes without any kernel.
    """
    names = ("output", "dquery", "dkey", "dvalue")
    for name, kernel, plain, exact, scale in zip(
        names, found, yardsticks.plain, yardsticks.exact, yardsticks.scales, strict=True
    ):
        assert kernel.shape == exact.shape
        plain_error = float((plain.double() - exact).abs().max())
        allowed = 2 * plain_error + torch.finfo(kernel.dtype).eps * scale
        error = float((kernel.double() - exact).abs().max())
        assert error <= allowed, f"{what}: {name} is off by {error:.3e}, allowed {allowed:.3e}"
