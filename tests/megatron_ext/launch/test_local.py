"""Local ranks as real processes: exit codes, deaths, signals, hostile arguments, orphans."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from megatron_ext.errors import UserError
from megatron_ext.exit_codes import SAVED_AND_STOPPED
from megatron_ext.launch.local import run_local

ROOT = Path(__file__).resolve().parents[3]
PATIENCE_SECONDS = 20.0

# Runs in every rank before a test's own lines.
PROLOGUE = """
import os, signal, sys, time
from pathlib import Path
rank, folder = int(os.environ["MEGATRON_EXT_RANK"]), Path(sys.argv[1])
def say(name):
    (folder / f"{name}.new").write_text(str(os.getpid()))
    (folder / f"{name}.new").rename(folder / name)
def until(name):
    while not (folder / name).exists():
        time.sleep(0.01)
"""


@dataclass(frozen=True, slots=True)
class Launch:
    """A parent process that calls `run_local` with `num_ranks` copies of a test's script."""

    process: subprocess.Popen[str]
    folder: Path

    def pid_of(self, name: str) -> int:
        """The process that said `name`, as soon as it has."""
        _wait_until(lambda: (self.folder / name).exists(), what=f"{name} is said")
        return int((self.folder / name).read_text())

    def end(self) -> tuple[int, str, str]:
        stdout, stderr = self.process.communicate(timeout=PATIENCE_SECONDS)
        return self.process.returncode, stdout, stderr


@contextlib.contextmanager
def launch(folder: Path, script: str, num_ranks: int, *, grace_seconds: float) -> Iterator[Launch]:
    (folder / "tmp").mkdir()
    (folder / "rank.py").write_text(PROLOGUE + textwrap.dedent(script))
    parent = (
        "import sys; from megatron_ext.launch import local\n"
        f"local._GRACE_SECONDS = {grace_seconds}\n"
        f"command = [sys.executable, {str(folder / 'rank.py')!r}, {str(folder)!r}]\n"
        f"sys.exit(local.run_local(command, {num_ranks}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(folder / "tmp")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Launch(process, folder)
    finally:
        process.kill()
        process.wait()


def run(folder: Path, script: str, num_ranks: int, *, grace_seconds: float = 5.0) -> list[str]:
    """Exit code, stdout and stderr of a launch that needs nothing from outside."""
    with launch(folder, script, num_ranks, grace_seconds=grace_seconds) as started:
        code, stdout, stderr = started.end()
        return [str(code), stdout, stderr]


def _wait_until(is_true: Callable[[], bool], *, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_true():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.01)


def _is_gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0], 0),
        ([5], 5),
        ([0, 0, 0], 0),
        ([0, 3], 3),
        ([2, 0], 2),
        ([SAVED_AND_STOPPED, SAVED_AND_STOPPED], SAVED_AND_STOPPED),
        # Some saved while others say that they are done: not a run to continue.
        ([SAVED_AND_STOPPED, 0], 1),
        ([SAVED_AND_STOPPED, 4], 4),
    ],
)
def test_exit_codes(tmp_path: Path, codes: list[int], expected: int) -> None:
    assert run(tmp_path, f"sys.exit({codes}[rank])", len(codes))[0] == str(expected)


