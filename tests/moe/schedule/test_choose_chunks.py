"""The closed form against the simulation, the choice against trying everything."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.schedule.choose import (
    Chunking,
    PassCost,
    StageCost,
    choose_chunking,
    choose_passes,
)
from moe.schedule.linear_cost import LinearCost
from moe.schedule.paper_cases import (
    ChunkTimes,
    gradient_room_seconds,
    paper_case,
    paper_seconds,
)
from moe.schedule.simulate import Operation, Stage, bound_seconds, issue_order, simulate

SECONDS = st.floats(1e-3, 2.0)


@st.composite
def chunk_times(draw: st.DrawFn) -> ChunkTimes:
    inside = draw(SECONDS)
    gradient = draw(st.one_of(st.just(0.0), st.floats(0.0, 20.0)))
    return ChunkTimes(a2a=draw(SECONDS), ag=inside, rs=inside, exp=draw(SECONDS), gar=gradient)


@st.composite
def passes(draw: st.DrawFn) -> PassCost:
    """One leg or two each way, with a tail or without."""

    def cost() -> LinearCost:
        return LinearCost(draw(st.floats(0.0, 0.1)), draw(st.floats(0.0, 1.0)))

    inter, intra = cost(), cost()
    way = [StageCost("inter", inter, draw(st.floats(0.0, 3.0)))]
    if draw(st.booleans()):
        way.append(StageCost("intra", intra, draw(st.floats(0.0, 3.0))))
    experts = StageCost("compute", cost(), draw(st.floats(0.0, 3.0)))
    tail_seconds = draw(st.one_of(st.just(0.0), st.floats(0.0, 3.0)))
    return PassCost((*way, experts, *reversed(way)), tail_seconds=tail_seconds)


def there_and_back(link: LinearCost, experts: LinearCost, tail_seconds: float = 0.0) -> PassCost:
    leg = StageCost("inter", link, 1.0)
    return PassCost((leg, StageCost("compute", experts, 1.0), leg), tail_seconds=tail_seconds)


@given(chunk_times(), st.integers(1, 12))
def test_the_four_cases_are_the_simulation_of_the_papers_order(
    times: ChunkTimes, num_chunks: int
) -> None:
    gap = Stage("inter", times.gar)
    found = simulate(times.stages(), num_chunks, lag=num_chunks, gap=gap).seconds
    assert paper_seconds(times, num_chunks) == pytest.approx(found, rel=1e-9)


@given(chunk_times(), st.integers(1, 12))
def test_a_gradient_that_fits_the_room_costs_nothing(times: ChunkTimes, num_chunks: int) -> None:
    without = ChunkTimes(a2a=times.a2a, ag=times.ag, rs=times.rs, exp=times.exp)
    room = gradient_room_seconds(without, num_chunks)
    alone = paper_seconds(without, num_chunks)

    def with_gradient(seconds: float) -> float:
        filled = ChunkTimes(a2a=times.a2a, ag=times.ag, rs=times.rs, exp=times.exp, gar=seconds)
        return paper_seconds(filled, num_chunks)

    assert with_gradient(0.999 * room) == pytest.approx(alone, rel=1e-9)
    assert with_gradient(room + 1.0) == pytest.approx(alone + 1.0, rel=1e-9)


def test_every_case_occurs() -> None:
    found = {
        paper_case(ChunkTimes(a2a=1.0, ag=0.1, rs=0.1, exp=0.1, gar=1.0), 4),
        paper_case(ChunkTimes(a2a=1.0, ag=0.1, rs=0.1, exp=5.0), 4),
        paper_case(ChunkTimes(a2a=1.0, ag=0.1, rs=0.1, exp=0.1), 4),
        paper_case(ChunkTimes(a2a=0.1, ag=1.0, rs=1.0, exp=0.1), 4),
    }
    assert found == {1, 2, 3, 4}


@given(passes(), st.integers(1, 8), st.integers(0, 8))
def test_no_order_beats_the_bound(cost: PassCost, num_chunks: int, lag: int) -> None:
    found = cost.seconds(Chunking(num_chunks=num_chunks, lag=lag))
    assert found >= cost.bound_seconds(num_chunks) * (1 - 1e-9)


@given(passes())
def test_the_choice_is_within_two_percent_of_trying_everything(cost: PassCost) -> None:
    best = min(
        cost.seconds(Chunking(num_chunks=r, lag=lag)) for r in range(1, 9) for lag in range(r + 1)
    )
    chosen = cost.seconds(choose_chunking(cost, max_chunks=8))
    assert best * (1 - 1e-9) <= chosen <= best / 0.98 * (1 + 1e-9)


@given(passes(), passes())
def test_passes_are_cut_alike_unless_apart_they_are_clearly_better(
    forward: PassCost, backward: PassCost
) -> None:
    chosen = choose_passes(forward, backward, max_chunks=8)
    apart = tuple(choose_chunking(cost, max_chunks=8) for cost in (forward, backward))

    def seconds(cuts: tuple[Chunking, ...]) -> float:
        return forward.seconds(cuts[0]) + backward.seconds(cuts[1])

    assert chosen[0] == chosen[1] or chosen == apart
    assert seconds(chosen) <= seconds(apart) / 0.95 * (1 + 1e-9)


@given(st.integers(1, 7), st.sampled_from([3, 5]), st.integers(0, 8))
def test_each_operation_is_issued_once_and_after_what_it_needs(
    num_chunks: int, num_stages: int, lag: int
) -> None:
    order = issue_order(num_chunks, num_stages, lag=lag)
    assert len(set(order)) == len(order) == num_chunks * num_stages
    place = {operation: index for index, operation in enumerate(order)}
    for operation in order:
        if operation.stage:
            before = Operation(operation.chunk, operation.stage - 1)
            assert place[before] < place[operation]
        if operation.chunk:
            assert place[Operation(operation.chunk - 1, operation.stage)] < place[operation]


def test_the_papers_order_sends_all_out_before_the_first_comes_back() -> None:
    order = issue_order(3, 3, lag=3)
    link = [operation for operation in order if operation.stage != 1]
    assert [operation.stage for operation in link] == [0, 0, 0, 2, 2, 2]


def test_overlap_of_equal_halves() -> None:
    """Out 1 s, experts 2 s, back 1 s: in r chunks the experts and 2 / r s of the way are left."""
    cost = there_and_back(LinearCost(0.0, 1.0), LinearCost(0.0, 2.0))
    for num_chunks in range(1, 6):
        assert cost.seconds(Chunking.of(num_chunks)) == pytest.approx(2.0 + 2.0 / num_chunks)


def test_a_tail_hides_behind_the_way_home() -> None:
    link, experts = LinearCost(0.0, 1.0), LinearCost(0.0, 0.5)
    for tail_seconds, expected in ((0.0, 2.5), (1.0, 2.5), (3.0, 4.5)):
        cost = there_and_back(link, experts, tail_seconds)
        assert cost.seconds(Chunking.of(1)) == pytest.approx(expected)
        assert cost.bound_seconds(1) == pytest.approx(expected)


def test_expensive_starts_forbid_cutting_and_backward_cuts_apart() -> None:
    link = LinearCost(0.05, 1.0)
    forward = choose_chunking(there_and_back(link, LinearCost(0.0, 1.5)))
    assert forward == Chunking.of(3)
    assert choose_chunking(there_and_back(link, LinearCost(0.0, 3.0))).num_chunks > 3
    dear = there_and_back(LinearCost(1.0, 1.0), LinearCost(0.0, 1.5))
    assert choose_chunking(dear) == Chunking.of(1)


def test_a_smaller_lag_closes_the_gap_of_case_three() -> None:
    times = ChunkTimes(a2a=1.0, ag=0.4, rs=0.4, exp=0.1)
    assert paper_case(times, 4) == 3
    assert simulate(times.stages(), 4, lag=4).seconds == pytest.approx(8.8)
    assert min(simulate(times.stages(), 4, lag=lag).seconds for lag in range(4)) == 8.0
    assert bound_seconds(times.stages(), 4) == pytest.approx(8.0)


def test_choosing_takes_milliseconds() -> None:
    way = [
        StageCost("inter", LinearCost(1e-4, 1e-8), 1e7),
        StageCost("intra", LinearCost(1e-5, 8e-9), 1e7),
    ]
    experts = StageCost("compute", LinearCost(1e-4, 1e-9), 1e8)
    began = time.perf_counter()
    choose_chunking(PassCost((*way, experts, *reversed(way))))
    assert time.perf_counter() - began < 2.0
