from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from megatron_ext.data.workers import WorkerPool, shared_counters
from megatron_ext.errors import UserError


def build(setup: dict[str, Any]) -> Callable[[str], Any]:
    """What the workers of these tests can do, by the name of the job."""

    def job(name: str) -> Any:
        match name:
            case "user error":
                raise UserError("mend this")
            case "failure":
                raise ZeroDivisionError("our mistake")
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "sleep":
                time.sleep(600)
            case "count":
                setup["counters"][1] += 5
            case "environment":
                return os.environ["FOR_WORKERS"]
        return os.getpid()

    return job


@pytest.fixture
def counters() -> Any:
    return shared_counters(2)


@pytest.fixture
def pool(counters: Any) -> Iterator[WorkerPool]:
    setup = {"counters": counters}
    with WorkerPool(
        num_workers=2, build=build, setup=setup, environment={"FOR_WORKERS": "yes"}
    ) as pool:
        yield pool


def results(pool: WorkerPool) -> list[Any]:
    found = []
    while pool.num_busy:
        found += pool.wait(0.1)
    return found


def test_jobs_are_done_by_other_processes(pool: WorkerPool, counters: Any) -> None:
    pool.submit("pid")
    pool.submit("pid")
    assert pool.num_idle == 0
    first = results(pool)
    assert len({*first, os.getpid()}) == 3
    pool.submit("environment")
    pool.submit("count")
    assert "yes" in results(pool)
    assert list(counters) == [0, 5]
    assert "FOR_WORKERS" not in os.environ


@pytest.mark.parametrize(
    ("job", "error", "message"),
    [
        ("user error", UserError, "^mend this$"),
        ("failure", RuntimeError, "ZeroDivisionError: our mistake"),
        ("die", UserError, "a worker process died .killed by SIGKILL.*run the same command again"),
    ],
)
def test_what_goes_wrong_reaches_the_parent(
    pool: WorkerPool, job: str, error: type[Exception], message: str
) -> None:
    pool.submit(job)
    with pytest.raises(error, match=message):
        results(pool)


def test_closing_ends_workers_in_the_middle_of_work(pool: WorkerPool) -> None:
    pool.submit("sleep")
    children = psutil.Process().children()
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 5
    assert not any(child.is_running() for child in children if _is_ours(child))


def _is_ours(process: psutil.Process) -> bool:
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def test_workers_leave_with_a_parent_that_is_killed() -> None:
    program = (
        "from megatron_ext.data.workers import WorkerPool\n"
        "from tests.megatron_ext.data.test_data_workers import build\n"
        "pool = WorkerPool(num_workers=2, build=build, setup={}, environment={})\n"
        "pool.submit('pid')\n"
        "while pool.num_busy: pool.wait(0.1)\n"
        "pool.submit('sleep')\n"
        "print('busy', flush=True)\n"
        "pool.wait(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "busy\n"
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) >= 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
