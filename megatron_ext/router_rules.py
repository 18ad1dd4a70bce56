"""What must hold between the fields of `moe` that say how a router chooses."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ext.moe_config import MoEConfig
from moe.gate.group_sizes import why_no_groups


def router_rules(moe: MoEConfig) -> Iterator[str]:
    """Each broken rule, with what would work; experts are there."""
    is_expert_choice = moe.moe_router_type == "expert_choice"
    if moe.moe_router_score_function == "sigmoid" and moe.moe_router_pre_softmax:
        yield (
            "moe.moe_router_pre_softmax=true does nothing with moe.moe_router_score_function="
            "sigmoid; leave one of them out"
        )
    if moe.moe_router_enable_expert_bias and (
        moe.moe_router_score_function != "sigmoid" or is_expert_choice
    ):
        yield (
            "moe.moe_router_enable_expert_bias needs moe.moe_router_score_function=sigmoid and "
            "tokens that choose (moe.moe_router_type=topk, noisy_topk or x_moe)"
        )
    if moe.moe_router_projection_size is not None and moe.moe_router_type != "x_moe":
        yield (
            f"moe.moe_router_projection_size={moe.moe_router_projection_size} is for "
            f"moe.moe_router_type=x_moe, not {moe.moe_router_type}"
        )
    if moe.moe_router_type == "noisy_topk" and moe.moe_router_warmup_steps:
        yield (
            f"moe.moe_router_warmup_steps={moe.moe_router_warmup_steps} and "
            "moe.moe_router_type=noisy_topk are two kinds of noise; leave one of them out"
        )
    if moe.moe_token_drop_policy != "probs" and (
        moe.moe_expert_capacity_factor is None or is_expert_choice
    ):
        yield (
            f"moe.moe_token_drop_policy={moe.moe_token_drop_policy} does nothing where no token is "
            "dropped; set moe.moe_expert_capacity_factor (and another moe.moe_router_type than "
            "expert_choice)"
        )
    yield from _group_rules(moe)


def _group_rules(moe: MoEConfig) -> Iterator[str]:
    num_groups, group_topk = moe.moe_router_num_groups, moe.moe_router_group_topk
    named = f"moe.moe_router_num_groups={num_groups} and moe.moe_router_group_topk={group_topk}"
    if num_groups is None and group_topk is None:
        return
    if num_groups is None or group_topk is None:
        yield f"{named}: set both, or neither"
        return
    if moe.moe_router_type == "expert_choice":
        yield f"{named} limit what tokens choose; with moe.moe_router_type=expert_choice none do"
        return
    assert moe.num_moe_experts is not None
    if reason := why_no_groups(
        num_experts=moe.num_moe_experts,
        topk=moe.moe_router_topk,
        num_groups=num_groups,
        group_topk=group_topk,
    ):
        yield f"{named}: {reason} (moe.moe_router_topk={moe.moe_router_topk})"
