"""Similar tokens go to an expert as one: LSH-MoE (arXiv 2411.08446, Algorithm 1).

    here      rows by expert -> buckets of equal hash -> centroids c_j   -> all-to-all ->
    there     centroids by expert -> experts                              -> and back ->
    here      y_k = E(c_(bucket of k)) + x_k - c_(bucket of k), then the weighted sum over experts

Buckets are made for each source rank and expert, so nothing but centroids, their answers and
backward the gradients of both travels. Residuals x - c never leave. If every row has a bucket of
its own the result, and every gradient, is bit by bit that of `moe.dispatch.per_expert`.

A mean is over tokens that stand before and after each other, so with it a token's output depends a
little on later tokens, which a causal model must not see: what such a model is worth shows without
compression. With the first token of a bucket in place of the mean nothing is seen too early.

Without a group nothing travels: that is for studying what compression does to the loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from moe.dispatch.payload import rounded_rows
from moe.dispatch.per_expert import ExpertRoute, Wire, make_route
from moe.dispatch.route import wanted_by
from moe.lsh.buckets import num_buckets
from moe.lsh.cluster import Centroid, Clusters, centroids_of, group_rows, make_clusters, spread
from moe.lsh.counters import CompressionCounters, TripCount, squared_sums
from moe.lsh.hash import hash_rows
from moe.lsh.refine import refine
from moe.lsh.residual import residuals_of
from moe.permutation import Permutation, order_by_expert, permute, unpermute
from moe.records import Routing

_COUNT_BYTES = 8


@dataclass(frozen=True, slots=True)
class CompressedTrip:
    """See `moe.dispatch.protocol.Trip`; `rows` are centroids.

    Attributes:
        residuals: [num rows at home, hidden_size], or None where they are left out.
    """

    rows: Tensor
    route: ExpertRoute
    weights: Tensor
    permutation: Permutation
    clusters: Clusters
    residuals: Tensor | None
    wire: Wire

    @property
    def counts(self) -> Tensor:
        return self.route.counts

    def combine(self, outputs: Tensor) -> Tensor:
        answers = spread(self.route.back(outputs, self.wire), self.clusters)
        if self.residuals is not None:
            answers = answers + self.residuals
        return unpermute(answers, self.weights, self.permutation)


@dataclass(frozen=True, slots=True)
class CompressedDispatcher:
    """Sends centroids.

    Attributes:
        rotations: float32 [num_hashes, hash_dim, hidden_size] (`moe.lsh.hash.draw_rotations`).
        residual_scale: 1 as in the paper; 0 leaves residuals out.
        centroid: what stands for a bucket: its mean as in the paper, or its first token.
        num_refinements: times that tokens then move to the nearest mean (`moe.lsh.refine`).
        group: ranks that share the experts evenly, in the order of their ranks; None: all are here.
        wire: how centroids and answers are written.
        counters: what was done is added here.
    """

    rotations: Tensor
    residual_scale: float = 1.0
    centroid: Centroid = "mean"
    num_refinements: int = 0
    group: dist.ProcessGroup | None = None
    wire: Wire = field(default_factory=Wire)
    counters: CompressionCounters | None = None

    def dispatch(self, tokens: Tensor, routing: Routing) -> CompressedTrip:
        """Every rank of the group calls this together, also with no tokens."""
        permutation = order_by_expert(routing.experts, num_rows=routing.num_rows())
        codes = hash_rows(tokens, self.rotations.to(tokens))
        grouping = group_rows(
            routing.experts.reshape(-1)[permutation.choices],
            codes[permutation.sources],
            num_experts=routing.num_experts,
            num_buckets=num_buckets(*self.rotations.shape[:2]),
        )
        route = make_route(grouping.counts, group=self.group)
        clusters = make_clusters(
            grouping, num_clusters=route.num_sent, centroid=self.centroid, dtype=tokens.dtype
        )
        rows = permute(tokens, permutation)
        clusters = self._refined(rows, clusters, routing.counts, grouping.counts)
        centroids = centroids_of(rows, clusters)
        sent = rounded_rows(centroids.detach(), payload=self.wire.payload)
        trip = CompressedTrip(
            rows=route.there(centroids, self.wire),
            route=route,
            weights=routing.weights,
            permutation=permutation,
            clusters=clusters,
            residuals=residuals_of(rows, sent, clusters, scale=self.residual_scale)
            if self.residual_scale
            else None,
            wire=self.wire,
        )
        if self.counters is not None:
            self.counters.add(self._count(rows.detach(), sent, trip, routing))
        return trip

    def _refined(
        self, rows: Tensor, clusters: Clusters, row_counts: Tensor, cluster_counts: Tensor
    ) -> Clusters:
        if not self.num_refinements:
            return clusters
        assert self.centroid == "mean", "the first of a bucket stays it only without refinement"
        num_rows, num_clusters = torch.stack([row_counts, cluster_counts]).tolist()
        for _ in range(self.num_refinements):
            clusters = refine(rows, clusters, num_rows=num_rows, num_clusters=num_clusters)
        return clusters

    def _count(
        self, rows: Tensor, sent: Tensor, trip: CompressedTrip, routing: Routing
    ) -> TripCount:
        hidden_size, route = rows.shape[1], trip.route
        size, rank = (1, 0) if route.group is None else (route.group.size(), route.group.rank())
        crossing = _exact_crossing(routing, num_ranks=size, rank=rank)
        difference = rows - sent.index_select(0, trip.clusters.of_row)
        return TripCount(
            num_rows=rows.shape[0],
            num_sent=route.num_sent,
            num_bytes=2 * self.wire.num_bytes(route.num_crossing, hidden_size, rows.dtype)
            + routing.num_experts * _COUNT_BYTES * (size - 1) // size,
            device_sums=torch.cat(
                [
                    squared_sums(difference, rows),
                    crossing[None] * (2 * hidden_size * rows.dtype.itemsize),
                ]
            ),
        )


def _exact_crossing(routing: Routing, *, num_ranks: int, rank: int) -> Tensor:
    """int64: rows for other ranks if each token goes once to each that it needs."""
    num_local = routing.num_experts // num_ranks
    wanted = wanted_by(routing.experts // num_local, num_destinations=num_ranks)
    return wanted.sum() - wanted[:, rank].sum()
