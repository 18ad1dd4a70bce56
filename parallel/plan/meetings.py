"""Which micro-batches must run at the same time, and the order that keeps ranks from waiting
forever.

Micro-batches connected by shared sequences form a *meeting*: attention of each layer exchanges keys
and values among them, so all must be in the same operation. Experts connect more: the i-th
micro-batches of an expert-parallel group exchange tokens in each layer. The ordering rule:

    P = 1, no experts   "some rank runs meeting a before meeting b" has no circle;
    otherwise           a meeting's micro-batches have one index i on all their ranks, ranks of
                        an expert-parallel group run equally many, and with interleaved stages
                        each rank runs a positive multiple of P.

docs/hdp-ordering.md proves that no plan that obeys it deadlocks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

from parallel.errors import PlanError
from parallel.plan.joined import Joined, expert_rows
from parallel.plan.operations import check_interleaved_count
from parallel.plan.records import StepPlan

Place = tuple[int, int]
"""A micro-batch: its rank and its index in that rank's list."""

_MAX_NAMES = 8


@dataclass(frozen=True, slots=True)
class Meeting:
    """Micro-batches that run forward together, and backward together.

    Two or more, unless the other ranks of an expert-parallel group are absent.
    """

    members: tuple[Place, ...]
    """Ascending."""
    sequences: tuple[int, ...]
    """Shared by members, ascending; empty where only experts bring them together."""
    absent_ranks: tuple[int, ...] = ()
    """Ranks of a member's expert-parallel group that run no micro-batch of that index."""

    def __str__(self) -> str:
        sequences = _named("sequence", self.sequences) if self.sequences else "experts"
        members = [f"micro-batch {index} of rank {rank}" for rank, index in self.members]
        return f"the meeting over {sequences} ({_listed(members)})"


def find_meetings(plan: StepPlan, *, expert_parallel_size: int = 1) -> tuple[Meeting, ...]:
    """All meetings of a plan, in the order of their first members.

    expert_parallel_size: data-parallel ranks, consecutive, that exchange tokens with each other.
    """
    joined: Joined[Place] = Joined()
    # Where a sequence was seen first. Most are in one place only and cost no more than this.
    seen: dict[int, Place] = {}
    shared: set[int] = set()
    for rank, batches in enumerate(plan.micro_batches):
        for index, batch in enumerate(batches):
            place = (rank, index)
            for piece in batch.pieces:
                first = seen.setdefault(piece.sequence, place)
                if first != place:
                    joined.join(first, place)
                    shared.add(piece.sequence)
    absent: dict[Place, list[int]] = {}
    counts = [len(batches) for batches in plan.micro_batches]
    for index, present, missing in expert_rows(counts, expert_parallel_size):
        for rank in present:
            joined.join((present[0], index), (rank, index))
            absent[rank, index] = missing
    sequences: dict[Place, list[int]] = {}
    for sequence in sorted(shared):
        sequences.setdefault(joined.root(seen[sequence]), []).append(sequence)
    return tuple(
        Meeting(
            members=members,
            sequences=tuple(sequences.get(joined.root(members[0]), ())),
            absent_ranks=tuple(sorted({r for place in members for r in absent.get(place, ())})),
        )
        for members in joined.groups()
    )


def check_order(
    plan: StepPlan,
    *,
    num_pipeline_stages: int,
    expert_parallel_size: int = 1,
    num_model_chunks: int = 1,
) -> None:
    """Raise PlanError, naming ranks and micro-batches, unless the plan obeys the ordering rule.

    expert_parallel_size: data-parallel ranks, consecutive, that exchange tokens with each other.
    """
    if plan.num_ranks % expert_parallel_size:
        raise PlanError(
            f"{plan.num_ranks} ranks do not split into expert-parallel groups of "
            f"{expert_parallel_size}"
        )
    _check_counts(plan, num_pipeline_stages, expert_parallel_size, num_model_chunks)
    meetings = find_meetings(plan, expert_parallel_size=expert_parallel_size)
    for meeting in meetings:
        _check_one_for_each_rank(meeting)
    if num_pipeline_stages > 1 or expert_parallel_size > 1:
        for meeting in meetings:
            _check_one_index(meeting)
    else:
        _check_no_circle(meetings)


