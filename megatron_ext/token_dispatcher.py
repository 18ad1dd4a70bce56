"""How tokens travel between the ranks that share the experts: which dispatcher, over which groups.

    local         one rank has all experts
    exact         one all-to-all, a token once to each rank
    hierarchical  two legs, a token once to each node and then on inside it
    deep_ep       DeepEP's kernels

All of them give the same sums. `auto` is hierarchical where the group spans several nodes with
several ranks each, and exact otherwise.
"""

from __future__ import annotations

import torch.distributed as dist

from megatron_ext.config import Config
from megatron_ext.dispatcher_rules import layout_problem
from megatron_ext.errors import UserError
from megatron_ext.launch.ranks import discover
from megatron_ext.moe_config import MoEConfig
from moe.dispatch.deepep import DeepEPDispatcher, has_deep_ep
from moe.dispatch.exact import ExactDispatcher
from moe.dispatch.hierarchical import HierarchicalDispatcher, NodeGroups, make_node_groups
from moe.dispatch.local import LocalDispatcher
from moe.dispatch.payload import Wire
from moe.dispatch.protocol import Dispatcher


def choose_dispatcher(
    moe: MoEConfig, *, group: dist.ProcessGroup, node_groups: NodeGroups | None
) -> Dispatcher:
    """For one layer.

    Args:
        group: ranks that share the experts.
        node_groups: see `expert_node_groups`.

    Raises:
        UserError: deep_ep was asked for and cannot run here.
    """
    if group.size() == 1:
        return LocalDispatcher()
    if moe.moe_token_dispatcher_type == "deep_ep":
        availability = has_deep_ep()
        if not availability:
            raise UserError(
                f"moe.moe_token_dispatcher_type=deep_ep cannot run here: {availability.reason}; "
                "use auto, exact or hierarchical"
            )
        return DeepEPDispatcher(group)
    return legged_dispatcher(group, node_groups, wire=Wire())


def legged_dispatcher(
    group: dist.ProcessGroup, node_groups: NodeGroups | None, *, wire: Wire
) -> ExactDispatcher | HierarchicalDispatcher:
    """One whose trips are legs, which can be cut into chunks and written in 8 bits."""
    if node_groups is not None:
        return HierarchicalDispatcher(node_groups, wire=wire)
    return ExactDispatcher(group, wire=wire)


def expert_node_groups(config: Config, group: dist.ProcessGroup) -> NodeGroups | None:
    """Groups within and between nodes where tokens travel hierarchically, else None.

    Every rank of `group` calls this together, once in a run.

    Raises:
        UserError: hierarchical was asked for, and the group does not fill its nodes.
    """
    kind, size = config.moe.moe_token_dispatcher_type, group.size()
    if size == 1 or config.moe.num_moe_experts is None or kind in ("exact", "deep_ep"):
        return None
    ranks_per_node = config.parallel.ranks_per_node or _launched_ranks_per_node()
    if problem := layout_problem(size, ranks_per_node):
        if kind == "auto":
            return None
        raise UserError(f"moe.moe_token_dispatcher_type=hierarchical: {problem}")
    ranks_per_node = min(ranks_per_node, size)
    if kind == "auto" and (ranks_per_node == 1 or ranks_per_node == size):
        return None
    return make_node_groups(group, ranks_per_node=ranks_per_node)


def _launched_ranks_per_node() -> int:
    """As the launcher says; without one all ranks are on one node."""
    world_size = dist.get_world_size()
    info = discover()
    return info.local_world_size if info.world_size == world_size else world_size
