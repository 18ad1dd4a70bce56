"""Where things run at the same time: a lane for each link, and the caller for the computation.

    inter lane     D1  D2  D3  .......  C1  C2  C3
    intra lane         d1  d2  d3 .. c1  c2  c3
    caller                 E1  E2  E3

A lane does its steps one after another in the order of issue, each as soon as the step before it
on its chunk's way has ended. All ranks issue in the same order, and a process group belongs to one
lane, so collectives meet. On a CPU a lane is a thread, which sleeps in gloo without holding the
interpreter; on a GPU it is a stream, and the host only queues.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe.schedule.simulate import Operation, StreamName

Rows = tuple[Tensor, ...]
"""What stages hand on."""
# (chunk, what its stage before gave; nothing at first) -> what the next stage is given.
Function = Callable[[int, Rows], Rows]


@dataclass(frozen=True, slots=True)
class Step:
    """What a stage does, and on which stream. No autograd: gradients are disabled in lanes."""

    stream: StreamName
    function: Function


class Lanes(Protocol):
    """Runs the steps of all chunks."""

    def run(
        self,
        order: Sequence[Operation],
        steps: Sequence[Step],
        num_chunks: int,
        *,
        afterwards: Callable[[], None] | None = None,
    ) -> list[Rows]:
        """Do every operation of `order`; stages are indices of `steps`.

        Args:
            afterwards: done by the caller after its last computation, while rows are going home.

        Returns:
            What the last stage gave, for each chunk.
        """
        ...


class ThreadLanes:
    """Lanes for the CPU. One object can serve all layers: it is idle between calls."""

    def __init__(self) -> None:
        self._threads: dict[StreamName, _Thread] = {}

    def run(
        self,
        order: Sequence[Operation],
        steps: Sequence[Step],
        num_chunks: int,
        *,
        afterwards: Callable[[], None] | None = None,
    ) -> list[Rows]:
        given: dict[Operation, Future[Rows]] = {operation: Future() for operation in order}
        last = len(steps) - 1
        ends = [given[Operation(chunk, last)] for chunk in range(num_chunks)]
        computations: list[Callable[[], None]] = []
        # Links get all their work at once, the caller does its own in between: it may be busy when
        # a chunk arrives, and the next leg must not wait for that.
        for operation in order:
            step = steps[operation.stage]
            task = _task(step.function, operation, given)
            if step.stream == "compute":
                computations.append(task)
            else:
                self._thread(step.stream).submit(task)
        for task in computations:
            task()
        try:
            if afterwards is not None:
                afterwards()
        finally:
            # No lane may still be at work when an error is told.
            wait(ends)
        return [future.result() for future in ends]

    def _thread(self, stream: StreamName) -> _Thread:
        if stream not in self._threads:
            self._threads[stream] = _Thread(f"moe-{stream}")
        return self._threads[stream]


def _task(
    function: Function, operation: Operation, given: dict[Operation, Future[Rows]]
) -> Callable[[], None]:
    """Waits for the stage before and keeps what this one gives, also an error."""
    own = given[operation]

    def task() -> None:
        try:
            before: Rows = ()
            if operation.stage:
                # Taken out, so that it is freed as soon as it has been used.
                before = given.pop(Operation(operation.chunk, operation.stage - 1)).result()
            own.set_result(function(operation.chunk, before))
        except BaseException as error:  # told by `run`
            own.set_exception(error)

    return task


class _Thread:
    """A thread that does what it is handed in order; it ends with this object or the process."""

    def __init__(self, name: str) -> None:
        tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tasks = tasks
        threading.Thread(target=_work, args=(tasks,), name=name, daemon=True).start()
        weakref.finalize(self, tasks.put, None)

    def submit(self, task: Callable[[], None]) -> None:
        self._tasks.put(task)


def _work(tasks: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    torch.set_grad_enabled(False)
    while (task := tasks.get()) is not None:
        task()
        del task


class StreamLanes:
    """Lanes for a GPU: a stream for each link; the computation stays on the caller's stream."""

    def __init__(self) -> None:
        self._streams: dict[StreamName, torch.cuda.Stream] = {}

    def run(
        self,
        order: Sequence[Operation],
        steps: Sequence[Step],
        num_chunks: int,
        *,
        afterwards: Callable[[], None] | None = None,
    ) -> list[Rows]:
        caller = torch.cuda.current_stream()
        began = caller.record_event()
        given: list[Rows] = [()] * num_chunks
        ready = [began] * num_chunks
        for operation in order:
            step, chunk = steps[operation.stage], operation.chunk
            stream = caller if step.stream == "compute" else self._stream(step.stream)
            with torch.cuda.stream(stream):
                stream.wait_event(ready[chunk])
                for rows in given[chunk]:
                    rows.record_stream(stream)
                given[chunk] = step.function(chunk, given[chunk])
                ready[chunk] = stream.record_event()
        if afterwards is not None:
            afterwards()
        for chunk in range(num_chunks):
            caller.wait_event(ready[chunk])
            for rows in given[chunk]:
                rows.record_stream(caller)
        return given

    def _stream(self, name: StreamName) -> torch.cuda.Stream:
        if name not in self._streams:
            self._streams[name] = torch.cuda.Stream(priority=-1)  # type: ignore[no-untyped-call]
        return self._streams[name]


def lanes_for(device: torch.device) -> Lanes:
    """Lanes that run on this device."""
    return StreamLanes() if device.type == "cuda" else ThreadLanes()