def test_each_rank_knows_itself_and_only_rank_0_is_heard(tmp_path: Path) -> None:
    script = """
        sys.path.insert(0, os.getcwd())
        from megatron_ext.launch.ranks import discover
        info = discover()
        say(f"{info.source}_{info.rank}_of_{info.world_size}_{info.store.path.parent.is_dir()}")
        print("this is rank", rank)
    """
    code, stdout, stderr = run(tmp_path, script, 3)
    assert (code, stdout, stderr) == ("0", "this is rank 0\n", "")
    names = {path.name for path in tmp_path.glob("local_*")}
    assert names == {f"local_{rank}_of_3_True" for rank in range(3)}
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("given", [None, "7"])
def test_threads_are_shared_out_unless_the_user_did(tmp_path: Path, given: str | None) -> None:
    script = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1] + "
    script += "os.environ['MEGATRON_EXT_RANK'], 'w'))"
    around: Mapping[str, str] = {"RANK": "5", "A B": "c"} | (
        {"OMP_NUM_THREADS": given} if given else {}
    )
    command = [sys.executable, "-c", script, str(tmp_path / "rank_")]
    assert run_local(command, 2, environment=around) == 0
    seen = json.loads((tmp_path / "rank_1").read_text())
    if given:
        assert seen["OMP_NUM_THREADS"] == given
    else:
        assert 1 <= int(seen["OMP_NUM_THREADS"]) <= max(1, (os.cpu_count() or 1) // 2)
    assert seen["A B"] == "c"
    assert "RANK" not in seen


def test_hostile_arguments_arrive_unchanged(tmp_path: Path) -> None:
    hostile = [
        "",
        "two words",
        "'single' \"double\" `back`",
        "new\nline\ttab",
        "$(touch hacked); rm -rf x & | > y",
        "$HOME ~ * ? [a] {b} \\ \\n %s %(x)s {}",
        "--flag=--ranks",
        "\u00fc\u4e16\U0001f600",
    ]
    script = "import json, sys; json.dump(sys.argv[2:], open(sys.argv[1], 'w'))"
    path = tmp_path / "it's $HERE.json"
    assert run_local([sys.executable, "-c", script, str(path), *hostile], 1) == 0
    assert json.loads(path.read_text()) == hostile


def test_no_ranks_are_refused() -> None:
    with pytest.raises(UserError, match="expected at least 1"):
        run_local([sys.executable], 0)


def test_a_killed_rank_takes_the_others_along_and_is_named(tmp_path: Path) -> None:
    script = """
        print("last words of", rank)
        say(f"rank_{rank}")
        time.sleep(60)
    """
    with launch(tmp_path, script, 3, grace_seconds=5.0) as started:
        pids = [started.pid_of(f"rank_{rank}") for rank in range(3)]
        os.kill(pids[1], signal.SIGKILL)
        killed_at = time.monotonic()
        code, stdout, stderr = started.end()
    assert time.monotonic() - killed_at < 4.0
    assert all(_is_gone(pid) for pid in pids)
    assert code == 128 + signal.SIGKILL
    assert stdout == "last words of 0\n"
    assert stderr.startswith("rank 1 of 3 was killed by SIGKILL, signal 9")
    assert "  | last words of 1\n" in stderr
    assert "last words of 2" not in stderr
    logs = next((tmp_path / "tmp").glob("megatron-ext-*"))
    assert str(logs) in stderr
    assert (logs / "rank_2.log").read_text() == "last words of 2\n"


def test_a_rank_that_will_not_go_is_killed_after_the_grace(tmp_path: Path) -> None:
    script = """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        say(f"rank_{rank}")
        until("rank_0")
        if rank == 1:
            sys.exit(9)
        time.sleep(60)
    """
    with launch(tmp_path, script, 2, grace_seconds=0.3) as started:
        stubborn = started.pid_of("rank_0")
        code, _, stderr = started.end()
    assert code == 9
    assert stderr.startswith("rank 1 of 2 left with exit code 9 and printed nothing")
    assert _is_gone(stubborn)


def test_the_cause_is_told_not_who_lost_a_peer(tmp_path: Path) -> None:
    script = """
        if rank == 0:
            time.sleep(60)
        if rank == 1:
            print("RuntimeError: [../gloo/pair.cc:5] Connection closed by peer [127.0.0.1]:1")
            sys.exit(1)
        time.sleep(0.2)
        raise ValueError("what really happened")
    """
    code, _, stderr = run(tmp_path, script, 3)
    assert code == "1"
    assert stderr.startswith("rank 2 of 3 left with exit code 1")
    assert "  | ValueError: what really happened\n" in stderr


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_signals_reach_the_ranks_which_may_save_as_long_as_they_need(
    tmp_path: Path, name: str
) -> None:
    script = """
        def save(number, frame):
            if rank == 1:
                sys.exit(3)
            time.sleep(1.5)
            say(f"saved_{number}")
            sys.exit(75)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, save)
        say(f"ready_{rank}")
        time.sleep(60)
    """
    number = signal.Signals[name]
    with launch(tmp_path, script, 2, grace_seconds=0.1) as started:
        for rank in range(2):
            started.pid_of(f"ready_{rank}")
        started.process.send_signal(number)
        code, _, _ = started.end()
    assert (tmp_path / f"saved_{int(number)}").exists()
    assert code == 3


def test_saved_and_stopped_on_request(tmp_path: Path) -> None:
    script = """
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))
        say(f"ready_{rank}")
        time.sleep(60)
    """
    with launch(tmp_path, script, 2, grace_seconds=5.0) as started:
        for rank in range(2):
            started.pid_of(f"ready_{rank}")
        started.process.send_signal(signal.SIGTERM)
        assert started.end() == (SAVED_AND_STOPPED, "", "")


@pytest.mark.parametrize("is_handled_by_rank_0", [False, True])
def test_a_request_before_ranks_listen_ends_them(
    tmp_path: Path, is_handled_by_rank_0: bool
) -> None:
    script = f"""
        if rank == 0 and {is_handled_by_rank_0}:
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))
        say(f"ready_{{rank}}")
        time.sleep(60)
    """
    with launch(tmp_path, script, 2, grace_seconds=5.0) as started:
        for rank in range(2):
            started.pid_of(f"ready_{rank}")
        started.process.send_signal(signal.SIGTERM)
        code, _, stderr = started.end()
    assert code == 128 + signal.SIGTERM
    unlike = "rank 0 left with exit code 75, rank 1 was killed by SIGTERM, signal 15\n"
    assert stderr == (f"the ranks did not end alike: {unlike}" if is_handled_by_rank_0 else "")


def test_the_third_interrupt_kills(tmp_path: Path) -> None:
    script = """
        signal.signal(signal.SIGINT, lambda number, frame: say(f"{time.time()}_heard_{rank}"))
        say(f"ready_{rank}")
        while True:
            time.sleep(1)
    """
    with launch(tmp_path, script, 2, grace_seconds=5.0) as started:
        pids = [started.pid_of(f"ready_{rank}") for rank in range(2)]
        for count in (1, 2):
            started.process.send_signal(signal.SIGINT)
            heard = functools.partial(_is_heard, tmp_path, num_times=2 * count)
            _wait_until(heard, what=f"interrupt {count} is heard by both")
        started.process.send_signal(signal.SIGINT)
        code, _, _ = started.end()
    assert code == 128 + signal.SIGKILL
    assert all(_is_gone(pid) for pid in pids)


def _is_heard(folder: Path, *, num_times: int) -> bool:
    return len(list(folder.glob("*_heard_?"))) >= num_times


def test_ranks_die_with_their_parent(tmp_path: Path) -> None:
    script = """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        say(f"rank_{rank}")
        time.sleep(60)
    """
    with launch(tmp_path, script, 3, grace_seconds=5.0) as started:
        pids = [started.pid_of(f"rank_{rank}") for rank in range(3)]
        started.process.kill()
        started.process.wait()
        _wait_until(lambda: all(_is_gone(pid) for pid in pids), what="all ranks are gone")


def test_helpers_of_a_dead_rank_go_too(tmp_path: Path) -> None:
    script = """
        if rank == 0:
            import subprocess
            helper = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid()));"
            helper += "os.rename(sys.argv[1], sys.argv[2]); time.sleep(60)"
            names = [str(folder / "helper.new"), str(folder / "helper")]
            subprocess.Popen([sys.executable, "-c", helper, *names])
        say(f"rank_{rank}")
        time.sleep(60)
    """
    with launch(tmp_path, script, 2, grace_seconds=5.0) as started:
        helper, rank_0 = started.pid_of("helper"), started.pid_of("rank_0")
        os.kill(rank_0, signal.SIGKILL)
        code, _, stderr = started.end()
    assert code == 128 + signal.SIGKILL
    assert stderr.startswith("rank 0 of 2 was killed by SIGKILL")
    _wait_until(lambda: _is_gone(helper), what="the helper is gone")


def test_a_program_that_is_not_there_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(FileNotFoundError):
        run_local([str(tmp_path / "nothing")], 2)
    assert list(tmp_path.iterdir()) == []
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
