"""The simulator: known times, a plain reference, and no deadlock where the ordering rule holds."""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import PlanError
from parallel.plan.meetings import check_order, find_meetings
from parallel.plan.operations import Compute, Exchange, Operation, stage_operations
from parallel.plan.records import MicroBatch, Piece, StepPlan
from parallel.plan.simulate import Simulation, simulate

Place = tuple[int, int]


def make_plan(counts: Sequence[int], rings: Sequence[Sequence[Place]]) -> StepPlan:
    """Ranks with so many micro-batches; a ring is (rank, index) of each piece of a sequence."""
    held: list[list[list[Piece]]] = [[[] for _ in range(count)] for count in counts]
    for sequence, ring in enumerate(rings):
        for token, (rank, index) in enumerate(ring):
            held[rank][index].append(Piece(sequence, token, token + 1))
    return StepPlan(
        lengths=tuple(map(len, rings)),
        tokens_per_rank=1 + len(rings),
        micro_batches=tuple(tuple(MicroBatch(tuple(pieces)) for pieces in rank) for rank in held),
    )


def three_seconds(rank: int, index: int) -> float:
    """1 forward, 2 backward."""
    return 3.0


# Known times.


def test_one_stage_runs_one_after_the_other() -> None:
    simulation = simulate(make_plan([2, 0, 1], []), seconds=[[3.0, 6.0], [], [1.5]])
    assert simulation.step_seconds == 9.0
    assert simulation.busy_seconds == 10.5
    assert simulation.idle_share == pytest.approx(1 - 10.5 / 27)
    first = simulation.timelines[0]
    assert (first.rank, first.stage) == (0, 0)
    assert first.operations == (
        Compute(True, 0),
        Compute(False, 0),
        Compute(True, 1),
        Compute(False, 1),
    )
    assert first.start_seconds.tolist() == [0.0, 1.0, 3.0, 5.0]
    assert first.end_seconds.tolist() == [1.0, 3.0, 5.0, 9.0]


def test_a_meeting_starts_and_ends_together() -> None:
    # Rank 1 comes later, rank 0 is slower: forward at 3..6, backward at 6..12.
    plan = make_plan([1, 2], [[(0, 0), (1, 1)]])
    simulation = simulate(plan, seconds=[[9.0], [3.0, 6.0]])
    assert simulation.timelines[0].start_seconds.tolist() == [3.0, 6.0]
    assert simulation.timelines[1].start_seconds.tolist() == [0.0, 1.0, 3.0, 6.0]
    assert simulation.step_seconds == 12.0
    assert simulation.idle_share == pytest.approx(1 - 18 / 24)


def test_nothing_to_do() -> None:
    simulation = simulate(make_plan([0, 0], []), seconds=three_seconds, num_pipeline_stages=2)
    assert simulation.step_seconds == 0.0
    assert simulation.idle_share == 0.0


@given(st.integers(1, 12), st.integers(1, 8))
def test_one_forward_one_backward(num: int, num_stages: int) -> None:
    """(m + P - 1) t, and P - 1 of m + P - 1 idle."""
    simulation = simulate(
        make_plan([num], []), seconds=three_seconds, num_pipeline_stages=num_stages
    )
    assert simulation.step_seconds == pytest.approx(3 * (num + num_stages - 1))
    assert simulation.idle_share == pytest.approx((num_stages - 1) / (num + num_stages - 1))


@given(st.integers(1, 4), st.integers(2, 6), st.integers(2, 4))
def test_interleaved_stages_wait_less(groups: int, num_stages: int, num_chunks: int) -> None:
    """(m + (P - 1) / V) t."""
    num = groups * num_stages
    simulation = simulate(
        make_plan([num], []),
        seconds=three_seconds,
        num_pipeline_stages=num_stages,
        num_model_chunks=num_chunks,
    )
    assert simulation.step_seconds == pytest.approx(3 * (num + (num_stages - 1) / num_chunks))


# Deadlocks by hand.


