"""When each micro-batch of a plan starts and ends, if ranks wait only for those they meet.

Ranks that share a sequence exchange blocks in every layer, so their micro-batches, a *meeting*,
start together when the last rank is ready and take as long as the slowest of them:

    start(M) = max over m in M of end(micro-batch before m on its rank)
    end(m)   = start(M) + max over n in M of seconds(n)       for every m in M

Everything else on a rank runs without waiting. The plan is first laid out in arrays: one entry per
piece, and one per micro-batch, rank by rank.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from parallel.errors import PlanError
from parallel.plan.cost import CostModel
from parallel.plan.joined import Joined, expert_rows
from parallel.plan.records import StepPlan

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


class SharedRing(NamedTuple):
    """Sequences that have the same micro-batches in the same order, and so travel together."""

    micro_batches: tuple[int, ...]
    """In ring order."""
    sequences: tuple[int, ...]
    block_tokens: int
    """Tokens of these sequences on the rank that holds most of them."""


@dataclass(frozen=True, slots=True)
class FlatPlan:
    """A plan in arrays; micro-batches are numbered rank by rank."""

    first: IntArray
    """[num_ranks + 1]: where the micro-batches of each rank begin."""
    seconds: FloatArray
    """[num_micro_batches]: own computation and g, without communication."""
    tokens: IntArray
    """[num_micro_batches]."""
    rings: tuple[SharedRing, ...]

    @property
    def num_ranks(self) -> int:
        return len(self.first) - 1


def flatten(plan: StepPlan, cost_model: CostModel) -> FlatPlan:
    """Lay out a plan. Raises PlanError where a rank holds one sequence in two micro-batches."""
    counts = [len(batches) for batches in plan.micro_batches]
    first = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
    num_pieces = [len(batch.pieces) for batches in plan.micro_batches for batch in batches]
    owner = np.repeat(np.arange(len(num_pieces)), num_pieces)
    table = plan.piece_table()
    sequence, start, end = table.T
    tokens = end - start
    work = cost_model.pieces_seconds(start, end)
    num_batches = len(num_pieces)
    return FlatPlan(
        first=first,
        seconds=np.asarray(np.bincount(owner, work, num_batches), float) + cost_model.fixed_seconds,
        tokens=np.bincount(owner, tokens, num_batches).astype(np.int64),
        rings=_rings(sequence, owner, start, tokens, num_batches, first),
    )


def _rings(
    sequence: IntArray,
    owner: IntArray,
    start: IntArray,
    tokens: IntArray,
    num_batches: int,
    first: IntArray,
) -> tuple[SharedRing, ...]:
    # One entry for each sequence and micro-batch that holds a part of it, sequence by sequence.
    pairs, inverse = np.unique(sequence * max(num_batches, 1) + owner, return_inverse=True)
    held = np.bincount(inverse, tokens, len(pairs)).astype(np.int64)
    of_sequence, batches = np.divmod(pairs, max(num_batches, 1))
    starts = np.flatnonzero(np.diff(of_sequence, prepend=-1))
    ends = np.append(starts[1:], len(pairs))[: len(starts)]
    # Ring order is that of the first pieces (`rings`).
    head = np.full(len(pairs), np.iinfo(np.int64).max)
    np.minimum.at(head, inverse, start)
    in_order = np.lexsort((head, of_sequence))
    found: dict[tuple[int, ...], list[int]] = {}
    blocks: dict[tuple[int, ...], IntArray] = {}
    for begin, stop in zip(starts.tolist(), ends.tolist(), strict=True):
        if stop - begin == 1:
            continue
        ranks = np.searchsorted(first, batches[begin:stop], side="right")
        if (np.diff(ranks) == 0).any():
            raise PlanError(
                f"a rank holds pieces of sequence {of_sequence[begin]} in two micro-batches; "
                "they belong in one"
            )
        members = in_order[begin:stop]
        key = tuple(batches[members].tolist())
        found.setdefault(key, []).append(int(of_sequence[begin]))
        blocks[key] = blocks.get(key, np.int64(0)) + held[members]
    return tuple(
        SharedRing(key, tuple(sequences), int(blocks[key].max()))
        for key, sequences in found.items()
    )


def meetings(flat: FlatPlan, *, expert_parallel_size: int = 1) -> list[list[int]]:
    """Micro-batches that must run together: those joined by rings, two or more each.

    With expert parallelism also those of equal index within each group of consecutive ranks.
    """
    joined: Joined[int] = Joined()
    first = flat.first.tolist()
    rows = (
        [first[rank] + index for rank in ranks]
        for index, ranks, _ in expert_rows(np.diff(flat.first).tolist(), expert_parallel_size)
    )
    for together in (*(ring.micro_batches for ring in flat.rings), *rows):
        for other in together[1:]:
            joined.join(together[0], other)
    return [list(group) for group in joined.groups()]


@dataclass(frozen=True, slots=True)
class Timeline:
    """Seconds from the start of the step; one entry per micro-batch of the flat plan."""

    start: FloatArray
    end: FloatArray


def run_in_lockstep(flat: FlatPlan, seconds: FloatArray, groups: list[list[int]]) -> Timeline:
    """Start and end of each micro-batch, which takes `seconds` on its own.

    Raises PlanError where two meetings wait for each other.
    """
    meeting_of = [-1] * len(seconds)
    for number, group in enumerate(groups):
        for batch in group:
            meeting_of[batch] = number
    missing = [len(group) for group in groups]
    ready = [0.0] * len(groups)
    own = seconds.tolist()
    start, end = [0.0] * len(own), [0.0] * len(own)
    bounds = flat.first.tolist()
    clock = [0.0] * flat.num_ranks
    cursor = bounds[:-1]
    rank_of = np.repeat(np.arange(flat.num_ranks), np.diff(flat.first)).tolist()
    movable = list(range(flat.num_ranks))
    while movable:
        rank = movable.pop()
        time, batch, stop = clock[rank], cursor[rank], bounds[rank + 1]
        while batch < stop and meeting_of[batch] < 0:
            start[batch] = time
            time += own[batch]
            end[batch] = time
            batch += 1
        clock[rank], cursor[rank] = time, batch
        if batch == stop:
            continue
        number = meeting_of[batch]
        ready[number] = max(ready[number], time)
        missing[number] -= 1
        if missing[number]:
            continue
        group = groups[number]
        finish = ready[number] + max(own[member] for member in group)
        for member in group:
            start[member], end[member] = ready[number], finish
            other = rank_of[member]
            clock[other], cursor[other] = finish, member + 1
            movable.append(other)
    if any(place < stop for place, stop in zip(cursor, bounds[1:], strict=True)):
        stuck = next(r for r in range(flat.num_ranks) if cursor[r] < bounds[r + 1])
        raise PlanError(
            f"the plan blocks: rank {stuck} waits in micro-batch {cursor[stuck] - bounds[stuck]} "
            "for a rank that waits for it"
        )
    return Timeline(np.array(start), np.array(end))
