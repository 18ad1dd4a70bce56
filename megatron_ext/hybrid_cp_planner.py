"""megatron-core's own scheduler of hybrid context parallelism as one more planner: the peer.

`BalancedCPScheduler` gives every sequence a power of two of ranks, packs nothing, and returns
groups in which each rank has a list of sequences to run one by one. The groups are taken as they
come; the barrier that megatron puts behind each of them is not (our executor needs none), which
favours the peer.

The scheduler knows no pipeline and no experts over data-parallel ranks. There all ranks of a
sequence must run it as their micro-batch of one index (`parallel.plan.meetings`), so empty ones are
put before it where a rank would be early, and behind the last where groups of experts or
interleaved stages ask for equal or rounded numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parallel.errors import PlanError
from parallel.plan.cuts import even_cut
from parallel.plan.records import MicroBatch, StepPlan


@dataclass(frozen=True, slots=True)
class _GroupOfSize:
    """All that the scheduler asks of a process group."""

    num_ranks: int

    def size(self) -> int:
        return self.num_ranks


def plan_hybrid_cp(
    lengths: Sequence[int],
    *,
    num_ranks: int,
    tokens_per_rank: int,
    num_pipeline_stages: int = 1,
    num_micro_batches_multiple: int = 1,
    expert_parallel_size: int = 1,
) -> StepPlan:
    """The plan of megatron's scheduler.

    Args:
        lengths: tokens of each sequence.
        num_ranks: data-parallel ranks; a power of two.
        tokens_per_rank: megatron's max_seq_len_per_rank.
        num_pipeline_stages: with more than one, shared sequences have one index.
        num_micro_batches_multiple: every rank's number of micro-batches is one of this.
        expert_parallel_size: groups of so many consecutive ranks run equally many, and shared
            sequences have one index.

    Raises:
        PlanError: num_ranks is not a power of two, or a sequence needs more ranks than there are.
    """
    if num_ranks & (num_ranks - 1):
        raise PlanError(
            f"megatron's scheduler wants a power of two of data-parallel ranks, not {num_ranks}; "
            "use planner hdp"
        )
    longest = max(lengths, default=0)
    if longest > num_ranks * tokens_per_rank:
        raise PlanError(
            f"a sequence of {longest} tokens is longer than {num_ranks} ranks x {tokens_per_rank} "
            "tokens; cut sequences, or raise tokens_per_rank"
        )
    orders = _orders(lengths, num_ranks, tokens_per_rank)
    ranks_of: dict[int, list[int]] = {}
    for rank, order in enumerate(orders):
        for sequence in order:
            ranks_of.setdefault(sequence, []).append(rank)
    rows: list[list[int | None]] = [list(order) for order in orders]
    if num_pipeline_stages > 1 or expert_parallel_size > 1:
        rows = _with_one_index(orders, ranks_of)
    _fill_up(rows, multiple=num_micro_batches_multiple, group_size=expert_parallel_size)
    pieces = {
        sequence: dict(zip(ranks, even_cut(sequence, lengths[sequence], len(ranks)), strict=True))
        for sequence, ranks in ranks_of.items()
    }
    return StepPlan(
        lengths=tuple(lengths),
        tokens_per_rank=tokens_per_rank,
        micro_batches=tuple(
            tuple(MicroBatch(() if i is None else pieces[i][rank]) for i in row)
            for rank, row in enumerate(rows)
        ),
    )


def _orders(lengths: Sequence[int], num_ranks: int, tokens_per_rank: int) -> list[list[int]]:
    """The scheduler's groups one behind the other: which sequences each rank runs, in order."""
    from megatron.core.pipeline_parallel.hybrid_cp_schedule import BalancedCPScheduler

    scheduler: Any = BalancedCPScheduler(
        max_seq_len_per_rank=tokens_per_rank, dp_cp_group=_GroupOfSize(num_ranks)
    )
    numbered = [(index, length) for index, length in enumerate(lengths) if length > 0]
    _, groups = scheduler.get_groups_and_subsamples(numbered, None)
    orders: list[list[int]] = [[] for _ in range(num_ranks)]
    for group in groups:
        for rank, sequences in enumerate(group):
            orders[rank] += sequences
    return orders


def _with_one_index(
    orders: Sequence[Sequence[int]], ranks_of: Mapping[int, Sequence[int]]
) -> list[list[int | None]]:
    """The orders with None before a shared sequence on ranks that would run it too early.

    Raises:
        PlanError: ranks have two shared sequences in opposite orders.
    """
    rows: list[list[int | None]] = [[] for _ in orders]
    cursor = [0] * len(orders)
    # How many ranks of a sequence have come to it.
    num_ready = dict.fromkeys(ranks_of, 0)
    movable = list(range(len(orders)))
    while movable:
        rank = movable.pop()
        if cursor[rank] == len(orders[rank]):
            continue
        sequence = orders[rank][cursor[rank]]
        num_ready[sequence] += 1
        members = ranks_of[sequence]
        if num_ready[sequence] < len(members):
            continue
        index = max(len(rows[member]) for member in members)
        for member in members:
            rows[member] += [*[None] * (index - len(rows[member])), sequence]
            cursor[member] += 1
        movable += members
    if any(place < len(order) for place, order in zip(cursor, orders, strict=True)):
        stuck = next(r for r, order in enumerate(orders) if cursor[r] < len(order))
        raise PlanError(
            f"megatron's scheduler has rank {stuck} run sequence {orders[stuck][cursor[stuck]]} "
            "before one that other ranks run first; use planner hdp"
        )
    return rows


def _fill_up(rows: Sequence[list[int | None]], *, multiple: int, group_size: int) -> None:
    """Append None until numbers are equal in each group and multiples, at least one of them."""
    fewest = 1 if multiple > 1 else 0
    for first in range(0, len(rows), group_size):
        group = rows[first : first + group_size]
        count = -(-max(fewest, *map(len, group)) // multiple) * multiple
        for row in group:
            row += [None] * (count - len(row))
