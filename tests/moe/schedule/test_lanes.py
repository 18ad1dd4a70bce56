"""Lanes: things really run at the same time, in the order of issue, and errors are told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch

from moe.schedule.lanes import Function, Lanes, Rows, Step, StreamLanes, ThreadLanes
from moe.schedule.simulate import StreamName, issue_order

WAY: tuple[StreamName, ...] = ("inter", "intra", "compute", "intra", "inter")


def add(number: int) -> Function:
    def function(chunk: int, rows: Rows) -> Rows:
        before = rows[0] if rows else torch.tensor([100 * chunk])
        return (before + number,)

    return function


def run(lanes: Lanes, functions: list[Function], num_chunks: int, lag: int) -> list[int]:
    steps = [Step(stream, function) for stream, function in zip(WAY, functions, strict=True)]
    order = issue_order(num_chunks, len(steps), lag=lag)
    return [int(rows[0]) for rows in lanes.run(order, steps, num_chunks)]


@pytest.mark.parametrize("lag", [0, 1, 4])
def test_every_chunk_passes_every_stage(lag: int) -> None:
    lanes = ThreadLanes()
    functions = [add(1), add(2), add(4), add(8), add(16)]
    assert run(lanes, functions, 4, lag) == [31, 131, 231, 331]


def test_links_sleep_while_the_caller_computes() -> None:
    """Two chunks: link 0.2 s each way, computation 0.2 s; 1.2 s in a row, 0.8 s overlapped."""
    lanes = ThreadLanes()

    def sleep(chunk: int, rows: Rows) -> Rows:
        time.sleep(0.2)
        return rows or (torch.tensor([chunk]),)

    steps = [Step("inter", sleep), Step("compute", sleep), Step("inter", sleep)]
    began = time.perf_counter()
    lanes.run(issue_order(2, 3, lag=2), steps, 2)
    assert 0.8 <= time.perf_counter() - began < 1.1


@pytest.mark.parametrize("stage", range(5))
def test_an_error_is_told_and_lanes_go_on(stage: int) -> None:
    lanes = ThreadLanes()

    def fail(chunk: int, rows: Rows) -> Rows:
        if chunk == 1:
            raise RuntimeError("the link broke")
        return rows or (torch.tensor([chunk]),)

    functions = [add(1), add(2), add(4), add(8), add(16)]
    broken = [*functions[:stage], fail, *functions[stage + 1 :]]
    with pytest.raises(RuntimeError, match="the link broke"):
        run(lanes, broken, 3, 3)
    assert run(lanes, functions, 2, 2) == [31, 131]


def test_an_error_afterwards_waits_for_the_lanes() -> None:
    lanes = ThreadLanes()
    is_home: list[bool] = []

    def slow(chunk: int, rows: Rows) -> Rows:
        time.sleep(0.1)
        is_home.append(True)
        return rows

    def fail() -> None:
        raise RuntimeError("no memory")

    steps = [Step("inter", add(1)), Step("compute", add(2)), Step("inter", slow)]
    with pytest.raises(RuntimeError, match="no memory"):
        lanes.run(issue_order(2, 3, lag=2), steps, 2, afterwards=fail)
    assert is_home == [True, True]


def test_threads_end_with_their_lanes() -> None:
    before = set(threading.enumerate())
    lanes = ThreadLanes()
    run(lanes, [add(1)] * 5, 2, 2)
    # Threads of other tests may end at any moment: only those that are new count.
    links = set(threading.enumerate()) - before
    assert len(links) == 2
    del lanes
    _wait_until(lambda: not any(thread.is_alive() for thread in links))


def _wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5.0
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.gpu
def test_streams_give_what_threads_give() -> None:
    device = torch.device("cuda")
    weights = [torch.randn(512, 512, device=device) / 512**0.5 for _ in WAY]
    rows = torch.randn(4, 256, 512, device=device)

    def multiply(stage: int) -> Function:
        def function(chunk: int, before: Rows) -> Rows:
            return ((before[0] if before else rows[chunk]) @ weights[stage],)

        return function

    steps = [Step(stream, multiply(stage)) for stage, stream in enumerate(WAY)]
    found = StreamLanes().run(issue_order(4, len(WAY), lag=2), steps, 4)
    for chunk in range(4):
        expected = rows[chunk]
        for weight in weights:
            expected = expected @ weight
        torch.testing.assert_close(found[chunk][0], expected, rtol=0.0, atol=0.0)
