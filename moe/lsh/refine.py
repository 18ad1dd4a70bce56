"""Each row moves to the centroid that is nearest to it: as many rows travel, and they say more.

    cluster of x = argmin_j |x - c_j|^2 = argmax_j x . c_j - |c_j|^2 / 2     over its expert's c_j

Hashing cuts space without looking at the tokens; one such step (Lloyd's, of k-means) from its
centroids looks, and the sum of squared distances to the new means never grows. It costs 2 n c h
operations for n tokens and c centroids of an expert. A cluster that all rows have left still
travels, as zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe.lsh.cluster import Clusters, centroids_of, clusters_of


@torch.no_grad()
def refine(
    rows: Tensor, clusters: Clusters, *, num_rows: Sequence[int], num_clusters: Sequence[int]
) -> Clusters:
    """Clusters of as many centroids, by distance.

    Args:
        rows: [num_rows, hidden_size], expert by expert.
        num_rows, num_clusters: of each expert.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    centers = centroids_of(rows, clusters).to(wide)
    half_squares = centers.square().sum(dim=1) / 2
    found, first = [], 0
    for members, own, halves in zip(
        torch.split(rows, list(num_rows)),
        torch.split(centers, list(num_clusters)),
        torch.split(half_squares, list(num_clusters)),
        strict=True,
    ):
        if len(members):
            found.append(first + (members.to(wide) @ own.T - halves).argmax(dim=1))
        first += len(own)
    of_row = torch.cat(found) if found else clusters.of_row
    return clusters_of(of_row, num_clusters=clusters.num_clusters, dtype=rows.dtype)
