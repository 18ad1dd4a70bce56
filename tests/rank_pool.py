"""Real ranks for tests: the fixture `ranks` runs one function in N processes over gloo.

`ranks.run(4, function, ...)` returns what `function` returned in rank 0, 1, 2, 3. Processes are
started when first asked for and kept; those that took the CPU for megatron's accelerator are apart
from those that did not. Whatever goes wrong in a rank is told with its number and its stack.
"""

import contextlib
import inspect
import math
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

from tests.rank_worker import ROOT, Answer, Call

T = TypeVar("T")

MAX_WORLD_SIZE = 8
_START_SECONDS = 180.0
# After the first failure: gloo tells the others of a lost peer at once, unless they do not listen.
_SETTLE_SECONDS = 5.0
# From the call's end of time to ours: the stuck ranks write their stacks then.
_STACK_SECONDS = 1.0


class RankError(Exception):
    """A rank raised, died or hung; `rank` is the one that began it."""

    def __init__(self, message: str, *, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class Ranks:
    """What the fixture gives to tests."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="megatron-ext-tests-"))
        self._plain = _Pool(self._folder / "plain", has_megatron=False)
        self._megatron = _Pool(self._folder / "megatron", has_megatron=True)

    def run(
        self,
        world_size: int,
        function: Callable[..., T],
        *args: Any,
        megatron: bool = False,
        timeout_seconds: float = 120.0,
        **kwargs: Any,
    ) -> list[T]:
        """`function(*args, **kwargs)` in each of `world_size` ranks; their results in rank order.

        `function` stands at the top level of a file (or is a static method there); it finds a gloo
        process group. `megatron=True` makes megatron-core take the CPU for its accelerator.
        Raises RankError for an exception in a rank, for a rank that died, and for ranks that took
        longer than `timeout_seconds`.
        """
        if not 1 <= world_size <= MAX_WORLD_SIZE:
            raise ValueError(f"world_size {world_size}: expected 1 to {MAX_WORLD_SIZE}")
        if "<" in function.__qualname__:
            raise TypeError(
                f"{function.__qualname__}: ranks find a function by its name, so it must stand at "
                "the top level of its file"
            )
        source = inspect.getsourcefile(function)
        assert source is not None
        pool = self._megatron if megatron else self._plain
        calls = [
            Call(
                rank=rank,
                world_size=world_size,
                store=pool.next_store(),
                timeout_seconds=timeout_seconds,
                source=Path(source),
                module=function.__module__,
                qualified_name=function.__qualname__,
                arguments=pickle.dumps((args, kwargs)),
            )
            for rank in range(world_size)
        ]
        return [pickle.loads(result) for result in pool.run(calls)]

    def close(self) -> None:
        self._plain.stop()
        self._megatron.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    stack_file: Path


@dataclass(frozen=True, slots=True)
class _Silence:
    """No answer: the process ended with `exit_code`, or was still busy (None)."""

    exit_code: int | None


class _Pool:
    """Workers of one kind, in rank order."""

    def __init__(self, folder: Path, *, has_megatron: bool) -> None:
        folder.mkdir()
        self._folder = folder
        self._has_megatron = has_megatron
        self._workers: list[_Worker] = []
        self._num_calls = 0
        self._num_started = 0

    def next_store(self) -> Path:
        """Where the next call's ranks meet: none finds what an earlier call left."""
        return self._folder / f"store_{self._num_calls}"

    def run(self, calls: Sequence[Call]) -> list[bytes]:
        self._num_calls += 1
        self._start_up_to(len(calls))
        workers = self._workers[: len(calls)]
        try:
            for worker, call in zip(workers, calls, strict=True):
                # One that died since its last call is found by its silence.
                with contextlib.suppress(BrokenPipeError):
                    worker.connection.send(call)
            deadline = time.monotonic() + calls[0].timeout_seconds + _STACK_SECONDS
            outcomes = _gather(workers, deadline=deadline)
        except BaseException:
            self.stop()
            raise
        calls[0].store.unlink(missing_ok=True)
        answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
        if len(answers) < len(calls):
            # Whoever was not heard from may be anywhere: none of them is used again.
            self.stop()
        elif not any(answer.error for answer in answers):
            return [answer.result for answer in answers]
        raise _failure(workers, outcomes, calls[0])

    def stop(self) -> None:
        for worker in self._workers:
            worker.process.kill()
            worker.process.wait()
            worker.connection.close()
        self._workers.clear()

    def _start_up_to(self, num_workers: int) -> None:
        new = [self._start() for _ in range(num_workers - len(self._workers))]
        self._workers += new
        for worker in new:
            try:
                if not worker.connection.poll(_START_SECONDS):
                    raise RuntimeError(f"a rank did not start within {_START_SECONDS:.0f} s")
                worker.connection.recv()
            except (EOFError, RuntimeError) as error:
                self.stop()
                raise RuntimeError("a rank did not start; its output says why") from error

    def _start(self) -> _Worker:
        stack_file = self._folder / f"stack_{self._num_started}"
        self._num_started += 1
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [
                    sys.executable,
                    str(ROOT / "tests" / "rank_worker.py"),
                    str(os.getpid()),
                    str(theirs.fileno()),
                    "megatron" if self._has_megatron else "plain",
                    str(stack_file),
                ],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        return _Worker(process, Connection(ours.detach()), stack_file)


def _gather(workers: Sequence[_Worker], *, deadline: float) -> list[Answer | _Silence]:
    outcomes: list[Answer | _Silence] = [_Silence(exit_code=None) for _ in workers]
    waiting = {worker.connection: rank for rank, worker in enumerate(workers)}
    while waiting and (left := deadline - time.monotonic()) > 0:
        for connection in wait(list(waiting), timeout=left):
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            try:
                outcome: Answer | _Silence = connection.recv()
            except (EOFError, ConnectionResetError):
                outcome = _Silence(exit_code=workers[rank].process.wait())
            outcomes[rank] = outcome
            if isinstance(outcome, _Silence) or outcome.error:
                deadline = min(deadline, time.monotonic() + _SETTLE_SECONDS)
    return outcomes


def _failure(
    workers: Sequence[_Worker], outcomes: Sequence[Answer | _Silence], call: Call
) -> RankError:
    """What happened in all ranks: who died, then who raised, first to last, then who hangs."""
    reports: list[tuple[float, int, str]] = []
    for rank, (worker, outcome) in enumerate(zip(workers, outcomes, strict=True)):
        if isinstance(outcome, _Silence):
            since = 0.0 if outcome.exit_code is not None else math.inf
            reports.append((since, rank, _describe(outcome, worker.stack_file)))
        elif outcome.error:
            reports.append((outcome.failed_at, rank, f"raised\n{outcome.error}"))
    reports.sort()
    head = f"{call.qualified_name} failed in {len(reports)} of {call.world_size} ranks"
    texts = [f"rank {rank} {text}" for _, rank, text in reports]
    return RankError("\n".join([head, *texts]), rank=reports[0][1])


def _describe(silence: _Silence, stack_file: Path) -> str:
    stack = stack_file.read_text()
    if silence.exit_code is None:
        what = "did not answer in time"
    elif silence.exit_code < 0:
        what = f"was killed by {signal.Signals(-silence.exit_code).name}"
    else:
        what = f"left with exit code {silence.exit_code}"
    return f"{what}; its stack:\n{stack}" if stack else f"{what} and left no stack"
