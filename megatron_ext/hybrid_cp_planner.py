"""megatron-core's own scheduler of hybrid context parallelism as one more planner: the peer.

`BalancedCPScheduler` gives every sequence a power of two of ranks, packs nothing, and returns
groups in which each rank has a list of sequences to run one by one. The groups are taken as they
come; the barrier that megatron puts behind each of them is not (our executor needs none), which
favours the peer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from parallel.errors import PlanError
from parallel.plan.cuts import even_cut
from parallel.plan.records import MicroBatch, Piece, StepPlan


@dataclass(frozen=True, slots=True)
class _GroupOfSize:
    """All that the scheduler asks of a process group."""

    num_ranks: int

    def size(self) -> int:
        return self.num_ranks


def plan_hybrid_cp(lengths: Sequence[int], *, num_ranks: int, tokens_per_rank: int) -> StepPlan:
    """The plan of megatron's scheduler.

    Args:
        lengths: tokens of each sequence.
        num_ranks: data-parallel ranks; a power of two.
        tokens_per_rank: megatron's max_seq_len_per_rank.

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
    from megatron.core.pipeline_parallel.hybrid_cp_schedule import BalancedCPScheduler

    scheduler: Any = BalancedCPScheduler(
        max_seq_len_per_rank=tokens_per_rank, dp_cp_group=_GroupOfSize(num_ranks)
    )
    numbered = [(index, length) for index, length in enumerate(lengths) if length > 0]
    _, groups = scheduler.get_groups_and_subsamples(numbered, None)
    micro_batches: list[list[MicroBatch]] = [[] for _ in range(num_ranks)]
    for group in groups:
        for rank, pieces in enumerate(_pieces_of_group(group, lengths, num_ranks)):
            micro_batches[rank] += [MicroBatch(piece) for piece in pieces]
    return StepPlan(
        lengths=tuple(lengths),
        tokens_per_rank=tokens_per_rank,
        micro_batches=tuple(map(tuple, micro_batches)),
    )


def _pieces_of_group(
    group: Sequence[Sequence[int]], lengths: Sequence[int], num_ranks: int
) -> list[list[tuple[Piece, ...]]]:
    """For each rank, the pieces of each sequence in the scheduler's order."""
    ranks_of: dict[int, list[int]] = {}
    for rank, sequences in enumerate(group):
        for sequence in sequences:
            ranks_of.setdefault(sequence, []).append(rank)
    cuts = {
        sequence: dict(zip(ranks, even_cut(sequence, lengths[sequence], len(ranks)), strict=True))
        for sequence, ranks in ranks_of.items()
    }
    return [
        [cuts[sequence][rank] for sequence in (group[rank] if rank < len(group) else ())]
        for rank in range(num_ranks)
    ]
