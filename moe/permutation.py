"""Tokens to rows that stand expert by expert, and back.

    rows[places[t, j]] = tokens[t]              permute: a copy of token t for each choice j
    tokens[t] = sum_j weights[t, j] rows[places[t, j]]     unpermute: the weighted sum of its rows

`places` is a bijection from choices to rows, ordered by expert and, within one, by token. So each
is the other's gradient, and both are gathers: no two rows write to one place, and sums have a fixed
order. Choices that lead nowhere (`moe.records`) have no row: they are sorted behind the last one
and add nothing. The same in plain torch stands in `moe.reference`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe.segment_sum import runs_triton, segment_sum


@dataclass(frozen=True, slots=True)
class Permutation:
    """Where each choice of each token stands among the rows.

    Attributes:
        places: int64 [num_tokens, topk], the row of each choice; num_rows or more is nowhere.
        choices: int64 [num_rows], its inverse: row r is choice `choices[r]`, counted token by
            token, so that it belongs to token `choices[r] // topk`.
    """

    places: Tensor
    choices: Tensor

    @property
    def num_rows(self) -> int:
        return self.choices.shape[0]

    @property
    def has_nowhere(self) -> bool:
        """Whether some choice has no row; known from shapes, without asking a GPU."""
        return self.num_rows < self.places.numel()

    @property
    def sources(self) -> Tensor:
        """int64 [num_rows], the token of each row."""
        return self.choices // self.places.shape[1]

    def lists(self) -> tuple[Tensor, Tensor]:
        """The rows of each token, in the order of its choices: int64 [num_rows], token by token,
        and int64 [num_tokens + 1], where each token's start."""
        num_tokens, topk = self.places.shape
        if not self.has_nowhere:
            starts = torch.arange(num_tokens + 1, device=self.places.device) * topk
            return self.places.reshape(-1), starts
        starts = torch.zeros(num_tokens + 1, dtype=torch.int64, device=self.places.device)
        torch.cumsum((self.places < self.num_rows).sum(dim=1), dim=0, out=starts[1:])
        return self.choices.argsort(), starts


def order_by_expert(experts: Tensor, *, num_rows: int | None = None) -> Permutation:
    """The permutation of a choice.

    Args:
        experts: int64 [num_tokens, topk]; the largest number is nowhere if `num_rows` says so.
        num_rows: choices that lead somewhere (`Routing.num_rows`); by default all.
    """
    choices = experts.reshape(-1).argsort(stable=True)
    places = inverse(choices).view(experts.shape)
    return Permutation(places=places, choices=choices[:num_rows])


def inverse(order: Tensor) -> Tensor:
    """The inverse of a permutation int64 [n]."""
    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel(), device=order.device)
    return places


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return _gather(tokens, permutation.sources)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None]:
        return _gather_sum(grad_rows, ctx.permutation, None), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, permutation: Permutation) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.permutation = permutation
        return _gather_sum(rows, permutation, weights)

    @staticmethod
    def backward(ctx: Any, grad_tokens: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weights = ctx.saved_tensors
        permutation: Permutation = ctx.permutation
        of_row = weights.reshape(-1)[permutation.choices]
        grad_rows, products = _weighted_gather(grad_tokens, permutation.sources, of_row, rows)
        grad_weights = products.new_zeros(weights.numel()).scatter_(
            0, permutation.choices, products
        )
        return grad_rows, grad_weights.view_as(weights).to(weights.dtype), None


def _gather(rows: Tensor, sources: Tensor) -> Tensor:
    if runs_triton(rows):
        from moe.permutation_triton import gather_rows_triton

        return gather_rows_triton(rows, sources)
    return rows.index_select(0, sources)


def _gather_sum(rows: Tensor, permutation: Permutation, weights: Tensor | None) -> Tensor:
    """sum_j weights[t, j] rows[places[t, j]], added in float32 at least, in the order of j."""
    chosen, starts = permutation.lists()
    if weights is not None:
        weights = weights.reshape(-1)
        if permutation.has_nowhere:
            weights = weights[permutation.choices[chosen]]
    return segment_sum(rows, chosen, starts, weights)


def _weighted_gather(
    grads: Tensor, sources: Tensor, weights: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """(weights[r] grads[sources[r]], its unweighted product with row r), for each row r."""
    if runs_triton(rows):
        from moe.permutation_triton import weighted_gather_triton

        return weighted_gather_triton(grads, sources, weights, rows)
    gathered = grads.index_select(0, sources).to(_wide(rows.dtype))
    products = (rows * gathered).sum(dim=-1)
    return gathered.mul_(weights[:, None]).to(rows.dtype), products


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def permute(tokens: Tensor, permutation: Permutation) -> Tensor:
    """[num_tokens, hidden_size] to rows [num_rows, hidden_size], expert by expert."""
    return _Permute.apply(tokens, permutation)  # type: ignore[no-any-return, no-untyped-call]


def unpermute(rows: Tensor, weights: Tensor, permutation: Permutation) -> Tensor:
    """The weighted sum of each token's rows.

    Args:
        rows: [num_rows, hidden_size] in the order of `permute`.
        weights: float32 [num_tokens, topk].

    Returns:
        [num_tokens, hidden_size] in the dtype of `rows`.
    """
    return _Unpermute.apply(rows, weights, permutation)  # type: ignore[no-any-return, no-untyped-call]
