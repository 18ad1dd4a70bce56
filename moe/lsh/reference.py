"""Compressed experts in plain torch, as the formulas say, with autograd for the gradient.

    per expert i and bucket j of the tokens that chose i:
    c_ij = mean of them,     y_t = sum_i weight_ti (E_i(c_ij) + s (x_t - c_ij))

One loop over the clusters. Faster ways are tested against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.lsh.cluster import Centroid
from moe.records import Routing
from moe.swiglu import swiglu


def codes_reference(rows: Tensor, rotations: Tensor) -> Tensor:
    """Codes of `moe.lsh.hash.hash_rows`, one row and one hash after the other."""
    hash_dim = rotations.shape[1]
    codes = []
    for row in rows:
        code = 0
        for k, rotation in enumerate(rotations):
            projected = [float(row.double() @ direction.double()) for direction in rotation]
            sizes = [abs(value) for value in projected]
            corner = sizes.index(max(sizes))
            digit = corner + (hash_dim if projected[corner] < 0 else 0)
            code += digit * (2 * hash_dim) ** k
        codes.append(code)
    return torch.tensor(codes, dtype=torch.int64)


def compressed_loop(
    tokens: Tensor,
    routing: Routing,
    linear_fc1: Tensor,
    linear_fc2: Tensor,
    *,
    codes: Tensor,
    residual_scale: float = 1.0,
    centroid: Centroid = "mean",
) -> Tensor:
    """The layer's output [num_tokens, hidden_size] for the tokens of one source rank.

    Args:
        tokens: [num_tokens, hidden_size].
        linear_fc1: [num_experts, 2 * ffn_size, hidden_size], gate first.
        linear_fc2: [num_experts, hidden_size, ffn_size].
        codes: int64 [num_tokens].
        residual_scale: s; 0 leaves the residual out.
    """
    output = torch.zeros_like(tokens)
    for expert, (fc1, fc2) in enumerate(zip(linear_fc1, linear_fc2, strict=True)):
        weight = torch.where(routing.experts == expert, routing.weights, 0.0).sum(dim=-1)
        chosen = (routing.experts == expert).any(dim=-1)
        for code in torch.unique(codes[chosen]):
            members = torch.nonzero(chosen & (codes == code))[:, 0]
            first, mean = tokens[members[0]], tokens[members].mean(dim=0)
            center = mean if centroid == "mean" else first
            answer = swiglu(fc1 @ center) @ fc2.T
            rows = answer + residual_scale * (tokens[members] - center)
            output = output.index_add(0, members, weight[members, None].to(rows.dtype) * rows)
    return output
