"""The plan of ranks that wait only at meetings: blocks of shared sequences, whole ones between.

Shared sequences are placed first (`blocks`), whole ones fill what is left (`fill`). How wide blocks
should be and which short sequences are better shared cannot be known beforehand: several ways are
tried, in one order, until one comes near the bound (`bound`) or enough has been tried. The best is
cut (`cuts`) and packed into micro-batches of at most C tokens.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from parallel.plan.blocks import Schedule, Style, place_blocks
from parallel.plan.bound import bound_seconds
from parallel.plan.candidates import Candidate, make_candidates
from parallel.plan.cost import CostModel
from parallel.plan.cuts import cut
from parallel.plan.fill import Fill, fill
from parallel.plan.offload_ratio import HostMemory, fewest_ranks
from parallel.plan.plan_writer import PlanWriter
from parallel.plan.records import Piece, StepPlan, most_tokens
from parallel.plan.uneven import UnevenCut, level_ends

# A plan this much over the bound is taken at once.
_GOOD_ENOUGH = 1.003
# Blocks may end this much after the bound, rather than take one more rank for a hair.
_SLACK = 1.002
# A rank that ends this much after the bound is worth an uneven cut.
_EVEN_ENOUGH = 1.001
# Sequences placed, of all tries together, after which the best is taken; two tries there are.
_EFFORT = 6000
_RANDOM_STYLES = 60


class _Sharing(NamedTuple):
    """Which sequences are shared, and by how many."""

    alone: float
    """Part of the bound above which a sequence is shared although one rank holds it."""
    communication_share: float
    """Of its work, what its exchange may cost."""
    against_idling: float
    """The same where ranks would be idle otherwise."""


_SHARINGS = (
    _Sharing(1.0, 0.003, 0.05),
    _Sharing(1.0, 0.02, 0.25),
    _Sharing(0.3, 0.02, 0.05),
    _Sharing(0.1, 0.003, 0.25),
)
"""The likeliest first."""


@dataclass(slots=True)
class _Try:
    """One layout and what it comes to."""

    step_seconds: float
    schedule: Schedule
    filled: Fill
    uneven: dict[int, UnevenCut]
    """By number of the block."""


def plan_free(
    lengths: Sequence[int],
    *,
    num_ranks: int,
    tokens_per_rank: int,
    cost_model: CostModel,
    host_memory: HostMemory | None = None,
) -> StepPlan:
    """Plan a step of sequences that num_ranks ranks can hold; ranks run at their own pace."""
    search = _Search(lengths, num_ranks, tokens_per_rank, cost_model, host_memory)
    return search.build(search.best())


def _even(_: Sequence[int], even: int) -> int:
    return even


def _fewest(options: Sequence[int], _: int) -> int:
    return options[0]


def _middle(options: Sequence[int], _: int) -> int:
    return options[len(options) // 2]


class _Search:
    """The lengths and limits of one step, and the tries."""

    def __init__(
        self,
        lengths: Sequence[int],
        num_ranks: int,
        tokens_per_rank: int,
        cost_model: CostModel,
        host_memory: HostMemory | None,
    ) -> None:
        self.lengths = lengths
        self.num_ranks = num_ranks
        self.capacity = tokens_per_rank
        self.cost_model = cost_model
        self.host_memory = host_memory
        offloadable = host_memory.offloadable if host_memory else 0.0
        self.target = bound_seconds(
            lengths,
            cost_model,
            num_ranks=num_ranks,
            tokens_per_rank=most_tokens(tokens_per_rank, offloadable),
        )
        length = np.asarray(lengths, dtype=np.int64)
        self.longest_first = np.argsort(-length, kind="stable").tolist()
        # A whole sequence fills its part of a micro-batch and pays that part of g.
        self.seconds = (
            cost_model.lengths_seconds(lengths)
            + cost_model.fixed_seconds * length / tokens_per_rank
        ).tolist()

    def best(self) -> _Try:
        best: _Try | None = None
        effort = 0
        for candidates, whole, style in self._ways():
            schedule = place_blocks(
                candidates,
                num_ranks=self.num_ranks,
                target=_SLACK * self.target,
                waiting_weight=0.5,
                style=style,
            )
            effort += len(candidates) + 1
            if best is None or self._hope(schedule, whole) < best.step_seconds:
                found = self._fill(schedule, whole)
                effort += len(whole)
                if best is None or found.step_seconds < best.step_seconds:
                    best = found
            if best.step_seconds <= _GOOD_ENOUGH * self.target or effort > max(
                _EFFORT, 1.5 * len(self.lengths)
            ):
                break
        assert best is not None
        return best

    def _ways(self) -> Iterator[tuple[list[Candidate], list[int], Style]]:
        """Which sequences to share, and how many ranks to choose; the likeliest first."""
        known: dict[_Sharing, tuple[list[Candidate], list[int]]] = {}

        def split(sharing: _Sharing) -> tuple[list[Candidate], list[int]]:
            if sharing not in known:
                known[sharing] = self._split(sharing)
            return known[sharing]

        for style in (_even, _fewest, _middle):
            yield *split(_SHARINGS[0]), style
        for sharing in _SHARINGS[1:]:
            for style in (_even, _fewest):
                yield *split(sharing), style
        # The same choices in every process.
        generator = random.Random(0)
        for number in range(_RANDOM_STYLES):
            sharing = _SHARINGS[number % len(_SHARINGS)]
            yield *split(sharing), lambda options, _: generator.choice(options)

    def _split(self, sharing: _Sharing) -> tuple[list[Candidate], list[int]]:
        """Candidates and whole sequences, longest first."""
        first = len(self.longest_first)
        for place, index in enumerate(self.longest_first):
            is_quick = self.seconds[index] <= sharing.alone * self.target
            if self.lengths[index] <= self.capacity and is_quick:
                first = place
                break
        shared, whole = self.longest_first[:first], self.longest_first[first:]
        lengths = [self.lengths[index] for index in shared]
        candidates = make_candidates(
            shared,
            lengths,
            [
                fewest_ranks(length, self.capacity, self.cost_model, self.host_memory)
                for length in lengths
            ],
            num_ranks=self.num_ranks,
            cost_model=self.cost_model,
            communication_share=sharing.communication_share,
            against_idling=sharing.against_idling,
            target=self.target,
        )
        return candidates, whole

    def _hope(self, schedule: Schedule, whole: Sequence[int]) -> float:
        """The step if whole sequences filled everything evenly."""
        rest = sum(self.seconds[index] for index in whole)
        return max(*schedule.busy, 0.0, self._mean(schedule, rest))

    def _mean(self, schedule: Schedule, rest: float) -> float:
        gaps = sum(gap.seconds for gap in schedule.gaps)
        return (sum(schedule.busy) + max(0.0, rest - gaps)) / self.num_ranks

    def _fill(self, schedule: Schedule, whole: Sequence[int]) -> _Try:
        target = max(self.target, *schedule.busy)
        filled = fill(schedule, whole, self.seconds, target=target)
        uneven = level_ends(
            schedule,
            filled,
            self.lengths,
            capacity=self.capacity,
            cost_model=self.cost_model,
            enough=_EVEN_ENOUGH * self.target,
        )
        return _Try(max(filled.busy), schedule, filled, uneven)

    def build(self, chosen: _Try) -> StepPlan:
        """Cut, pack and write down."""
        schedule, filled = chosen.schedule, chosen.filled
        writer = PlanWriter(
            self.lengths, self.num_ranks, self.capacity, self.cost_model, self.host_memory
        )
        before = {
            (gap.rank, gap.block): inside
            for gap, inside in zip(schedule.gaps, filled.in_gaps, strict=True)
            if inside
        }
        for number, block in enumerate(schedule.blocks):
            uneven = chosen.uneven.get(number)
            if uneven is None:
                parts = writer.cut(block.sequence, len(block.ranks))
            else:
                parts = cut(block.sequence, uneven.shares)
            for place, (rank, part) in enumerate(zip(block.ranks, parts, strict=True)):
                rows = writer.rows[rank]
                if before:
                    rows += self._pack(before.get((rank, number), ()))
                beside = writer.whole(uneven.whole[place]) if uneven else ()
                rows.append([*beside, *part])
        for rank, sequences in enumerate(filled.at_end):
            writer.rows[rank] += self._pack(sequences)
        return writer.plan()

    def _pack(self, sequences: Sequence[int]) -> list[list[Piece]]:
        """First fit, longest first."""
        lengths = self.lengths
        bins: list[list[Piece]] = []
        rooms: list[int] = []
        for sequence in sorted(sequences, key=lambda i: (-lengths[i], i)):
            length = lengths[sequence]
            for place, room in enumerate(rooms):
                if room >= length:
                    rooms[place] = room - length
                    bins[place].append(Piece(sequence, 0, length))
                    break
            else:
                rooms.append(self.capacity - length)
                bins.append([Piece(sequence, 0, length)])
        return bins
