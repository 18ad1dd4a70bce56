"""Rows in clusters: numbers, centroids and residuals, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe.lsh.cluster import Centroid, Clusters, centroids_of, group_rows, make_clusters, spread
from moe.lsh.refine import refine
from moe.lsh.residual import residuals_of

BUCKETS = 4
LABELS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, BUCKETS - 1)), max_size=20)
"""Expert and code of each row."""


def clustered(
    labels: Sequence[tuple[int, int]],
    centroid: Centroid = "mean",
    dtype: torch.dtype = torch.float64,
) -> tuple[list[tuple[int, int]], Clusters]:
    """The rows in their order, and their clusters."""
    labels = sorted(labels, key=lambda label: label[0])
    experts, codes = (
        torch.tensor([label[i] for label in labels], dtype=torch.int64) for i in (0, 1)
    )
    grouping = group_rows(experts, codes, num_experts=3, num_buckets=BUCKETS)
    names = set(labels)
    assert grouping.counts.tolist() == [sum(name[0] == i for name in names) for i in range(3)]
    return labels, make_clusters(grouping, num_clusters=len(names), centroid=centroid, dtype=dtype)


@given(labels=LABELS)
def test_clusters_are_numbered_by_expert_and_first_row(labels: list[tuple[int, int]]) -> None:
    labels, clusters = clustered(labels)
    names = list(dict.fromkeys(labels))
    assert clusters.of_row.tolist() == [names.index(label) for label in labels]
    members = [[i for i, label in enumerate(labels) if label == name] for name in names]
    assert clusters.order.tolist() == [row for rows in members for row in rows]
    ends = [sum(len(rows) for rows in members[:i]) for i in range(len(names) + 1)]
    assert clusters.starts.tolist() == ends


@given(labels=LABELS, hidden_size=st.integers(1, 5), centroid=st.sampled_from(["mean", "first"]))
def test_centroids_residuals_and_gradients(
    labels: list[tuple[int, int]], hidden_size: int, centroid: Centroid
) -> None:
    """Against the same written as matrices."""
    labels, clusters = clustered(labels, centroid)
    names = list(dict.fromkeys(labels))
    membership = torch.tensor(
        [[float(label == name) for label in labels] for name in names], dtype=torch.float64
    ).view(len(names), len(labels))
    shares = membership / membership.sum(dim=1, keepdim=True)
    if centroid == "first":
        shares = membership * (membership.cumsum(dim=1) == 1)
    generator = torch.Generator().manual_seed(0)

    def draw(num_rows: int) -> Tensor:
        return torch.randn(num_rows, hidden_size, generator=generator, dtype=torch.float64)

    rows, answers = draw(len(labels)).requires_grad_(), draw(len(names)).requires_grad_()
    means = centroids_of(rows, clusters)
    residuals = residuals_of(rows, means, clusters, scale=0.5)
    for found, wanted, leaf in (
        (means, shares @ rows, rows),
        (spread(answers, clusters), membership.T @ answers, answers),
        (residuals, 0.5 * (rows - membership.T @ shares @ rows), rows),
    ):
        torch.testing.assert_close(found, wanted)
        grad = draw(len(found))
        torch.testing.assert_close(
            torch.autograd.grad(found, leaf, grad), torch.autograd.grad(wanted, leaf, grad)
        )


def test_means_of_bf16_are_added_in_float32() -> None:
    # In bf16 256 + 1 = 256.
    rows = torch.ones(257, 3, dtype=torch.bfloat16)
    rows[0] = 256.0
    _, clusters = clustered([(0, 0)] * 257, dtype=rows.dtype)
    assert torch.equal(centroids_of(rows, clusters), torch.full((1, 3), 512 / 257).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_alone_is_its_centroid_and_has_no_residual(dtype: torch.dtype) -> None:
    labels, clusters = clustered([(i % 3, i // 3) for i in range(12)], dtype=dtype)
    rows = torch.randn(len(labels), 4).to(dtype).requires_grad_()
    assert torch.equal(centroids_of(rows, clusters), rows)
    residuals = residuals_of(rows, rows, clusters)
    assert torch.equal(residuals, torch.zeros_like(rows))
    (grad,) = torch.autograd.grad(residuals, rows, torch.randn(len(labels), 4).to(dtype))
    assert torch.equal(grad, torch.zeros_like(rows))


@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    hidden_size=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_refining_moves_rows_to_the_nearest_mean_of_their_expert(
    sizes: list[int], hidden_size: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(BUCKETS, (sum(sizes),), generator=generator).tolist()
    experts = [expert for expert, size in enumerate(sizes) for _ in range(size)]
    labels, clusters = clustered(list(zip(experts, codes, strict=True)))
    rows = torch.randn(len(labels), hidden_size, generator=generator, dtype=torch.float64)
    num_clusters = [len({label for label in labels if label[0] == i}) for i in range(len(sizes))]
    refined = refine(rows, clusters, num_rows=sizes, num_clusters=num_clusters)
    centers = centroids_of(rows, clusters)
    expert_of = [expert for expert, number in enumerate(num_clusters) for _ in range(number)]
    for row, expert, found in zip(rows, experts, refined.of_row.tolist(), strict=True):
        distances = (centers - row).square().sum(dim=1)
        own = [float(d) for d, other in zip(distances, expert_of, strict=True) if other == expert]
        assert expert_of[found] == expert
        assert float(distances[found]) <= min(own) + 1e-12
    before, after = (
        float(residuals_of(rows, centroids_of(rows, c), c).square().sum())
        for c in (clusters, refined)
    )
    assert after <= before + 1e-12
