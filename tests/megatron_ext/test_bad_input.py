"""Wrong input through real command lines: exit code, what is told, and that nothing is lost.

Where no rank is needed to see the mistake, torch is not even imported.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ext import exit_codes
from megatron_ext.checkpoint import folder
from megatron_ext.metrics import read_metrics
from tests.megatron_ext.tiny_run import make_corpus, opened, tiny_tree
from tests.rank_pool import RankError, Ranks

_IMPORT = re.compile(r"^import time: .*\| +(\S+)$")


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    text: str
    """stdout and stderr."""
    imported: frozenset[str]
    """Modules, where that was asked for."""


def command(*words: str, watch_imports: bool = False) -> Done:
    """`megatron-ext WORDS`."""
    options = ["-X", "importtime"] if watch_imports else []
    done = subprocess.run(
        [sys.executable, *options, "-m", "megatron_ext", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    lines = done.stderr.splitlines()
    matches = [_IMPORT.match(line) for line in lines]
    return Done(
        code=done.returncode,
        text=done.stdout + "\n".join(line for line in lines if not line.startswith("import time:")),
        imported=frozenset(match.group(1) for match in matches if match),
    )


def refusal(*words: str, needs_torch: bool = False) -> str:
    """What a command says that leaves with BAD_INPUT."""
    done = command(*words, watch_imports=not needs_torch)
    assert done.code == exit_codes.BAD_INPUT, done.text
    assert "Traceback" not in done.text
    if not needs_torch:
        assert "megatron_ext.cli" in done.imported
        assert not done.imported & {"torch", "megatron.core"}
    return done.text


@dataclass(frozen=True)
class Workplace:
    """A corpus, a configuration of two steps a checkpoint, and a run of four steps."""

    corpus: Path
    tree: dict[str, Any]
    run_dir: Path

    def copy(self, target: Path, *, steps: tuple[int, ...] = (2, 4)) -> Path:
        """A copy of the run with some of its checkpoints."""
        others = [folder.checkpoint_path(target, step).name for step in {2, 4} - set(steps)]
        return shutil.copytree(self.run_dir, target, ignore=shutil.ignore_patterns(*others))

    def config(self, run_dir: Path) -> str:
        """A configuration file for a run folder."""
        tree = self.tree | {"log": {"run_dir": str(run_dir), "log_interval": 1}}
        path = run_dir.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(tree))
        return str(path)


def train_here(tree: dict[str, Any]) -> None:
    from megatron_ext.trainer import train

    with opened(tree) as run:
        assert train(run) == exit_codes.DONE


@pytest.fixture(scope="module")
def workplace(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    home = tmp_path_factory.mktemp("bad_input")
    tree = tiny_tree(
        make_corpus(home),
        home / "run",
        train={"train_iters": 4, "global_batch_tokens": 1024, "eval_tokens": 500},
        model={"num_layers": 2},
        checkpoint={"save_interval": 2},
    )
    ranks.run(1, train_here, tree, megatron=True)
    return Workplace(home / "corpus", tree, home / "run")


@pytest.fixture
def config(workplace: Workplace, tmp_path: Path) -> str:
    return workplace.config(tmp_path / "new")


def newest_shard(run_dir: Path, step: int) -> Path:
    return max(folder.checkpoint_path(run_dir, step).glob("*.distcp"))


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# ------------------------------------------------------------------ before any rank is started


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["model.num_layers=twelve"], ["model.num_layers: ", "valid integer, found 'twelve'"]),
        (["optim.learning_rate=1"], ["optim.learning_rate: unknown key; keys here are", " lr,"]),
        (["optim.weigth_decay=1"], ["weigth_decay: unknown key; did you mean 'weight_decay'?"]),
        (
            ["parallel.tensor_model_parallel_size=3", "--ranks", "3"],
            ["size=3 does not divide model.num_attention_heads=4; use one of 1, 2, 4"],
        ),
        (
            ["parallel.tensor_model_parallel_size=2", "--ranks", "3"],
            ["3 ranks cannot be divided", "use a multiple of 2 ranks (--ranks)"],
        ),
        (["--ranks", "0"], ["--ranks 0: at least 1"]),
        (["--ranks", "-4"], ["--ranks -4: at least 1"]),
        (["--ranks", "1000000"], ["1000000 ranks cannot be started on this machine", "at most"]),
        (["--ranks", "two"], ["invalid int value: 'two'"]),
        (["--rangs", "2"], ["unrecognized arguments: --rangs"]),
        (["data.corpora.0.path=/nowhere"], ["/nowhere: no such folder", "data prepare --input"]),
        (["data.corpora.0.path=/"], ["/ is not a prepared corpus: no metadata.json"]),
        (["log.run_dir=/dev/null/run"], ["log.run_dir=/dev/null/run: the folder cannot be made"]),
    ],
    ids=" ".join,
)
def test_train_refuses(config: str, words: list[str], told: list[str]) -> None:
    message = refusal("train", config, *words)
    for text in told:
        assert text in message
    assert not Path(config).with_suffix("").exists(), "no run folder for a run that cannot be"


def test_plan_refuses_as_train_does(config: str) -> None:
    assert "--ranks 0: at least 1" in refusal("plan", config, "--ranks", "0")
    assert "found 'twelve'" in refusal("plan", config, "model.num_layers=twelve")


def test_truncated_index_of_a_corpus(workplace: Workplace, config: str, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(workplace.corpus, corpus)
    index = corpus / "train.idx"
    size = index.stat().st_size
    cut_in_half(index)
    message = refusal("train", config, f"data.corpora.0.path={corpus}")
    assert str(index) in message
    assert f"{size // 2}" in message.replace(",", "")
    assert "prepare the corpus again" in message


def test_generate_without_a_checkpoint(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        message = refusal("generate", str(path), "--prompt", "x")
        assert f"{path}: no checkpoint here; give a run folder with checkpoints/iter_..." in message
    for name, value in (("--tokens", "-1"), ("--temperature", "nan")):
        message = refusal("generate", str(tmp_path), "--prompt", "x", name, value)
        assert f"{name} {value}: expected a number from 0 up" in message


# ---------------------------------------------------------------------------- damaged checkpoints


def test_a_damaged_checkpoint_is_passed_over(workplace: Workplace, tmp_path: Path) -> None:
    run_dir = workplace.copy(tmp_path / "run")
    shard = newest_shard(run_dir, 4)
    cut_in_half(shard)
    done = command("train", workplace.config(run_dir), "train.train_iters=5")
    assert done.code == exit_codes.DONE, done.text
    assert "passing over this checkpoint is damaged" in done.text
    assert f"{shard}: " in done.text
    assert "(cut short or overwritten)" in done.text
    older = folder.checkpoint_path(run_dir, 2)
    assert f"going on after step 2 from {older}" in done.text
    assert [record["step"] for record in read_metrics(run_dir / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    for step, path in folder.complete_checkpoints(run_dir):
        names = sorted(folder.read_manifest(path))
        assert folder.damaged_files(path, names) == [], f"step {step} was saved anew"


def test_nothing_but_damaged_checkpoints(workplace: Workplace, tmp_path: Path) -> None:
    run_dir = workplace.copy(tmp_path / "run")
    cut, flipped = newest_shard(run_dir, 4), newest_shard(run_dir, 2)
    cut_in_half(cut)
    flip_a_bit(flipped)
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    message = refusal("train", workplace.config(run_dir), needs_torch=True)
    assert f"{cut}: {cut.stat().st_size:,} bytes, expected " in message
    assert f"{flipped}: content differs from what was saved (SHA-256)" in message
    assert f"no checkpoint of {run_dir} can be loaded; remove them to start over" in message
    after = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    assert after == before, "what is left may still be of use to someone"


class Bomb:
    """Unpickled without limits, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.target}",)


