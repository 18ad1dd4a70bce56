"""What a cluster's centroid does not say of a member stays at home and is added to the answer.

    y_k = E(c) + s (x_k - c),     c = sum over the cluster of a_l x_l

(LSH-MoE, arXiv 2411.08446, Eq. 5, with s = 1): as if the expert were the identity around its
centroids. Backward x_k gets s (g_k - a_k sum over the cluster of g_l). A row alone in its cluster
has residual and gradient exactly 0. Where the centroid travels rounded, x is compared with what
arrives, so that the residual makes up for the rounding too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe.lsh.cluster import Clusters, shared_out
from moe.segment_sum import segment_sum


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: Tensor, clusters: Clusters, scale: float) -> Tensor:
        ctx.clusters, ctx.scale = clusters, scale
        return _scaled(rows - sent.index_select(0, clusters.of_row), scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        clusters: Clusters = ctx.clusters
        sums = segment_sum(grad, clusters.order, clusters.starts)
        return _scaled(grad - shared_out(sums, clusters), ctx.scale), None, None, None


def _scaled(difference: Tensor, scale: float) -> Tensor:
    return difference if scale == 1.0 else difference.mul_(scale)


def residuals_of(rows: Tensor, sent: Tensor, clusters: Clusters, *, scale: float = 1.0) -> Tensor:
    """scale (x_k - c): [num_rows, hidden_size].

    Args:
        rows: [num_rows, hidden_size].
        sent: [num_clusters, hidden_size], centroids as they arrive at the experts. Their gradient
            is taken as that of the centroids of `rows`, whatever rounding did.
    """
    return _Residual.apply(rows, sent.detach(), clusters, scale)  # type: ignore[no-any-return, no-untyped-call]
