"""Tokens to rows that stand expert by expert, and back.

    rows[places[t, j]] = tokens[t]              permute: a copy of token t for each choice j
    tokens[t] = sum_j weights[t, j] rows[places[t, j]]     unpermute: the weighted sum of its rows

`places` is a bijection from choices to rows, ordered by expert and, within one, by token. So each
is the other's gradient, and both are gathers: no two rows write to one place, and sums have a fixed
order. The same in plain torch stands in `moe.reference`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Permutation:
    """Where each choice of each token stands among the rows.

    Attributes:
        places: int64 [num_tokens, topk], the row of each choice.
        choices: int64 [num_tokens * topk], its inverse: row r is choice `choices[r]`, counted
            token by token, so that it belongs to token `choices[r] // topk`.
    """

    places: Tensor
    choices: Tensor

    @property
    def sources(self) -> Tensor:
        """int64 [num_tokens * topk], the token of each row."""
        return self.choices // self.places.shape[1]


def order_by_expert(experts: Tensor) -> Permutation:
    """The permutation of a choice int64 [num_tokens, topk]."""
    choices = experts.reshape(-1).argsort(stable=True)
    return Permutation(places=inverse(choices).view(experts.shape), choices=choices)


def inverse(order: Tensor) -> Tensor:
    """The inverse of a permutation int64 [n]."""
    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel(), device=order.device)
    return places


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return tokens.index_select(0, permutation.sources)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None]:
        return _gather_sum(grad_rows, ctx.permutation.places, None), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, permutation: Permutation) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.permutation = permutation
        return _gather_sum(rows, permutation.places, weights)

    @staticmethod
    def backward(ctx: Any, grad_tokens: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weights = ctx.saved_tensors
        permutation: Permutation = ctx.permutation
        grads = grad_tokens.index_select(0, permutation.sources).to(_wide(rows.dtype))
        weight_of_row = weights.reshape(-1)[permutation.choices]
        grad_weights = (rows * grads).sum(dim=-1)[permutation.places]
        grad_rows = grads.mul_(weight_of_row[:, None]).to(rows.dtype)
        return grad_rows, grad_weights.to(weights.dtype), None


def _gather_sum(rows: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    """sum_j weights[t, j] rows[places[t, j]], added in float32 at least, in the order of j."""
    num_tokens, topk = places.shape
    wide = _wide(rows.dtype)
    total = torch.zeros(num_tokens, rows.shape[1], dtype=wide, device=rows.device)
    for j in range(topk):
        chosen = rows.index_select(0, places[:, j])
        if weights is None:
            total.add_(chosen)
        else:
            total.addcmul_(chosen.to(wide), weights[:, j, None].to(wide))
    return total.to(rows.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def permute(tokens: Tensor, permutation: Permutation) -> Tensor:
    """[num_tokens, hidden_size] to rows [num_tokens * topk, hidden_size], expert by expert."""
    return _Permute.apply(tokens, permutation)  # type: ignore[no-any-return, no-untyped-call]


def unpermute(rows: Tensor, weights: Tensor, permutation: Permutation) -> Tensor:
    """The weighted sum of each token's rows.

    Args:
        rows: [num_tokens * topk, hidden_size] in the order of `permute`.
        weights: float32 [num_tokens, topk].

    Returns:
        [num_tokens, hidden_size] in the dtype of `rows`.
    """
    return _Unpermute.apply(rows, weights, permutation)  # type: ignore[no-any-return, no-untyped-call]


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.places = places
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None, None]:
        return grad_rows.index_select(0, ctx.places), None, None


def reorder(rows: Tensor, *, order: Tensor, places: Tensor) -> Tensor:
    """rows[order], where `places` is the inverse of `order`; the gradient is a gather again."""
    return _Reorder.apply(rows, order, places)  # type: ignore[no-any-return, no-untyped-call]
