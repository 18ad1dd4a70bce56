"""The definition of a mixture-of-experts layer, in plain torch.

    y_t = sum over chosen experts i of token t:  weight_ti  W2_i (silu(G_i x_t) * U_i x_t)

with [G_i; U_i] = W1_i. Every expert computes every token and the choice is a mask: slow, and with
nothing to go wrong. All faster ways are tested against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.records import Routing


def dense_loop(tokens: Tensor, routing: Routing, linear_fc1: Tensor, linear_fc2: Tensor) -> Tensor:
    """The layer's output [num_tokens, hidden_size], in the dtype of `tokens`.

    Args:
        tokens: [num_tokens, hidden_size].
        linear_fc1: [num_experts, 2 * ffn_size, hidden_size], gate first.
        linear_fc2: [num_experts, hidden_size, ffn_size].
    """
    output = torch.zeros_like(tokens)
    for expert, (fc1, fc2) in enumerate(zip(linear_fc1, linear_fc2, strict=True)):
        gate, up = (tokens @ fc1.T).chunk(2, dim=-1)
        answer = (torch.nn.functional.silu(gate) * up) @ fc2.T
        weight = torch.where(routing.experts == expert, routing.weights, 0.0).sum(dim=-1)
        output = output + weight.to(answer.dtype)[:, None] * answer
    return output


def permute_reference(tokens: Tensor, experts: Tensor, *, num_rows: int | None = None) -> Tensor:
    """Copies of the tokens, [num_rows, hidden_size], ordered by expert, then by token.

    Args:
        num_rows: those that lead somewhere; the others are last and left out. By default all.
    """
    copies = tokens.repeat_interleave(experts.shape[1], dim=0)
    return copies[experts.reshape(-1).argsort(stable=True)[:num_rows]]


def unpermute_reference(rows: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """The weighted sum over each token's rows, which stand as `permute_reference` puts them."""
    order = experts.reshape(-1).argsort(stable=True)[: rows.shape[0]]
    copies = rows.new_zeros(experts.numel(), rows.shape[1]).index_copy(0, order, rows)
    weighted = copies.view(*experts.shape, rows.shape[1]) * weights[..., None].to(rows.dtype)
    return weighted.sum(dim=1)
