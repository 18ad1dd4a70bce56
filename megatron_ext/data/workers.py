"""Worker processes that outlive nothing: a small pool of spawned processes.

The standard pools leave orphans when their parent is killed, and wait for running work on Ctrl-C.
Here each worker watches its parent and leaves with it, and the pool kills what still runs when it
is closed. Jobs and answers are small: data goes through files.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import traceback
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from megatron_ext.errors import UserError

_CONTEXT = multiprocessing.get_context("spawn")


def shared_counters(count: int) -> Any:
    """`count` int64 zeros that workers write and the parent reads, without locks."""
    return _CONTEXT.RawArray("q", count)


class WorkerPool:
    """Processes that each do one job at a time.

    Args:
        num_workers: processes.
        build: called once in each worker with `setup`; gives the function that does a job.
        setup: what `build` needs; pickled.
        environment: variables to set in the workers before `build`.

    Attributes:
        peak_bytes: largest resident memory of one worker, known after `close` (0 without /proc).
    """

    peak_bytes = 0

    def __init__(
        self,
        *,
        num_workers: int,
        build: Callable[[Any], Callable[[Any], Any]],
        setup: Any,
        environment: Mapping[str, str],
    ) -> None:
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []
        try:
            for _ in range(num_workers):
                self._idle.append(_Worker(build, setup, dict(environment)))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def num_idle(self) -> int:
        """Workers without a job."""
        return len(self._idle)

    @property
    def num_busy(self) -> int:
        """Workers with a job."""
        return len(self._busy)

    def submit(self, job: Any) -> None:
        """Give a job to an idle worker."""
        worker = self._idle.pop()
        self._busy.append(worker)
        worker.connection.send(job)

    def wait(self, timeout_seconds: float) -> list[Any]:
        """Answers that arrive in this time, at once if there are any.

        Raises:
            UserError: a job raised one, a disk is full, or a worker died.
            RuntimeError: a job failed in another way.
        """
        connections = [worker.connection for worker in self._busy]
        ready = multiprocessing.connection.wait(connections, timeout_seconds)
        finished = [worker for worker in self._busy if worker.connection in ready]
        answers = [worker.answer() for worker in finished]
        self._busy = [worker for worker in self._busy if worker not in finished]
        self._idle += finished
        return answers

    def close(self) -> None:
        """End all workers, at work or not."""
        for worker in self._idle + self._busy:
            self.peak_bytes = max(self.peak_bytes, worker.peak_bytes())
            worker.end()
        self._idle, self._busy = [], []


class _Worker:
    def __init__(
        self,
        build: Callable[[Any], Callable[[Any], Any]],
        setup: Any,
        environment: dict[str, str],
    ) -> None:
        self.connection, theirs = _CONTEXT.Pipe()
        arguments = (theirs, build, setup, environment)
        self._process = _CONTEXT.Process(target=_work, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def answer(self) -> Any:
        try:
            kind, value = self.connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise UserError(
                f"a worker process died ({_describe_exit(self._process.exitcode)}). Finished work "
                "is kept: run the same command again, with fewer --num-workers if memory ran out"
            ) from None
        if kind == "user error":
            raise UserError(value)
        if kind == "failure":
            raise RuntimeError(f"a worker process failed:\n{value}")
        return value

    def peak_bytes(self) -> int:
        # Not from getrusage: a new process inherits the peak of the one that started it.
        try:
            with open(f"/proc/{self._process.pid}/status", encoding="ascii") as stream:
                peaks = [line.split()[1] for line in stream if line.startswith("VmHWM:")]
        except (OSError, UnicodeDecodeError):
            return 0
        return int(peaks[0]) * 1024 if peaks else 0

    def end(self) -> None:
        self.connection.close()
        self._process.kill()
        self._process.join()


def _describe_exit(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def _work(
    connection: multiprocessing.connection.Connection,
    build: Callable[[Any], Callable[[Any], Any]],
    setup: Any,
    environment: dict[str, str],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    os.environ.update(environment)
    job_function: Callable[[Any], Any] | None = None
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            job_function = job_function or build(setup)
            answer = ("done", job_function(job))
        except UserError as error:
            answer = ("user error", str(error))
        except BaseException:
            answer = ("failure", traceback.format_exc())
        connection.send(answer)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
