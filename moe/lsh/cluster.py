"""Rows of one bucket become one cluster, and one row stands for all of them.

    c_j = sum over members k of a_k x_k       centroid; a_k = 1/n_j: the mean
    y_k = z_(cluster of k)                    spread: what came back for c_j, for each member

Both are linear: backward a member gets a_k times the gradient of its centroid, and an answer the
sum of its members' gradients. Shares a_k sum to 1 in each cluster. With a_k = 1 for the first
member and 0 for the others the centroid is that member: a token then depends on none behind it.

Clusters are numbered by expert and, within one, by their first member. So if every row is its own
cluster, centroids are the rows as they were. Nothing here waits for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from moe.segment_sum import segment_sum

Centroid = Literal["mean", "first"]


@dataclass(frozen=True, slots=True)
class Grouping:
    """Which rows go together, while the host does not know yet how many clusters that makes.

    Attributes:
        of_row: int64 [num_rows], each row's cluster.
        is_first: bool [num_rows], whether a row is the first of its cluster.
        counts: int64 [num_experts], clusters of each expert.
    """

    of_row: Tensor
    is_first: Tensor
    counts: Tensor


@dataclass(frozen=True, slots=True)
class Clusters:
    """Rows by cluster.

    Attributes:
        of_row: int64 [num_rows], each row's cluster.
        order: int64 [num_rows], rows cluster by cluster, in their order within one.
        starts: int64 [num_clusters + 1], where each begins in `order`; last its length.
        shares: [num_rows], a_k; float32 at least.
    """

    of_row: Tensor
    order: Tensor
    starts: Tensor
    shares: Tensor

    @property
    def num_clusters(self) -> int:
        return self.starts.shape[0] - 1


def group_rows(experts: Tensor, codes: Tensor, *, num_experts: int, num_buckets: int) -> Grouping:
    """Rows of the same expert and code go together.

    Args:
        experts: int64 [num_rows], ascending.
        codes: int64 [num_rows], below `num_buckets`.
    """
    keys, order = (experts * num_buckets + codes).sort(stable=True)
    index = torch.arange(keys.shape[0], device=keys.device)
    begins = torch.ones_like(keys, dtype=torch.bool)
    begins[1:] = keys[1:] != keys[:-1]
    # Stable, so the first of a cluster here is its first row.
    start = torch.where(begins, index, 0).cummax(dim=0).values if keys.shape[0] else index
    first = torch.empty_like(order)
    first[order] = order[start]
    is_first = first == index
    number = is_first.cumsum(dim=0) - 1
    counts = torch.zeros(num_experts, dtype=torch.int64, device=keys.device)
    counts.index_add_(0, experts, is_first.long())
    return Grouping(of_row=number[first], is_first=is_first, counts=counts)


def make_clusters(
    grouping: Grouping,
    *,
    num_clusters: int,
    centroid: Centroid = "mean",
    dtype: torch.dtype = torch.float32,
) -> Clusters:
    """Clusters of a grouping.

    Args:
        num_clusters: the sum of `grouping.counts`.
        centroid: what stands for a cluster.
        dtype: of the rows.
    """
    clusters = clusters_of(grouping.of_row, num_clusters=num_clusters, dtype=dtype)
    if centroid == "first":
        return replace(clusters, shares=grouping.is_first.to(clusters.shares.dtype))
    return clusters


def clusters_of(of_row: Tensor, *, num_clusters: int, dtype: torch.dtype) -> Clusters:
    """Clusters with means of rows of `dtype`, by the cluster int64 [num_rows] of each row.

    One without rows has centroid 0.
    """
    sizes = torch.zeros(num_clusters, dtype=torch.int64, device=of_row.device)
    sizes.index_add_(0, of_row, torch.ones_like(of_row))
    starts = torch.zeros(num_clusters + 1, dtype=torch.int64, device=of_row.device)
    torch.cumsum(sizes, dim=0, out=starts[1:])
    shares = sizes.to(torch.promote_types(dtype, torch.float32)).reciprocal()[of_row]
    return Clusters(of_row=of_row, order=of_row.argsort(stable=True), starts=starts, shares=shares)


class _Centroids(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, clusters: Clusters) -> Tensor:
        ctx.clusters = clusters
        shares = clusters.shares[clusters.order]
        return segment_sum(rows, clusters.order, clusters.starts, shares)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return shared_out(grad, ctx.clusters), None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, answers: Tensor, clusters: Clusters) -> Tensor:
        ctx.clusters = clusters
        return answers.index_select(0, clusters.of_row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        clusters: Clusters = ctx.clusters
        return segment_sum(grad, clusters.order, clusters.starts), None


def centroids_of(rows: Tensor, clusters: Clusters) -> Tensor:
    """Centroids [num_clusters, hidden_size] of rows [num_rows, hidden_size], in their dtype."""
    return _Centroids.apply(rows, clusters)  # type: ignore[no-any-return, no-untyped-call]


def spread(answers: Tensor, clusters: Clusters) -> Tensor:
    """For each row its cluster's answer: [num_clusters, hidden_size] to [num_rows, hidden_size]."""
    return _Spread.apply(answers, clusters)  # type: ignore[no-any-return, no-untyped-call]


def shared_out(sums: Tensor, clusters: Clusters) -> Tensor:
    """a_k times its cluster's row: [num_clusters, hidden_size] to [num_rows, hidden_size]."""
    of_rows = sums.index_select(0, clusters.of_row)
    return (of_rows * clusters.shares[:, None]).to(sums.dtype)