@pytest.mark.parametrize(
    ("counts", "rings", "settings", "report"),
    [
        (
            [2, 2],
            [[(0, 0), (1, 1)], [(0, 1), (1, 0)]],
            {},
            "deadlock, each waits for the next and the last for the first:\n"
            "  rank 0: forward of micro-batch 0, part of the meeting over sequence "
            "0 (micro-batch 0 of rank 0, micro-batch 1 of rank 1)\n"
            "  rank 1: forward of micro-batch 0, part of the meeting over sequence "
            "1 (micro-batch 1 of rank 0, micro-batch 0 of rank 1)",
        ),
        # One order on both ranks, but rank 1's first meeting comes one micro-batch later: where
        # rank 0 is ready to go backward, rank 1 goes forward once more.
        (
            [3, 3],
            [[(0, 0), (1, 1)], [(0, 2), (1, 2)]],
            {"num_pipeline_stages": 2},
            "deadlock, each waits for the next and the last for the first:\n"
            "  rank 0, stage 0: backward of micro-batch 0, part of the meeting over sequence "
            "0 (micro-batch 0 of rank 0, micro-batch 1 of rank 1)\n"
            "  rank 1, stage 0: forward of micro-batch 2, part of the meeting over sequence "
            "1 (micro-batch 2 of rank 0, micro-batch 2 of rank 1)",
        ),
        (
            [4, 8],
            [[(0, 0), (1, 4)], [(0, 3), (1, 5)]],
            {"num_pipeline_stages": 4, "num_model_chunks": 2},
            "rank 0, stage 2: backward of micro-batch 0",
        ),
        # Three ranks wait in a circle.
        (
            [2, 2, 2],
            [[(0, 0), (1, 1)], [(1, 0), (2, 1)], [(2, 0), (0, 1)]],
            {},
            "rank 2: forward of micro-batch 0",
        ),
        # A sequence in two micro-batches of a rank.
        ([2], [[(0, 0), (0, 1)]], {}, "rank 0: forward of micro-batch 0"),
        # No two stages disagree: the circle goes through both pipelines.
        (
            [4, 2],
            [[(0, 0), (1, 0)], [(0, 3), (1, 1)]],
            {"num_pipeline_stages": 3},
            "deadlock, each waits for the next and the last for the first:\n"
            "  rank 0, stage 0: sending activations of micro-batch 2 and receiving gradients of "
            "micro-batch 0\n"
            "  rank 0, stage 1: backward of micro-batch 0, part of the meeting over sequence 0 "
            "(micro-batch 0 of rank 0, micro-batch 0 of rank 1)\n"
            "  rank 1, stage 1: receiving activations of micro-batch 1\n"
            "  rank 1, stage 0: forward of micro-batch 1, part of the meeting over sequence 1 "
            "(micro-batch 3 of rank 0, micro-batch 1 of rank 1)",
        ),
        # Ranks of an expert-parallel group with unequal numbers.
        (
            [2, 1],
            [],
            {"expert_parallel_size": 2},
            "deadlock, each waits for the next:\n"
            "  rank 0: forward of micro-batch 1, part of the meeting over experts "
            "(micro-batch 1 of rank 0)\n"
            "  rank 1: has ended its step",
        ),
        # A meeting at another index of the same group of experts.
        ([2, 2], [[(0, 0), (1, 1)]], {"expert_parallel_size": 2}, "over sequence 0"),
    ],
)
def test_finds_deadlocks(
    counts: list[int], rings: list[list[Place]], settings: dict[str, int], report: str
) -> None:
    plan = make_plan(counts, rings)
    with pytest.raises(PlanError, match=re.escape(report)):
        simulate(plan, seconds=three_seconds, **settings)
    with pytest.raises(PlanError):
        check_order(plan, **{"num_pipeline_stages": 1} | settings)


def test_a_shift_need_not_deadlock() -> None:
    """Equal indices are more than necessary; the rule has them because they are always enough."""
    plan = make_plan([3, 3], [[(0, 0), (1, 1)], [(0, 1), (1, 2)]])
    simulate(plan, seconds=three_seconds, num_pipeline_stages=2)
    with pytest.raises(PlanError):
        check_order(plan, num_pipeline_stages=2)


def test_long_circles_are_cut() -> None:
    rings = [[(rank, 0), ((rank + 1) % 12, 1)] for rank in range(12)]
    with pytest.raises(PlanError) as raised:
        simulate(make_plan([2] * 12, rings), seconds=three_seconds)
    lines = str(raised.value).splitlines()
    assert len(lines) == 10
    assert lines[8] == "  ... 4 more ..."


# Random plans.


