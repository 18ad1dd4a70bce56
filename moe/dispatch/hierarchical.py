"""Two legs: a token crosses to each node once, and is passed on inside it.

Ranks of the group are laid out as nodes x ranks of a node. A token that is wanted somewhere on a
node goes to that rank there which has its sender's place, and from there once to each rank of the
node that wants it:

    out    (n, i) -> (n', i)   across   rows: different pairs (token, node)
           (n', i) -> (n', j)  inside   rows: different pairs (token, rank)
    home   inside first: a node's answers for a token are one row, summed, before they cross

Links between nodes are the slow ones; nothing crosses them twice, and each rank speaks to one rank
of each other node only (FSMoE, arXiv 2501.10714, section 3; DeepEP's two stages).

Counts go ahead once, over the whole group: each rank hears from every other what will be passed on
to it, so that no count waits for the first leg.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe.dispatch.channel import Channel
from moe.dispatch.exact import host_numbers, share_evenly
from moe.dispatch.hooks import Hooks
from moe.dispatch.leg import make_leg
from moe.dispatch.payload import Wire
from moe.dispatch.route import Choices, Route, end_route, wanted_by
from moe.dispatch.trip import RouteTrip, travel
from moe.records import Routing


@dataclass(frozen=True, slots=True)
class NodeGroups:
    """A group and how it is spread over nodes; rank n * ranks_per_node + i is place i of node n.

    Attributes:
        across: the ranks of this one's place, in the order of the nodes.
        inside: the ranks of this one's node, in the order of their places.
    """

    whole: dist.ProcessGroup
    across: dist.ProcessGroup
    inside: dist.ProcessGroup

    @property
    def node(self) -> int:
        return self.across.rank()

    @property
    def num_nodes(self) -> int:
        return self.across.size()

    @property
    def ranks_per_node(self) -> int:
        return self.inside.size()


def make_node_groups(group: dist.ProcessGroup, *, ranks_per_node: int) -> NodeGroups:
    """Every rank of `group` calls this together; ranks of other groups need not.

    Raises:
        ValueError: the group does not fill its nodes.
    """
    size, rank = group.size(), group.rank()
    if size % ranks_per_node:
        raise ValueError(f"{size} ranks do not fill nodes of {ranks_per_node}")
    ranks = dist.get_process_group_ranks(group)
    node, place = divmod(rank, ranks_per_node)
    first = node * ranks_per_node
    return NodeGroups(
        whole=group,
        inside=_subgroup(ranks[first : first + ranks_per_node]),
        across=_subgroup(ranks[place::ranks_per_node]),
    )


def _subgroup(ranks: list[int]) -> dist.ProcessGroup:
    group = dist.new_group(ranks, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group


class HierarchicalDispatcher:
    """For ranks on several nodes that share the experts evenly, in the order of their ranks.

    Attributes:
        whole: for counts.
        across, inside: for rows, and the numbers that go with them.
    """

    def __init__(self, groups: NodeGroups, *, wire: Wire | None = None) -> None:
        """wire: how rows are written, on both legs; by default as they are."""
        wire = wire or Wire()
        self.groups = groups
        self.whole = Channel(groups.whole)
        self.across = Channel(groups.across, wire)
        self.inside = Channel(groups.inside, wire)

    @property
    def channels(self) -> tuple[Channel, ...]:
        """One for each leg of a route, in their order."""
        return (self.across, self.inside)

    def dispatch(self, tokens: Tensor, routing: Routing, hooks: Hooks) -> RouteTrip:
        """Every rank of the group calls this together, also with no tokens.

        Raises:
            ValueError: the experts cannot be shared evenly.
        """
        (route,) = self.make_routes([routing])
        return travel(tokens, routing.weights, route, hooks)

    def make_routes(self, routings: Sequence[Routing]) -> list[Route]:
        """One for each chunk of tokens, with one exchange of counts and one wait for all.

        Every rank of the group calls this together, with as many chunks; some may be empty.
        """
        num_local = share_evenly(routings[0].num_experts, self.whole.size)
        num_nodes, ranks_per_node = self.groups.num_nodes, self.groups.ranks_per_node
        wanted_nodes = [
            wanted_by(r.experts // (num_local * ranks_per_node), num_destinations=num_nodes)
            for r in routings
        ]
        told, heard = self._exchange_counts(routings, wanted_nodes, num_local)
        local_counts = heard.experts.sum(dim=(0, 1))
        across_sent, across_received, inside_sent, inside_received, num_rows = host_numbers(
            told.to_node[:, self.groups.inside.rank()].t(),
            heard.to_node[:, self.groups.inside.rank()].t(),
            heard.passed_on[:, self.groups.inside.rank()].sum(dim=0),
            heard.to_rank.sum(dim=0).t(),
            local_counts.sum(dim=1)[:, None],
        )
        first = [
            make_leg(self.across, wanted, send_splits=sent, receive_splits=received)
            for wanted, sent, received in zip(
                wanted_nodes, across_sent, across_received, strict=True
            )
        ]
        crossing = [
            leg.start(Choices(r.experts, r.weights).packed(), "numbers")
            for leg, r in zip(first, routings, strict=True)
        ]
        second, passing = [], []
        first_of_node = self.groups.node * ranks_per_node
        for pending, sent, received in zip(crossing, inside_sent, inside_received, strict=True):
            numbers = pending.wait()
            place = Choices.unpacked(numbers).experts // num_local - first_of_node
            wanted = wanted_by(place, num_destinations=ranks_per_node)
            leg = make_leg(self.inside, wanted, send_splits=sent, receive_splits=received)
            second.append(leg)
            passing.append(leg.start(numbers, "numbers"))
        return [
            end_route(
                (first[chunk], second[chunk]),
                Choices.unpacked(passing[chunk].wait()),
                first_expert=self.groups.whole.rank() * num_local,
                counts=local_counts[chunk],
                num_rows=num_rows[chunk][0],
            )
            for chunk in range(len(routings))
        ]

    def _exchange_counts(
        self, routings: Sequence[Routing], wanted_nodes: Sequence[Tensor], num_local: int
    ) -> tuple[_Counts, _Counts]:
        """What this rank tells each other one, and hears from it."""
        groups = self.groups
        shape = (groups.num_nodes, groups.ranks_per_node)
        each = []
        for routing, wanted in zip(routings, wanted_nodes, strict=True):
            ranks = wanted_by(routing.experts // num_local, num_destinations=self.whole.size)
            to_rank = ranks.sum(dim=0).view(*shape)
            each.append(
                _Counts(
                    experts=routing.counts.view(*shape, num_local),
                    to_rank=to_rank,
                    to_node=wanted.sum(dim=0)[:, None].expand(shape),
                    passed_on=to_rank[:, None].expand(*shape, groups.ranks_per_node),
                ).packed()
            )
        told = torch.stack(each, dim=2)
        one_each = (1,) * self.whole.size
        heard = self.whole.start(told.flatten(0, 1), one_each, one_each, "numbers").wait()
        return _Counts.unpacked(told, num_local), _Counts.unpacked(heard.view_as(told), num_local)


@dataclass(frozen=True, slots=True)
class _Counts:
    """What a rank tells rank i of node n; leading sizes [num_nodes, ranks_per_node], and once
    unpacked, a third one of chunks.

    Attributes:
        experts: [..., num_local], choices of each of its experts.
        to_rank: rows for it.
        to_node: rows for its node.
        passed_on: [..., ranks_per_node], rows for each rank of its node.
    """

    experts: Tensor
    to_rank: Tensor
    to_node: Tensor
    passed_on: Tensor

    def packed(self) -> Tensor:
        singles = (self.to_rank[..., None], self.to_node[..., None])
        return torch.cat((*singles, self.experts, self.passed_on), dim=-1)

    @classmethod
    def unpacked(cls, numbers: Tensor, num_local: int) -> _Counts:
        return cls(
            to_rank=numbers[..., 0],
            to_node=numbers[..., 1],
            experts=numbers[..., 2 : 2 + num_local],
            passed_on=numbers[..., 2 + num_local :],
        )
