"""Kill a rank under torchrun, again and again: does the run go on in place, with the same bits?

    python scripts/bench/restarts.py [--tries 20] [--ranks 2] [--json FILE]

Each try trains a small model under `torchrun --max-restarts 3`, kills one rank with SIGKILL at a
random moment (in a step, while a checkpoint is written, seldom while ranks start), lets torchrun
start the ranks again, and compares losses and gradient norms of all steps with those of a run that
nobody disturbed. Prints how long it took from the kill to the next finished step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_ext.errors import UserError
from megatron_ext.launch.ranks import discover
from scripts.bench.library_text import prepare_text

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 240.0


@dataclass(frozen=True, slots=True)
class Try:
    """What became of one killed run."""

    number: int
    rank: int
    killed_at_step: int
    has_gone_on: bool
    is_equal: bool
    recovery_seconds: float


def configuration(folder: Path, *, steps: int, save_interval: int) -> Path:
    """A small model on the standard library's source, in float32, as bytes."""
    prepare_text(folder, num_bytes=400_000)
    tree = {
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "num_attention_heads": 4,
        },
        "data": {
            "corpora": [{"path": str(folder / "corpus")}],
            "max_sequence_length": 128,
            "tokens_per_rank": 256,
        },
        "train": {"train_iters": steps, "global_batch_tokens": 512, "eval_interval": 0},
        "optim": {"lr": 3e-3, "lr_warmup_iters": 2},
        "precision": {"dtype": "fp32"},
        "checkpoint": {"save_interval": save_interval},
        "log": {"log_interval": 1000},
        "launch": {"device": "cpu"},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def start(config: Path, run_dir: Path, *, num_ranks: int) -> subprocess.Popen[bytes]:
    """Under torchrun; what it prints goes to run_dir/output."""
    run_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=3"]
    command += [f"--nproc-per-node={num_ranks}", "-m", "megatron_ext", "train", str(config)]
    with (run_dir / "output").open("wb") as output:
        return subprocess.Popen(
            [*command, f"log.run_dir={run_dir}"],
            cwd=ROOT,
            env=dict(os.environ) | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of each finished step."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    # The last line may be under way.
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    return [(each["step"], each["loss"], each["grad_norm"]) for each in whole]


def rank_process(agent: int, rank: int) -> psutil.Process | None:
    """The process of one rank below torchrun's agent; None while it is not there."""
    try:
        for child in psutil.Process(agent).children(recursive=True):
            if child.ppid() == agent and discover(child.environ()).rank == rank:
                return child
    except (psutil.Error, UserError):
        pass
    return None


def kill_once(
    config: Path,
    run_dir: Path,
    expected: Sequence[tuple[int, float, float]],
    *,
    number: int,
    rank: int,
    num_ranks: int,
    at_step: int,
    delay_seconds: float,
) -> Try:
    """One try: SIGKILL to `rank` so long after step `at_step` was finished."""
    process = start(config, run_dir, num_ranks=num_ranks)
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(losses(run_dir)) < at_step and process.poll() is None:
            assert time.monotonic() < deadline, (run_dir / "output").read_text(errors="replace")
            time.sleep(0.01)
        time.sleep(delay_seconds)
        while (victim := rank_process(process.pid, rank)) is None and process.poll() is None:
            time.sleep(0.01)
        done_before = len(losses(run_dir))
        killed = time.monotonic()
        if victim is not None:
            victim.send_signal(signal.SIGKILL)
        recovered = None
        # A step is new where the file shrank (steps after the last checkpoint are done again).
        smallest = done_before
        while process.poll() is None and time.monotonic() < killed + PATIENCE_SECONDS:
            count = len(losses(run_dir))
            smallest = min(smallest, count)
            if recovered is None and count > smallest:
                recovered = time.monotonic() - killed
            time.sleep(0.02)
        code = process.wait(timeout=10)
    finally:
        process.kill()
        process.wait()
    found = losses(run_dir)
    return Try(
        number=number,
        rank=rank,
        killed_at_step=done_before,
        # A run that ended before its rank was found was not killed, and shows nothing.
        has_gone_on=code == 0 and victim is not None,
        is_equal=found == list(expected),
        recovery_seconds=recovered or 0.0,
    )


def measure(folder: Path, *, tries: int, num_ranks: int, steps: int, seed: int) -> list[Try]:
    """All tries, one after another."""
    config = configuration(folder, steps=steps, save_interval=10)
    undisturbed = start(config, folder / "undisturbed", num_ranks=num_ranks)
    assert undisturbed.wait(timeout=PATIENCE_SECONDS) == 0
    expected = losses(folder / "undisturbed")
    assert len(expected) == steps
    draw = random.Random(seed)
    found = []
    for number in range(tries):
        one = kill_once(
            config,
            folder / f"try-{number}",
            expected,
            number=number,
            rank=draw.randrange(num_ranks),
            num_ranks=num_ranks,
            # 0: while the ranks start. Just after a tenth step a checkpoint is written.
            at_step=draw.choice([0, *range(1, steps - 8)]),
            delay_seconds=draw.uniform(0.0, 0.3),
        )
        print(one, flush=True)
        found.append(one)
    return found


def summary(found: Sequence[Try]) -> dict[str, Any]:
    recovery = [each.recovery_seconds for each in found if each.recovery_seconds]
    return {
        "tries": len(found),
        "gone_on": sum(each.has_gone_on for each in found),
        "equal": sum(each.is_equal for each in found),
        "median_recovery_seconds": statistics.median(recovery) if recovery else None,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(
            Path(folder),
            tries=options.tries,
            num_ranks=options.ranks,
            steps=options.steps,
            seed=options.seed,
        )
    result = summary(found)
    print(json.dumps(result))
    if options.json:
        tree = result | {"each": [asdict(one) for one in found]}
        options.json.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    return 0 if result["equal"] == result["gone_on"] == result["tries"] else 1


if __name__ == "__main__":
    sys.exit(main())
