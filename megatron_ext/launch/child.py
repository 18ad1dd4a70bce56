"""One rank as the parent of local ranks sees it: a process, its log, and how it ended."""

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext import exit_codes

_PR_SET_PDEATHSIG = 1


@dataclass(slots=True)
class Child:
    """`returncode` as `subprocess` has it, None while it runs; `order` counts who ended before.

    `was_ended` says that the parent ended it: how it left then says nothing about a fault. Nor does
    dying of a signal in `passed_on`, the user's own.
    """

    rank: int
    process: subprocess.Popen[bytes]
    log: Path | None
    returncode: int | None = None
    order: int = -1
    was_ended: bool = False
    passed_on: set[int] = field(default_factory=set)

    @property
    def is_alive(self) -> bool:
        return self.returncode is None

    @property
    def has_failed(self) -> bool:
        """It left by its own fault, neither finished nor saved and stopped."""
        if self.returncode is None or self.was_ended:
            return False
        good = (exit_codes.DONE, exit_codes.SAVED_AND_STOPPED)
        return self.returncode not in good and -self.returncode not in self.passed_on

    def look(self, *, order: int) -> None:
        """Note its end if it has ended; what a failed rank leaves running is killed."""
        waited = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if waited is None:
            return
        # Before the process is reaped: until then its number, the group's, belongs to no other.
        if waited.si_code != os.CLD_EXITED or waited.si_status != exit_codes.DONE:
            self._signal_group(signal.SIGKILL)
        self.returncode = self.process.wait()
        self.order = order

    def pass_on(self, number: int) -> None:
        """The user's signal, for the rank itself and not for helpers it may have started."""
        self.passed_on.add(number)
        self.process.send_signal(number)

    def end(self, number: int) -> None:
        """The parent's own decision; SIGKILL takes the rank's helpers with it."""
        self.was_ended = True
        if number == signal.SIGKILL:
            self._signal_group(number)
        else:
            self.process.send_signal(number)

    def kill(self) -> None:
        """Make sure that it is gone."""
        if self.is_alive:
            self.end(signal.SIGKILL)
            self.returncode = self.process.wait()

    def last_lines(self, *, num_lines: int = 20, num_bytes: int = 16384) -> list[str]:
        """The end of what it printed; empty for the rank that prints to the terminal."""
        if self.log is None:
            return []
        with self.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - num_bytes))
            return file.read().decode(errors="replace").splitlines()[-num_lines:]

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def start_child(
    command: Sequence[str], *, rank: int, environment: Mapping[str, str], log: Path | None
) -> Child:
    """Start `command` in a process group of its own, writing to `log` or to our terminal.

    Its own group, so that Ctrl-C reaches the parent alone, which then passes it on once.
    """
    output = None if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        process = subprocess.Popen(
            list(command),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,
            preexec_fn=_die_with_this_process(),
        )
    finally:
        if output is not None:
            os.close(output)
    return Child(rank=rank, process=process, log=log)


def _die_with_this_process() -> Callable[[], None] | None:
    """What a new child runs first, so that the kernel kills it when its parent is gone."""
    if sys.platform != "linux":
        return None
    # Looked up here: between fork and exec a child should do next to nothing.
    prctl = ctypes.CDLL(None).prctl
    return functools.partial(_die_with, os.getpid(), prctl)


def die_with(parent_pid: int) -> None:
    """Have the kernel (Linux) kill this process when its parent, `parent_pid`, is gone."""
    if sys.platform == "linux":
        _die_with(parent_pid, ctypes.CDLL(None).prctl)


def _die_with(parent_pid: int, prctl: Callable[[int, int], int]) -> None:
    prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent_pid:
        os._exit(exit_codes.FAILED)
