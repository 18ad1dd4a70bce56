"""Killed, crashed or out of disk at any moment: the same command finishes the same corpus."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_ext.data.corpus import Corpus
from megatron_ext.errors import UserError
from tests.megatron_ext.data.corpora import folder_bytes, make_text, prepare_quietly, small_bpe

UNIT = 128 * 1024
_PROGRAM = """
import argparse, signal, sys
from megatron_ext.data import cli
from megatron_ext.errors import UserError
# What a shell starts in the background has Ctrl-C ignored, and so would its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
parser = argparse.ArgumentParser()
cli.add_arguments(parser.add_subparsers())
try:
    sys.exit(cli.run(parser.parse_args()))
except UserError as error:
    sys.exit(f"error: {error}")
"""


def command(output: Path, source: Path, tokenizer: str = "train:400") -> list[str]:
    options = ["--tokenizer", tokenizer, "--num-workers", "2", "--unit-bytes", str(UNIT)]
    return [
        *(sys.executable, "-c", _PROGRAM, "data", "prepare"),
        *("--input", str(source), "--output", str(output), *options),
    ]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 MB in about 16 units of both kinds, one document longer than a unit."""
    folder = tmp_path_factory.mktemp("source")
    with open(folder / "a.jsonl", "w") as stream:
        for seed in range(800):
            stream.write(json.dumps({"text": make_text(seed, 300)}) + "\n")
    (folder / "long.txt").write_text(make_text(5000, 120_000))
    for seed in range(40):
        (folder / f"small{seed}.txt").write_text(make_text(6000 + seed, 900))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(
    source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, bytes]]:
    """The files of an uninterrupted preparation, by tokenizer."""
    made: dict[str, dict[str, bytes]] = {}

    def files(tokenizer: str) -> dict[str, bytes]:
        if tokenizer not in made:
            output = tmp_path_factory.mktemp("fresh") / "corpus"
            prepare_quietly(output, source, tokenizer=tokenizer, unit_bytes=UNIT)
            made[tokenizer] = folder_bytes(output)
        return made[tokenizer]

    return files


def num_finished(output: Path) -> int:
    units = output / ".prepare" / "units"
    return sum(name.isdigit() for name in os.listdir(units)) if units.is_dir() else 0


def test_killed_again_and_again_the_corpus_is_the_same(
    tmp_path: Path, source: Path, uninterrupted: Callable[[str], dict[str, bytes]]
) -> None:
    output = tmp_path / "corpus"
    moments: list[Callable[[], bool]] = [
        lambda: (output / ".prepare" / "manifest.json").exists(),
        lambda: (output / "tokenizer").exists(),
        lambda: num_finished(output) >= 2,
        lambda: num_finished(output) >= 9,
        lambda: (output / ".prepare" / "merge").exists(),
    ]
    finished = []
    for moment in moments:
        process = subprocess.Popen(command(output, source), stderr=subprocess.DEVNULL)
        while not moment():
            assert process.poll() is None, "finished before it could be killed"
            time.sleep(0.002)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert alive == []
        with pytest.raises(UserError, match="not finished"):
            Corpus.open(output)
        finished.append(num_finished(output))
    assert finished == sorted(finished)
    assert finished[2] >= 2
    done = subprocess.run(command(output, source), capture_output=True, text=True, check=True)
    assert "going on: " in done.stderr
    assert folder_bytes(output) == uninterrupted("train:400")


class Crash(BaseException):
    """Stands for a kill at one exact place."""


