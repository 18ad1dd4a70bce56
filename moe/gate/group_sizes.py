"""Which groups of experts a choice can be limited to; without torch, for checking settings."""

from __future__ import annotations


def why_no_groups(*, num_experts: int, topk: int, num_groups: int, group_topk: int) -> str:
    """Why a choice cannot be limited like this; empty where it can."""
    if num_experts % num_groups:
        return f"{num_experts} experts do not make {num_groups} equal groups"
    if group_topk > num_groups:
        return f"{group_topk} groups cannot be chosen of {num_groups}"
    if topk % group_topk:
        return f"{topk} experts of a token are not equally many in each of {group_topk} groups"
    if topk // group_topk > num_experts // num_groups:
        return f"{group_topk} groups of {num_experts // num_groups} hold fewer than {topk} experts"
    return ""