def write_with_manifest(path: Path, content: bytes) -> None:
    """Someone who prepares a checkpoint prepares its checksums too."""
    path.write_bytes(content)
    manifest = folder.read_manifest(path.parent)
    folder.write_manifest(path.parent, manifest | {path.name: folder.file_digest(path)})


def test_a_poisoned_checkpoint_does_not_run(workplace: Workplace, tmp_path: Path) -> None:
    run_dir = workplace.copy(tmp_path / "run", steps=(4,))
    checkpoint, trap = folder.checkpoint_path(run_dir, 4), tmp_path / "trap"
    write_with_manifest(checkpoint / ".metadata", pickle.dumps(Bomb(trap)))
    message = refusal("generate", str(run_dir), "--prompt", "x", needs_torch=True)
    assert f"{checkpoint / '.metadata'}: refused" in message
    assert "do not load checkpoints from people you do not trust" in message
    assert not trap.exists()


def poison_a_shard(checkpoint: Path, trap: Path) -> None:
    """Say of one weight that it is a pickled object, which torch loads without limits."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    path = checkpoint / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    name = next(name for name in metadata.state_dict_metadata if "word_embeddings" in name)
    record = BytesStorageMetadata()
    # megatron compares sizes, and the instance may carry what its class has not.
    record.size = metadata.state_dict_metadata[name].size  # type: ignore[attr-defined]
    torch.save(Bomb(trap), checkpoint / "bomb")
    content = (checkpoint / "bomb").read_bytes()
    metadata.state_dict_metadata[name] = record
    metadata.storage_data[MetadataIndex(name)] = _StorageInfo("bomb", 0, len(content))
    write_with_manifest(checkpoint / "bomb", content)
    write_with_manifest(path, pickle.dumps(metadata))


def load_here(tree: dict[str, Any]) -> int:
    """The step that a run folder goes on from."""
    from megatron_ext.resume import resume

    with opened(tree) as run:
        resume(run)
        return int(run.step)


def test_a_weight_that_is_a_pickle_is_not_loaded(
    ranks: Ranks, workplace: Workplace, tmp_path: Path
) -> None:
    run_dir = workplace.copy(tmp_path / "run", steps=(4,))
    trap = tmp_path / "trap"
    poison_a_shard(folder.checkpoint_path(run_dir, 4), trap)
    tree = workplace.tree | {"log": {"run_dir": str(run_dir)}}
    with pytest.raises(RankError, match="BytesStorageMetadata"):
        ranks.run(1, load_here, tree, megatron=True)
    assert not trap.exists()


# ------------------------------------------------------------------------------------ a full disk


@contextlib.contextmanager
def small_disk(path: Path, *, num_bytes: int) -> Iterator[Path]:
    """A file system of its own; needs root."""
    path.mkdir()
    if os.geteuid() != 0:
        pytest.skip("a file system that is full: mounting one needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"a file system that is full: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_loses_nothing(ranks: Ranks, workplace: Workplace, tmp_path: Path) -> None:
    saved = folder.checkpoint_path(workplace.run_dir, 2)
    checkpoint_bytes = sum(path.stat().st_size for path in saved.iterdir())
    with small_disk(tmp_path / "disk", num_bytes=checkpoint_bytes * 3 // 2) as disk:
        run_dir = workplace.copy(disk / "run", steps=(2,))
        config = shutil.move(workplace.config(run_dir), tmp_path / "run.yaml")
        message = refusal("train", str(config), needs_torch=True)
        older = folder.checkpoint_path(run_dir, 2)
        assert "checkpoint of step 4 could not be saved" in message
        assert f"the disk of {run_dir} is full" in message
        assert f"the newest complete one is {older}" in message
        assert [step for step, _ in folder.complete_checkpoints(run_dir)] == [2]
        leftovers = list(folder.checkpoints_dir(run_dir).glob(".*"))
        assert not leftovers, "a disk that is full needs the room"
        tree = workplace.tree | {"log": {"run_dir": str(run_dir)}}
        assert ranks.run(1, load_here, tree, megatron=True) == [2]


# ------------------------------------------------------------------------------- asked to stop


def test_signals_and_files_save_and_the_command_goes_on(
    workplace: Workplace, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = ["train", workplace.config(run_dir), "--ranks", "2", "train.train_iters=100000"]
    words += ["checkpoint.save_interval=0"]
    metrics = run_dir / "metrics.jsonl"
    with subprocess.Popen(
        [sys.executable, "-m", "megatron_ext", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while len(read_metrics(metrics)) < 2 and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        (run_dir / "SAVE").touch()
        while (run_dir / "SAVE").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        ((saved_on_the_way, _),) = folder.complete_checkpoints(run_dir)
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate(timeout=60)
    assert process.returncode == exit_codes.SAVED_AND_STOPPED, text
    assert "asked to stop by signal SIGTERM: saved step " in text
    first, saved = (step for step, _ in folder.complete_checkpoints(run_dir))
    assert saved == read_metrics(metrics)[-1]["step"] > first == saved_on_the_way >= 2

    (run_dir / "STOP").touch()
    done = command(*words)
    assert done.code == exit_codes.SAVED_AND_STOPPED, done.text
    assert f"going on after step {saved} " in done.text
    assert f"asked to stop by the file {run_dir / 'STOP'}: saved step {saved + 1}" in done.text
    assert not (run_dir / "STOP").exists(), "or the command would never go on"
    assert [record["step"] for record in read_metrics(metrics)] == list(range(1, saved + 2))

    # A batch system's warning that comes while the rank still starts up.
    words[words.index("--ranks") + 1] = "1"
    with subprocess.Popen(
        [sys.executable, "-m", "megatron_ext", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        deadline = time.monotonic() + 60
        while not is_caught(signal.SIGUSR1, process.pid) and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGUSR1)
        text, _ = process.communicate(timeout=120)
    assert process.returncode == exit_codes.SAVED_AND_STOPPED, text
    assert f"asked to stop by signal SIGUSR1: saved step {saved + 2}" in text


def is_caught(number: signal.Signals, pid: int) -> bool:
    """Whether a process has a handler of its own for a signal (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)