def test_a_crash_before_any_rename_loses_nothing(
    tmp_path: Path,
    source: Path,
    uninterrupted: Callable[[str], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The parent's n-th rename does not happen, for every n, one run after the other."""
    output = tmp_path / "corpus"
    replace = os.replace
    num_crashes = 0
    while True:
        left = num_crashes

        def crash_or_replace(old: Path, new: Path) -> None:
            nonlocal left
            if left == 0:
                raise Crash
            left -= 1
            replace(old, new)

        monkeypatch.setattr(os, "replace", crash_or_replace)
        try:
            prepare_quietly(output, source, tokenizer="bytes", unit_bytes=UNIT)
            break
        except Crash:
            num_crashes += 1
        with pytest.raises(UserError):
            Corpus.open(output)
    monkeypatch.undo()
    assert num_crashes >= 7
    assert folder_bytes(output) == uninterrupted("bytes")


def test_a_damaged_unit_is_done_again(
    tmp_path: Path, source: Path, uninterrupted: Callable[[str], dict[str, bytes]]
) -> None:
    """What a power failure may leave: a folder that was renamed, with a file that is not whole."""
    output = tmp_path / "corpus"
    process = subprocess.Popen(command(output, source, "bytes"), stderr=subprocess.DEVNULL)
    while num_finished(output) < 4:
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    units = [f for f in sorted((output / ".prepare" / "units").iterdir()) if f.name.isdigit()]
    os.truncate(units[0] / "tokens", 100)
    (units[1] / "summary.json").unlink()
    os.truncate(units[2] / "records", 5)
    prepare_quietly(output, source, tokenizer="bytes", unit_bytes=UNIT)
    assert folder_bytes(output) == uninterrupted("bytes")


def test_two_preparations_do_not_share_a_folder(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "corpus"
    process = subprocess.Popen(command(output, source), stderr=subprocess.DEVNULL)
    while not (output / ".prepare" / "manifest.json").exists():
        time.sleep(0.002)
    with pytest.raises(UserError, match="another preparation is at work"):
        prepare_quietly(output, source)
    assert process.wait() == 0
    assert Corpus.open(output).train.num_documents > 0


_FIRST_USE = """
import sys
from megatron_ext.config import CorpusConfig
from megatron_ext.job_command import prepare_corpus
prepare = {"input": [sys.argv[1]], "tokenizer": "train:400"}
prepare_corpus(CorpusConfig.model_validate({"path": sys.argv[2], "prepare": prepare}))
"""


def test_runs_started_together_share_one_preparation(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "corpus"
    first_use = [sys.executable, "-c", _FIRST_USE, str(source / "long.txt"), str(output)]
    runs = [
        subprocess.Popen(first_use, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    told = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    assert Corpus.open(output).train.num_documents > 0


def test_a_file_size_limit_is_a_full_disk(
    tmp_path: Path, source: Path, uninterrupted: Callable[[str], dict[str, bytes]]
) -> None:
    """Units fit and the merged file does not: nothing that was finished is lost."""
    output = tmp_path / "corpus"
    limit = 1024 * 1024
    process = subprocess.run(
        command(output, source, "bytes"),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert process.returncode == 1
    assert f"the disk that holds {output} is full" in process.stderr
    assert "run the same command again" in process.stderr
    assert "Traceback" not in process.stderr
    report = prepare_quietly(output, source, tokenizer="bytes", unit_bytes=UNIT)
    assert report.num_resumed_bytes == report.num_input_bytes
    assert folder_bytes(output) == uninterrupted("bytes")


@pytest.fixture
def small_disk(tmp_path: Path) -> Callable[[int], Path]:
    """A file system of so many KiB, which can be resized."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted: list[Path] = []

    def resize(num_kib: int) -> Path:
        option = f"size={num_kib}k" + (",remount" if mounted else "")
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            pytest.skip(f"needs root to mount a small disk: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    return resize


def test_a_full_disk_loses_nothing(
    source: Path,
    small_disk: Callable[[int], Path],
    uninterrupted: Callable[[str], dict[str, bytes]],
    request: pytest.FixtureRequest,
) -> None:
    disk = small_disk(64)
    request.addfinalizer(lambda: subprocess.run(["umount", str(disk)], check=True))
    output = disk / "corpus"
    for num_kib in (64, 700, 2000, 5000):
        small_disk(num_kib)
        before = num_finished(output)
        with pytest.raises(UserError, match=r"is full .No space left on device") as error:
            prepare_quietly(output, source, tokenizer="bytes", unit_bytes=UNIT)
        assert f"the disk that holds {output}" in str(error.value)
        assert num_finished(output) >= before
    small_disk(64_000)
    prepare_quietly(output, source, tokenizer="bytes", unit_bytes=UNIT)
    assert folder_bytes(output) == uninterrupted("bytes")


def test_ctrl_c_ends_workers_and_keeps_units(tmp_path: Path, source: Path) -> None:
    # A run may be done before the signal comes, if this process had to wait for its turn.
    for attempt in range(10):
        output = tmp_path / str(attempt)
        text, workers = interrupt(output, source)
        if not (output / "metadata.json").exists():
            break
    assert "stopped; the same command goes on where it was" in text
    assert psutil.wait_procs(workers, timeout=10)[1] == []
    assert num_finished(output) >= 3


def interrupt(output: Path, source: Path) -> tuple[str, list[psutil.Process]]:
    """Ctrl-C after three units: what the command said, and its workers."""
    process = subprocess.Popen(
        command(output, source), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while num_finished(output) < 3 and process.poll() is None:
        time.sleep(0.002)
    workers = []
    if process.poll() is None:
        workers = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, text = process.communicate(timeout=20)
    return text, workers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_bytes", "tokenizer", "limit_mib"), [(300_000_000, "bytes", 150), (8_000_000, "bpe", 250)]
)
def test_memory_does_not_depend_on_the_input(
    tmp_path: Path, num_bytes: int, tokenizer: str, limit_mib: int
) -> None:
    """One huge document: no process holds more than a block of it."""
    small_bpe().save(tmp_path / "bpe")
    block = "\n".join(make_text(seed, 200) for seed in range(800)) + "\n"
    with open(tmp_path / "long.txt", "w") as stream:
        for _ in range(num_bytes // len(block.encode())):
            stream.write(block)
    program = (
        "import pathlib\n"
        "from tests.megatron_ext.data.corpora import prepare_quietly\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        f"tokenizer = {tokenizer!r} if {tokenizer!r} == 'bytes' else str(here / 'bpe')\n"
        "report = prepare_quietly(here / 'corpus', here / 'long.txt', tokenizer=tokenizer)\n"
        "status = pathlib.Path('/proc/self/status').read_text()\n"
        "own = status.partition('VmHWM:')[2].split()[0]\n"
        "print(int(own) * 1024, report.peak_worker_bytes)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    own, worker = (int(number) / 2**20 for number in done.stdout.split())
    assert own < 100
    assert worker < limit_mib
