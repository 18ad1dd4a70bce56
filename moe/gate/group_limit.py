"""Choosing among few groups of experts, so that a token travels to few nodes.

Experts stand in groups of equal size (one group a node). The score of a group is the sum of its
best topk/group_topk experts; a token chooses its experts in the `group_topk` best groups only
(DeepSeek-V3, 2412.19437, section 2.1.2; V2 took the best expert alone for a group's score, which
this is where topk = group_topk).
"""

from __future__ import annotations

from torch import Tensor

from moe.gate.group_sizes import why_no_groups


def limit_to_groups(scores: Tensor, *, topk: int, num_groups: int, group_topk: int) -> Tensor:
    """The scores with -inf outside of each token's best groups.

    Args:
        scores: [num_tokens, num_experts], those by which experts are chosen.

    Raises:
        ValueError: groups that cannot be, or that hold too few experts.
    """
    num_experts = scores.shape[-1]
    if reason := why_no_groups(
        num_experts=num_experts, topk=topk, num_groups=num_groups, group_topk=group_topk
    ):
        raise ValueError(reason)
    grouped = scores.view(-1, num_groups, num_experts // num_groups)
    of_group = grouped.topk(topk // group_topk, dim=-1).values.sum(dim=-1)
    best = of_group.topk(group_topk, dim=-1).indices
    is_out = of_group.new_ones(of_group.shape).scatter_(1, best, 0.0).bool()
    return grouped.masked_fill(is_out[..., None], float("-inf")).view_as(scores)