@dataclass(frozen=True, slots=True)
class Layout:
    plan: StepPlan
    num_stages: int
    num_chunks: int
    expert_size: int

    def check(self) -> None:
        check_order(
            self.plan,
            num_pipeline_stages=self.num_stages,
            num_model_chunks=self.num_chunks,
            expert_parallel_size=self.expert_size,
        )

    def seconds(self, rank: int, index: int) -> float:
        return 1.0 + (7 * rank + 3 * index) % 5

    def simulate(self) -> Simulation:
        return simulate(
            self.plan,
            seconds=self.seconds,
            num_pipeline_stages=self.num_stages,
            num_model_chunks=self.num_chunks,
            expert_parallel_size=self.expert_size,
        )


def random_layout(generator: random.Random, *, is_orderly: bool) -> Layout:
    """Any numbers of micro-batches and any meetings; orderly ones obey the ordering rule."""
    num_stages = generator.randint(1, 4)
    num_chunks = generator.randint(1, 2) if num_stages > 1 else 1
    expert_size = generator.choice([1, 1, 2, 4])
    num_ranks = expert_size * generator.randint(1, 8 // expert_size)
    multiple = num_stages if num_chunks > 1 else 1
    counts: list[int] = []
    for _ in range(num_ranks // expert_size):
        count = multiple * generator.randint(min(1, multiple - 1), 6 // multiple)
        counts += [count] * expert_size
    rings: list[list[Place]]
    if not is_orderly:
        rings = []
        for _ in range(generator.randint(0, 4)):
            ranks = [rank for rank in range(num_ranks) if counts[rank]]
            size = generator.randint(0, min(4, len(ranks)))
            rings.append(
                [
                    (rank, generator.randrange(counts[rank]))
                    for rank in generator.sample(ranks, size)
                ]
            )
    elif num_stages > 1 or expert_size > 1:
        rings = [
            [(rank, index) for rank in generator.sample(ranks, generator.randint(1, len(ranks)))]
            for index in range(max(counts))
            if (ranks := [rank for rank in range(num_ranks) if counts[rank] > index])
            for _ in range(generator.randint(0, 3))
        ]
    else:
        # Ranks join meetings in one order for all, and have micro-batches of their own between.
        counts = [0] * num_ranks
        rings = []
        for _ in range(generator.randint(0, 10)):
            counts = [count + (generator.random() < 0.3) for count in counts]
            ranks = generator.sample(range(num_ranks), generator.randint(1, num_ranks))
            rings.append([(rank, counts[rank]) for rank in ranks])
            counts = [count + (rank in ranks) for rank, count in enumerate(counts)]
    return Layout(make_plan(counts, rings), num_stages, num_chunks, expert_size)


@given(st.randoms(use_true_random=False))
def test_orderly_plans_never_deadlock(generator: random.Random) -> None:
    layout = random_layout(generator, is_orderly=True)
    layout.check()
    simulation = layout.simulate()
    busy = 0.0
    for timeline in simulation.timelines:
        starts, ends = timeline.start_seconds, timeline.end_seconds
        assert len(starts) == len(ends) == len(timeline.operations)
        assert (ends >= starts).all()
        assert (starts[1:] >= ends[:-1]).all()
        batches = range(len(layout.plan.micro_batches[timeline.rank]))
        busy += sum(layout.seconds(timeline.rank, index) for index in batches)
        assert simulation.step_seconds >= ends.max(initial=0.0)
    assert simulation.busy_seconds == pytest.approx(busy)
    assert -1e-9 <= simulation.idle_share < 1.0


def test_all_kinds_of_orderly_plans_are_tried() -> None:
    kinds = Counter[str]()
    for seed in range(300):
        layout = random_layout(random.Random(seed), is_orderly=True)
        layout.check()
        layout.simulate()
        counts = [len(batches) for batches in layout.plan.micro_batches]
        kinds["pipeline"] += layout.num_stages > 1
        kinds["interleaved"] += layout.num_chunks > 1
        kinds["experts"] += layout.expert_size > 1
        kinds["one stage"] += layout.num_stages == layout.expert_size == 1
        kinds["unequal numbers"] += len(set(counts)) > 1
        kinds["fewer than warm-up"] += min(counts) < layout.num_stages - 1
        kinds["meetings"] += bool(find_meetings(layout.plan))
    assert min(kinds.values()) > 20, kinds
    assert len(kinds) == 7


@given(st.randoms(use_true_random=False))
def test_any_plan_is_as_the_reference_says(generator: random.Random) -> None:
    """End of every operation by the formula, or deadlock in both; none where the rule holds."""
    layout = random_layout(generator, is_orderly=False)
    try:
        expected = Reference(layout).all_ends()
    except RecursionError:
        with pytest.raises(PlanError, match="deadlock"):
            layout.simulate()
        with pytest.raises(PlanError):
            layout.check()
        return
    simulation = layout.simulate()
    for timeline, ends in zip(simulation.timelines, expected, strict=True):
        np.testing.assert_allclose(timeline.end_seconds, ends, rtol=1e-12)
    if layout.num_stages == layout.expert_size == 1:
        # There the rule is necessary, too.
        layout.check()


def test_random_plans_deadlock_often_and_are_found() -> None:
    found = Counter[tuple[bool, bool]]()
    for seed in range(400):
        layout = random_layout(random.Random(seed), is_orderly=False)
        is_pipeline = layout.num_stages > 1
        try:
            layout.simulate()
        except PlanError:
            found[is_pipeline, True] += 1
            with pytest.raises(PlanError):
                layout.check()
        else:
            found[is_pipeline, False] += 1
    assert min(found.values()) >= 20, found
    assert len(found) == 4


class Reference:
    """e_x by recursion over the formulas; an operation that needs itself is a deadlock."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.lists: dict[tuple[int, int], tuple[Operation, ...]] = {
            (rank, stage): stage_operations(
                len(batches),
                stage=stage,
                num_pipeline_stages=layout.num_stages,
                num_model_chunks=layout.num_chunks,
            )
            for rank, batches in enumerate(layout.plan.micro_batches)
            for stage in range(layout.num_stages)
        }
        self.members = {
            place: meeting.members
            for meeting in find_meetings(layout.plan, expert_parallel_size=layout.expert_size)
            for place in meeting.members
        }
        self.ends: dict[tuple[int, int, int], float | None] = {}

    def all_ends(self) -> list[list[float]]:
        return [
            [self.end(rank, stage, number) for number in range(len(operations))]
            for (rank, stage), operations in self.lists.items()
        ]

    def end(self, rank: int, stage: int, number: int) -> float:
        key = (rank, stage, number)
        if key in self.ends:
            known = self.ends[key]
            if known is None:
                raise RecursionError
            return known
        self.ends[key] = None
        operation = self.lists[rank, stage][number]
        posted = self.posted(rank, stage, number)
        if isinstance(operation, Compute):
            end = self.compute_end(rank, stage, operation)
        else:
            end = posted
            for other, place in self.partners(rank, operation):
                end = max(end, self.posted(rank, other, place))
        self.ends[key] = end
        return end

    def posted(self, rank: int, stage: int, number: int) -> float:
        return self.end(rank, stage, number - 1) if number else 0.0

    def compute_end(self, rank: int, stage: int, step: Compute) -> float:
        members = self.members.get((rank, step.index), ((rank, step.index),))
        start = duration = 0.0
        for member, index in members:
            same = Compute(step.is_forward, index, step.chunk)
            number = self.lists[member, stage].index(same)
            start = max(start, self.posted(member, stage, number))
            share = (1 if step.is_forward else 2) / 3 / self.layout.num_chunks
            duration = max(duration, self.layout.seconds(member, index) * share)
        return start + duration

    def partners(self, rank: int, exchange: Exchange) -> set[tuple[int, int]]:
        """(stage, number) of the exchanges at the other ends."""
        sends, receives = set(exchange.sends), set(exchange.receives)
        return {
            (stage, number)
            for stage in range(self.layout.num_stages)
            for number, other in enumerate(self.lists[rank, stage])
            if isinstance(other, Exchange)
            and (sends & set(other.receives) or receives & set(other.sends))
        }


# Size.


def test_large_plans_take_seconds() -> None:
    """12,288 ranks with 10 micro-batches each, half of the ranks in rings of 512."""
    rings = [
        [(rank, index) for rank in range(first, first + 512)]
        for index in range(10)
        for first in range(0, 6144, 512)
    ]
    plan = make_plan([10] * 12_288, rings)
    started = time.process_time()
    simulation = simulate(plan, seconds=three_seconds)
    assert time.process_time() - started < 15.0
    assert simulation.step_seconds == pytest.approx(30.0)


def test_large_pipelines_take_seconds() -> None:
    """1,024 ranks of 8 stages each, 8 micro-batches."""
    rings = [[(rank, index) for rank in range(512)] for index in range(8)]
    plan = make_plan([8] * 1024, rings)
    started = time.process_time()
    simulation = simulate(plan, seconds=three_seconds, num_pipeline_stages=8)
    assert time.process_time() - started < 15.0
    assert simulation.step_seconds == pytest.approx(3 * (8 + 7))
