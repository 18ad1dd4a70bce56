"""Similar tokens go to an expert as one: LSH-MoE (arXiv 2411.08446, Algorithm 1), as hooks.

    before_dispatch   rows by expert -> buckets of equal hash -> centroids c_j
    any dispatcher    centroids -> experts -> answers, each with one expert and weight 1
    after_combine     y_k = E(c_(bucket of k)) + x_k - c_(bucket of k), then the weighted sum

Buckets are made for each source rank and expert, of the whole micro-batch before it is cut into
chunks, so nothing but centroids, their answers and backward the gradients of both travels, and
chunks change nothing. Residuals x - c never leave. If every row has a bucket of its own the result,
and every gradient, is bit by bit that of `moe.dispatch.per_expert`.

A mean is over tokens that stand before and after each other, so with it a token's output depends a
little on later tokens, which a causal model must not see: what such a model is worth shows without
compression. With the first token of a bucket in place of the mean nothing is seen too early.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.dispatch.exact import share_evenly
from moe.dispatch.hooks import Hooks
from moe.dispatch.payload import Payload, rounded_rows, row_bytes
from moe.dispatch.per_expert import by_expert, one_expert_each
from moe.dispatch.route import wanted_by
from moe.lsh.buckets import num_buckets
from moe.lsh.cluster import Centroid, Clusters, centroids_of, group_rows, make_clusters, spread
from moe.lsh.counters import CompressionCounters, TripCount, squared_sums
from moe.lsh.hash import hash_rows
from moe.lsh.refine import refine
from moe.lsh.residual import residuals_of
from moe.permutation import permute
from moe.records import Routing


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is among those that the experts are spread over: ranks, or nodes where tokens
    cross to nodes. For counting bytes alone."""

    number: int = 0
    num_places: int = 1


@dataclass(frozen=True, slots=True)
class Compression:
    """Makes the hooks of each trip.

    Attributes:
        rotations: float32 [num_hashes, hash_dim, hidden_size] (`moe.lsh.hash.draw_rotations`).
        residual_scale: 1 as in the paper; 0 leaves residuals out.
        centroid: what stands for a bucket: its mean as in the paper, or its first token.
        num_refinements: times that tokens then move to the nearest mean (`moe.lsh.refine`).
        payload: how the dispatcher's links write rows; residuals make up for its rounding.
        counters: what was done is added here.
    """

    rotations: Tensor
    residual_scale: float = 1.0
    centroid: Centroid = "mean"
    num_refinements: int = 0
    payload: Payload = "none"
    place: Place = Place()
    counters: CompressionCounters | None = None

    def __call__(self) -> CompressedTrip:
        return CompressedTrip(self)


class CompressedTrip(Hooks):
    """Sends centroids."""

    def __init__(self, settings: Compression) -> None:
        self._settings = settings

    def before_dispatch(self, tokens: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
        settings = self._settings
        self._rows = by_expert(routing)
        permutation, experts = self._rows.permutation, self._rows.experts
        codes = hash_rows(tokens, settings.rotations.to(tokens))
        grouping = group_rows(
            experts,
            codes[permutation.sources],
            num_experts=routing.num_experts,
            num_buckets=num_buckets(*settings.rotations.shape[:2]),
        )
        clusters = make_clusters(
            grouping,
            num_clusters=int(grouping.counts.sum()),
            centroid=settings.centroid,
            dtype=tokens.dtype,
        )
        rows = permute(tokens, permutation)
        self._clusters = clusters = self._refined(rows, clusters, routing.counts, grouping.counts)
        centroids = centroids_of(rows, clusters)
        arriving = rounded_rows(centroids.detach(), payload=settings.payload)
        self._residuals = None
        if settings.residual_scale:
            self._residuals = residuals_of(rows, arriving, clusters, scale=settings.residual_scale)
        if settings.counters is not None:
            settings.counters.add(self._count(rows.detach(), arriving, routing, grouping.counts))
        of_cluster = torch.arange(routing.num_experts, device=tokens.device).repeat_interleave(
            grouping.counts, output_size=clusters.num_clusters
        )
        return centroids, one_expert_each(of_cluster, grouping.counts, routing.weights.detach())

    def after_combine(self, outputs: Tensor) -> Tensor:
        answers = spread(outputs, self._clusters)
        if self._residuals is not None:
            answers = answers + self._residuals
        return self._rows.combine(answers)

    def _refined(
        self, rows: Tensor, clusters: Clusters, row_counts: Tensor, cluster_counts: Tensor
    ) -> Clusters:
        if not self._settings.num_refinements:
            return clusters
        assert self._settings.centroid == "mean", "the first of a bucket stays it only unrefined"
        num_rows, num_clusters = torch.stack([row_counts, cluster_counts]).tolist()
        for _ in range(self._settings.num_refinements):
            clusters = refine(rows, clusters, num_rows=num_rows, num_clusters=num_clusters)
        return clusters

    def _count(
        self, rows: Tensor, arriving: Tensor, routing: Routing, cluster_counts: Tensor
    ) -> TripCount:
        place, hidden_size = self._settings.place, rows.shape[1]
        exact_crossing = _exact_crossing(routing, place)
        by_place = cluster_counts.view(place.num_places, -1).sum(dim=1)
        crossing = by_place.sum() - by_place[place.number]
        one_row = row_bytes(hidden_size, payload=self._settings.payload, dtype=rows.dtype)
        both_ways = torch.stack(
            [
                crossing * 2 * one_row,
                exact_crossing * (2 * hidden_size * rows.dtype.itemsize),
            ]
        )
        difference = rows - arriving.index_select(0, self._clusters.of_row)
        return TripCount(
            num_rows=rows.shape[0],
            num_sent=self._clusters.num_clusters,
            device_sums=torch.cat([squared_sums(difference, rows), both_ways]),
        )


def _exact_crossing(routing: Routing, place: Place) -> Tensor:
    """int64: rows for other places if each token goes once to each that it needs."""
    at_each = share_evenly(routing.num_experts, place.num_places)
    wanted = wanted_by(routing.experts // at_each, num_destinations=place.num_places)
    return wanted.sum() - wanted[:, place.number].sum()
