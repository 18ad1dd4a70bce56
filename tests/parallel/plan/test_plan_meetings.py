"""Which micro-batches meet, and that the ordering rule names who breaks it."""

from __future__ import annotations

import random
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import PlanError
from parallel.plan.meetings import Meeting, check_order, find_meetings
from parallel.plan.records import MicroBatch, Piece, StepPlan


def plan_of(*ranks: str) -> StepPlan:
    """A word a micro-batch, a letter a sequence (A is 0) of which it has a piece; "." is empty."""
    words = [rank.split() for rank in ranks]
    holders: dict[int, list[tuple[int, int]]] = {}
    for rank, row in enumerate(words):
        for index, word in enumerate(row):
            for letter in word.replace(".", ""):
                holders.setdefault(ord(letter) - ord("A"), []).append((rank, index))
    pieces: dict[tuple[int, int], list[Piece]] = {}
    for sequence, places in holders.items():
        for token, place in enumerate(places):
            pieces.setdefault(place, []).append(Piece(sequence, token, token + 1))
    plan = StepPlan(
        lengths=tuple(len(holders.get(i, ())) for i in range(max(holders, default=-1) + 1)),
        tokens_per_rank=8,
        micro_batches=tuple(
            tuple(MicroBatch(tuple(pieces.get((rank, i), ()))) for i in range(len(row)))
            for rank, row in enumerate(words)
        ),
    )
    plan.check()
    return plan


def test_shared_sequences_connect() -> None:
    # A joins ranks 0 and 1, B ranks 1 and 2: one meeting. C and D meet nobody.
    plan = plan_of("C AD E", "AB", ". B E")
    assert find_meetings(plan) == (
        Meeting(members=((0, 1), (1, 0), (2, 1)), sequences=(0, 1)),
        Meeting(members=((0, 2), (2, 2)), sequences=(4,)),
    )


def test_experts_connect_equal_indices() -> None:
    plan = plan_of("A .", ". .", ". A", ".")
    assert find_meetings(plan, expert_parallel_size=2) == (
        Meeting(members=((0, 0), (1, 0), (2, 1)), sequences=(0,), absent_ranks=(3,)),
        Meeting(members=((0, 1), (1, 1)), sequences=()),
        Meeting(members=((2, 0), (3, 0)), sequences=()),
    )
    # Whoever is alone still waits for the others of its group.
    assert find_meetings(plan_of(". .", "."), expert_parallel_size=2)[1] == Meeting(
        members=((0, 1),), sequences=(), absent_ranks=(1,)
    )


@given(st.lists(st.lists(st.text("ABCDEF", max_size=3), max_size=4), min_size=1, max_size=6))
def test_meetings_are_what_sequences_reach(ranks: list[list[str]]) -> None:
    plan = plan_of(*(" ".join(word or "." for word in rank) for rank in ranks))
    held = {
        (rank, index): {piece.sequence for piece in batch.pieces}
        for rank, batches in enumerate(plan.micro_batches)
        for index, batch in enumerate(batches)
    }
    expected = set()
    for place in held:
        members = {place}
        for _ in held:
            reached = set().union(*(held[member] for member in members))
            members |= {other for other, sequences in held.items() if sequences & reached}
        if len(members) > 1:
            expected.add(tuple(sorted(members)))
    meetings = find_meetings(plan)
    assert [meeting.members for meeting in meetings] == sorted(expected)
    for meeting in meetings:
        inside = [held[member] for member in meeting.members]
        assert all(sum(sequence in held for held in inside) > 1 for sequence in meeting.sequences)


@pytest.mark.parametrize(
    "ranks",
    [
        ("", ""),
        ("A B", "A B"),
        ("A . B", ". A . B", "B"),
        ("A B", ". B C", "A . C"),
        ("AB", "A", "B"),
    ],
)
def test_one_stage_takes_any_order_without_circle(ranks: tuple[str, ...]) -> None:
    check_order(plan_of(*ranks), num_pipeline_stages=1)