def _named(noun: str, numbers: Sequence[int]) -> str:
    """'rank 1', 'ranks 1, 2'; long lists are cut."""
    plural = noun if len(numbers) == 1 else f"{noun}s"
    return f"{plural} {_listed(list(map(str, numbers)))}"


def _check_counts(
    plan: StepPlan, num_pipeline_stages: int, expert_parallel_size: int, num_model_chunks: int
) -> None:
    if num_model_chunks > 1:
        for rank, batches in enumerate(plan.micro_batches):
            try:
                check_interleaved_count(len(batches), num_pipeline_stages=num_pipeline_stages)
            except PlanError as error:
                raise PlanError(f"rank {rank}: {error}") from None
    for first in range(0, plan.num_ranks, expert_parallel_size):
        last = first + expert_parallel_size - 1
        counts = [len(batches) for batches in plan.micro_batches[first : last + 1]]
        if min(counts) < max(counts):
            raise PlanError(
                f"ranks {first} to {last} are one expert-parallel group and run "
                f"{_listed(list(map(str, counts)))} micro-batches; they must run equally many: "
                f"fill up to {max(counts)} with empty ones"
            )


def _check_one_for_each_rank(meeting: Meeting) -> None:
    for (rank, index), (next_rank, next_index) in pairwise(meeting.members):
        if rank == next_rank:
            raise PlanError(
                f"micro-batches {index} and {next_index} of rank {rank} would have to run at the "
                f"same time: both belong to {meeting}"
            )


def _check_one_index(meeting: Meeting) -> None:
    rank, index = meeting.members[0]
    for other_rank, other_index in meeting.members:
        if other_index != index:
            raise PlanError(
                f"micro-batch {index} of rank {rank} and micro-batch {other_index} of rank "
                f"{other_rank} meet; with pipeline stages or experts they must have the same "
                f"index: both belong to {meeting}"
            )


def _check_no_circle(meetings: Sequence[Meeting]) -> None:
    """A total order of meetings that all ranks follow exists just where there is no circle."""
    # Each rank's meetings, in its order.
    by_rank: dict[int, list[tuple[int, int]]] = {}
    for number, meeting in enumerate(meetings):
        for rank, index in meeting.members:
            by_rank.setdefault(rank, []).append((index, number))
    # (earlier, later) -> a rank that runs them so.
    edges: dict[tuple[int, int], int] = {}
    sorter: TopologicalSorter[int] = TopologicalSorter()
    for rank, places in by_rank.items():
        for (_, earlier), (_, later) in pairwise(sorted(places)):
            sorter.add(later, earlier)
            edges.setdefault((earlier, later), rank)
    try:
        sorter.prepare()
    except CycleError as error:
        circle: list[int] = error.args[1]
        raise PlanError(
            "these ranks would wait for each other forever: "
            + _listed(list(_circle_steps(circle, meetings, edges)), separator="; ")
        ) from None


def _circle_steps(
    circle: Iterable[int], meetings: Sequence[Meeting], edges: Mapping[tuple[int, int], int]
) -> Iterator[str]:
    for earlier, later in pairwise(circle):
        rank = edges[earlier, later]
        first, second = (
            f"micro-batch {dict(meetings[number].members)[rank]} "
            f"({_named('sequence', meetings[number].sequences)})"
            for number in (earlier, later)
        )
        yield f"rank {rank} runs {first} before {second}"


def _listed(names: Sequence[str], *, separator: str = ", ") -> str:
    shown = separator.join(names[:_MAX_NAMES])
    more = len(names) - _MAX_NAMES
    return f"{shown} and {more} more" if more > 0 else shown
