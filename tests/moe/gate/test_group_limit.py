"""Choosing in few groups: the best groups, and nothing outside of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.gate.group_limit import limit_to_groups
from moe.gate.group_sizes import why_no_groups


@given(
    num_groups=st.integers(1, 4),
    group_size=st.integers(1, 4),
    group_topk=st.integers(1, 4),
    per_group=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_the_best_groups_stay(
    num_groups: int, group_size: int, group_topk: int, per_group: int, seed: int
) -> None:
    group_topk, per_group = min(group_topk, num_groups), min(per_group, group_size)
    scores = torch.rand(5, num_groups * group_size, generator=torch.Generator().manual_seed(seed))
    limited = limit_to_groups(
        scores, topk=group_topk * per_group, num_groups=num_groups, group_topk=group_topk
    )
    for row, found in zip(scores.tolist(), limited.tolist(), strict=True):
        groups = [row[g * group_size : (g + 1) * group_size] for g in range(num_groups)]
        worth = [sum(sorted(group, reverse=True)[:per_group]) for group in groups]
        best = sorted(range(num_groups), key=lambda g: -worth[g])[:group_topk]
        for expert, (before, after) in enumerate(zip(row, found, strict=True)):
            assert after == (before if expert // group_size in best else float("-inf"))


@pytest.mark.parametrize(
    ("num_experts", "topk", "num_groups", "group_topk", "reason"),
    [
        (8, 2, 3, 1, "8 experts do not make 3 equal groups"),
        (8, 4, 2, 4, "4 groups cannot be chosen of 2"),
        (8, 3, 4, 2, "3 experts of a token are not equally many in each of 2 groups"),
        (8, 6, 4, 2, "2 groups of 2 hold fewer than 6 experts"),
    ],
)
def test_groups_that_cannot_be_are_refused(
    num_experts: int, topk: int, num_groups: int, group_topk: int, reason: str
) -> None:
    sizes = {"topk": topk, "num_groups": num_groups, "group_topk": group_topk}
    assert why_no_groups(num_experts=num_experts, **sizes) == reason
    with pytest.raises(ValueError, match=reason):
        limit_to_groups(torch.rand(1, num_experts), **sizes)