def test_pipelines_and_experts_take_equal_indices() -> None:
    plan = plan_of("A . B", "A C B", "D C", "D")
    check_order(plan, num_pipeline_stages=4)
    with pytest.raises(PlanError, match="ranks 2 to 3 are one expert-parallel group"):
        check_order(plan, num_pipeline_stages=1, expert_parallel_size=2)
    check_order(
        plan_of("A . B", "A C B", "D C", "D ."), num_pipeline_stages=1, expert_parallel_size=2
    )
    check_order(plan_of("A .", "A . . ."), num_pipeline_stages=2, num_model_chunks=2)


@pytest.mark.parametrize(
    ("ranks", "settings", "complaint"),
    [
        (
            ("A B", "B A"),
            {},
            "forever: rank 1 runs micro-batch 0 (sequence 1) before micro-batch 1 (sequence 0); "
            "rank 0 runs micro-batch 0 (sequence 0) before micro-batch 1 (sequence 1)",
        ),
        (("A B", "B C", "C A"), {}, "rank 2 runs micro-batch 0 (sequence 2) before micro-batch 1"),
        (("A . B", "B . . A"), {}, "rank 1 runs micro-batch 0 (sequence 1) before micro-batch 3"),
        (("A A",), {}, "micro-batches 0 and 1 of rank 0 would have to run at the same time"),
        (
            ("A B", "AB"),
            {},
            "both belong to the meeting over sequences 0, 1 (micro-batch 0 of rank",
        ),
        (
            (". A", "A"),
            {"num_pipeline_stages": 2},
            "micro-batch 1 of rank 0 and micro-batch 0 of rank 1 meet; with pipeline stages",
        ),
        (
            (". A", ". .", "A .", ". ."),
            {"expert_parallel_size": 2},
            "micro-batch 1 of rank 0 and micro-batch 0 of rank 2 meet; with",
        ),
        (
            (". .", "."),
            {"expert_parallel_size": 2},
            "ranks 0 to 1 are one expert-parallel group and run 2, 1 micro-batches; they must run "
            "equally many: fill up to 2 with empty ones",
        ),
        ((".", ".", "."), {"expert_parallel_size": 2}, "3 ranks do not split into"),
        (("",), {"num_model_chunks": 2}, "two stages or more"),
        (
            (". .", ". . ."),
            {"num_pipeline_stages": 2, "num_model_chunks": 2},
            "rank 1: interleaved pipelining over 2 stages runs a positive multiple of 2 "
            "micro-batches, not 3",
        ),
    ],
)
def test_names_who_breaks_the_rule(
    ranks: tuple[str, ...], settings: dict[str, int], complaint: str
) -> None:
    with pytest.raises(PlanError, match=re.escape(complaint)):
        check_order(plan_of(*ranks), **{"num_pipeline_stages": 1} | settings)


def test_long_lists_are_cut() -> None:
    plan = plan_of(". A", *["A ."] * 19)
    with pytest.raises(PlanError, match=r"micro-batch 0 of rank 7 and 12 more\)$"):
        check_order(plan, num_pipeline_stages=2)


def test_is_quick_enough_for_every_step() -> None:
    """2,000 sequences on 256 ranks, 200 of them shared by up to 64."""
    generator = random.Random(0)
    held: list[list[list[Piece]]] = [[[] for _ in range(4)] for _ in range(256)]
    for sequence in range(2000):
        size = generator.randint(2, 64) if sequence % 10 == 0 else 1
        index = generator.randrange(4)
        for token, rank in enumerate(generator.sample(range(256), size)):
            held[rank][index].append(Piece(sequence, token, token + 1))
    plan = StepPlan(
        lengths=(64,) * 2000,
        tokens_per_rank=64,
        micro_batches=tuple(tuple(MicroBatch(tuple(pieces)) for pieces in rank) for rank in held),
    )
    seconds = []
    for _ in range(5):
        started = time.process_time()
        check_order(plan, num_pipeline_stages=1)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.1
