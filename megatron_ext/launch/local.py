"""N ranks on this machine, started and watched by one parent.

The parent does no training: it tells each child its rank, shows what rank 0 prints, passes the
user's signals on, and when a rank dies ends the others, for they would wait for it. Children die
with the parent, however it dies. Nothing here imports torch.
"""

import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, SIGUSR1

from megatron_ext.errors import UserError
from megatron_ext.launch.child import Child, start_child
from megatron_ext.launch.noted_signals import noted_signals
from megatron_ext.launch.ranks import local_rank_environment
from megatron_ext.launch.verdict import describe_end, exit_code, first_cause

# What a user or a batch system sends to the parent and means for the ranks.
_FORWARDED = (SIGTERM, SIGUSR1, SIGINT)
_POLL_SECONDS = 0.02
# How long the others may go on after a failure to fail by themselves: the rank that lost its peer
# may be gone before the one that caused it, and the cause shall be told.
_SETTLE_SECONDS = 0.5
# From SIGTERM to SIGKILL. Short: a checkpoint needs all ranks, so there is nothing left to save.
_GRACE_SECONDS = 5.0
# Ctrl-C asks the ranks to stop; so often, and they are killed.
_INTERRUPTS_TO_KILL = 3


def run_local(
    command: Sequence[str], num_ranks: int, *, environment: Mapping[str, str] | None = None
) -> int:
    """Run `command` (an argument list, no shell) as `num_ranks` ranks; returns the exit code.

    0 if all ranks left with 0, SAVED_AND_STOPPED if all left with that, else the code of the rank
    that failed first (128 + signal if it was killed). Rank 0 writes to this process's stdout and
    stderr, the others to logs in a temporary folder, which stays when a rank fails. SIGTERM,
    SIGUSR1 and SIGINT go on to the ranks. To be called from the main thread, which must live until
    the ranks have ended: Linux ends them with the thread that started them.
    """
    if num_ranks < 1:
        raise UserError(f"ranks: found {num_ranks}, expected at least 1")
    folder = Path(tempfile.mkdtemp(prefix="megatron-ext-"))
    base = _with_defaults(os.environ if environment is None else environment, num_ranks)
    sys.stdout.flush()
    children: list[Child] = []
    with noted_signals(_FORWARDED) as received:
        try:
            for rank in range(num_ranks):
                variables = local_rank_environment(
                    base, rank=rank, num_ranks=num_ranks, store_path=folder / "store"
                )
                log = folder / f"rank_{rank}.log" if rank > 0 else None
                children.append(start_child(command, rank=rank, environment=variables, log=log))
            _Watch(children, received).until_all_ended()
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            for child in children:
                child.kill()
    cause = first_cause(children)
    if text := describe_end(children, cause):
        print(text, file=sys.stderr, flush=True)
    if cause is None or num_ranks == 1:
        shutil.rmtree(folder, ignore_errors=True)
    return exit_code(children, cause)


@dataclass(slots=True)
class _Watch:
    """One look after another at living children; what was decided lives from look to look."""

    children: Sequence[Child]
    received: list[int]
    is_asked_to_stop: bool = False
    num_interrupts: int = 0
    failed_at: float = math.inf
    ended_at: float = math.inf
    num_ended: int = 0

    def until_all_ended(self) -> None:
        while living := [child for child in self.children if child.is_alive]:
            self._pass_signals_on(living)
            for child in living:
                child.look(order=self.num_ended)
                if not child.is_alive:
                    self.num_ended += 1
                    if child.has_failed:
                        self.failed_at = min(self.failed_at, time.monotonic())
            self._end_others([child for child in living if child.is_alive])
            time.sleep(_POLL_SECONDS)

    def _pass_signals_on(self, living: Sequence[Child]) -> None:
        while self.received:
            number = self.received.pop(0)
            self.num_interrupts += number == SIGINT
            is_enough = self.num_interrupts >= _INTERRUPTS_TO_KILL
            if math.isinf(self.failed_at):
                self.is_asked_to_stop = True
            for child in living:
                child.end(SIGKILL) if is_enough else child.pass_on(number)

    def _end_others(self, living: Sequence[Child]) -> None:
        # Once the user asked the ranks to stop they may be saving, and a late failure of one must
        # not cut another short: its peers find out by themselves if they still need it.
        if self.is_asked_to_stop:
            return
        now = time.monotonic()
        if math.isinf(self.ended_at) and now > self.failed_at + _SETTLE_SECONDS:
            self.ended_at = now
            for child in living:
                child.end(SIGTERM)
        if now > self.ended_at + _GRACE_SECONDS:
            for child in living:
                child.end(SIGKILL)


def _with_defaults(environment: Mapping[str, str], num_ranks: int) -> dict[str, str]:
    defaults = {
        "OMP_NUM_THREADS": str(max(1, _num_cores() // num_ranks)),
        # What a rank printed before it was killed must be in its log.
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    return defaults | dict(environment)


def _num_cores() -> int:
    """Cores this process may use: its affinity, and a container's quota if that is less."""
    if sys.platform == "linux":
        num_cores = len(os.sched_getaffinity(0))
    else:
        num_cores = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return num_cores
    return num_cores if quota == "max" else min(num_cores, math.ceil(int(quota) / int(period)))
