"""Block Hadamard transform: spreads an outlier over its group, so that one scale fits all of it.

    H_1 = [1]      H_2g = [[H_g, H_g], [H_g, -H_g]] / sqrt(2)      H_g = H_g^T = H_g^-1

Along the last dim, in groups of g = 2^j. With random signs S = diag(+-1) of one group, the same for
all groups: x -> x S H_g, undone by x -> x H_g S. Both operands of a product that are transformed
along the dim they are contracted over give the same product: (A S H)(B S H)^T = A B^T.

Sources: Quartet (arXiv 2505.14669, Algorithm 1: fixed forward, random signs backward), NVIDIA's
NVFP4 recipe (arXiv 2509.25149: 16, one random sign vector, wgrad only).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def hadamard_matrix(group: int, *, device: torch.device | None = None) -> Tensor:
    """H_g: float32 [group, group], symmetric and orthonormal. ValueError if not a power of two."""
    if group < 1 or group & (group - 1):
        raise ValueError(f"a Hadamard group must be a power of two; found {group}")
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < group:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix * (1.0 / math.sqrt(group))


def block_hadamard(values: Tensor, group: int, signs: Tensor | None = None) -> Tensor:
    """values S H_g in each group of the last dim.

    In float32 by log2(g) rounds of sums and differences, neighbours first, scaled once at the end:
    this order is the definition that kernels are compared with.

    Args:
        values: float32 [..., n], g divides n (ValueError).
        signs: float32 [g], +1 or -1; None: all +1.

    Returns:
        float32, shape of values.
    """
    size = values.shape[-1]
    if size % group:
        raise ValueError(f"Hadamard groups of {group} do not divide a dim of {size}")
    grouped = values.reshape(-1, group)
    if signs is not None:
        grouped = grouped * signs
    span = 1
    while span < group:
        pairs = grouped.view(-1, group // (2 * span), 2, span)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        grouped = torch.stack((first + second, first - second), 2).view(-1, group)
        span *= 2
    return (grouped * (1.0 / math.sqrt(group))).view(values.shape)


def inverse_block_hadamard(values: Tensor, group: int, signs: Tensor | None = None) -> Tensor:
    """values H_g S: undoes `block_hadamard` up to rounding. By a matrix: nothing is stored of it,
    so the order of its sums is free."""
    matrix = hadamard_matrix(group, device=values.device)
    if signs is not None:
        matrix = matrix * signs
    return (values.reshape(-1, group) @ matrix).view(values.shape)
