"""What few bits cost in held-out loss: one small Llama trained with every recipe, and the table.

    python scripts/bench/loss_gates.py --json FILE [--runs NAME ...] [--seeds 1234 1 2] [--jobs 2]
    python scripts/bench/loss_gates.py --json FILE --plot docs/pictures/precision-losses.png

Each run is the trainer of `megatron-ext train` with the recipe `loss-gate` below: the same first
weights, the same text in the same order (Python's standard library), hyper-parameters of Quartet's
paper (arXiv 2505.14669). A run that is in FILE is not made again; a line is added when one is done.
The held-out loss is that of the layers as they were trained, in few bits.

| figure  | what it is                                                       |
|---------|------------------------------------------------------------------|
| loss    | held-out loss after the last step, nats a token                  |
| bits    | the same in bits per byte of text                                |
| gap     | loss / loss of bf16 with the same seed - 1                       |
| train   | the gap of the mean loss over the last quarter's steps           |

The last quarter's training loss is held out too (each token is seen once, before it is learnt), on
the same batches in every run, and a mean over many states of the weights: chance moves it less.
`fp32` is the control: its gap says how far a change too small to matter moves the loss.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

_STOCHASTIC = {"rounding": "stochastic"}
_BACKWARD = ("dgrad_grad", "dgrad_weight", "wgrad_grad", "wgrad_input")
RUNS: dict[str, dict[str, Any]] = {
    "bf16": {"recipe": "bf16"},
    # The control: a change too small to matter, and how far chance moves the loss all the same.
    "fp32": {"recipe": "bf16", "dtype": "fp32"},
    "fp8_tensorwise": {"recipe": "fp8_tensorwise"},
    "fp8_blockwise": {"recipe": "fp8_blockwise"},
    "mxfp8": {"recipe": "mxfp8"},
    "nvfp4": {"recipe": "nvfp4"},
    "quartet": {"recipe": "quartet"},
    "quartet_stochastic": {
        "recipe": "quartet",
        "operands": {operand: _STOCHASTIC for operand in _BACKWARD},
    },
    "quartet2": {"recipe": "quartet2"},
    "mxfp4": {"recipe": "mxfp4"},
    "mxfp4_stochastic": {"recipe": "mxfp4_stochastic"},
    "luq": {"recipe": "luq"},
    # No layer kept, to compare with recipes that keep none.
    "nvfp4_all_layers": {"recipe": "nvfp4", "keep_last_share": 0.0},
}
"""Section `precision` of each run."""

MODEL = {
    "num_layers": 4,
    "hidden_size": 128,
    "ffn_hidden_size": 384,
    "num_attention_heads": 2,
}
SEQUENCE_LENGTH = 256
TOKENS_PER_STEP = 4096
NUM_STEPS = 200
LEARNING_RATE = 2e-3
NUM_VALIDATIONS = 6
EVAL_TOKENS = 24000
CORPUS = "runs/data/python-stdlib-1024"
PREPARATION = {
    "input": ["python-stdlib"],
    "tokenizer": "train:1024",
    "validation_fraction": 0.02,
    "bad_records": "skip",
}
# glibc gives large blocks back at once and gets them anew, page by page: half the time of a run.
_KEEP_MEMORY = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
}


def train(
    name: str,
    *,
    seed: int,
    steps: int,
    corpus: Path | None = None,
    eval_tokens: int = EVAL_TOKENS,
) -> dict[str, Any]:
    """One run, in this process; a process group of one rank is running."""
    import torch

    from megatron_ext.config_check import check_config
    from megatron_ext.devices import open_device
    from megatron_ext.job_command import prepare_corpus
    from megatron_ext.run import open_run
    from megatron_ext.trainer import train_step
    from megatron_ext.validation import validate

    with tempfile.TemporaryDirectory() as folder:
        tree = run_config(name, seed, steps, folder, corpus, eval_tokens)
        config = check_config(tree, world_size=1)
        for each in config.data.corpora:
            prepare_corpus(each)
        curve: list[dict[str, Any]] = []
        began = time.perf_counter()
        with open_run(config, open_device(config, torch.device("cpu")), Path(folder)) as run:
            losses: list[Any] = []
            for step in range(1, steps + 1):
                losses.append(train_step(run)["loss"])
                if step % max(1, steps // NUM_VALIDATIONS) == 0 or step == steps:
                    found = validate(run)
                    curve.append(
                        {
                            "step": step,
                            "loss": found["validation_loss"],
                            "bits_per_byte": found["validation_bits_per_byte"],
                        }
                    )
                    print(f"{name} seed {seed}: {json.dumps(curve[-1])}", flush=True)
    return {
        "name": name,
        "seed": seed,
        "steps": steps,
        "precision": RUNS[name],
        "model": MODEL,
        "tokens": steps * TOKENS_PER_STEP,
        "loss": curve[-1]["loss"],
        "bits_per_byte": curve[-1]["bits_per_byte"],
        "curve": curve,
        "train_loss": losses,
        "seconds": time.perf_counter() - began,
    }


def run_config(
    name: str,
    seed: int,
    steps: int,
    folder: str,
    corpus: Path | None = None,
    eval_tokens: int = EVAL_TOKENS,
) -> Any:
    """The run's `Config`; corpus: a prepared one in place of Python's standard library."""
    from megatron_ext.config import Config

    text: dict[str, Any] = {"path": CORPUS, "prepare": PREPARATION}
    if corpus is not None:
        text = {"path": str(corpus)}
    tree = {
        "model": MODEL | {"qk_layernorm": True},
        "data": {
            "max_sequence_length": SEQUENCE_LENGTH,
            "tokens_per_rank": TOKENS_PER_STEP,
            "corpora": [text],
        },
        "train": {
            "train_iters": steps,
            "global_batch_tokens": TOKENS_PER_STEP,
            "eval_interval": 0,
            "eval_tokens": eval_tokens,
            "seed": seed,
        },
        "optim": {
            "lr": LEARNING_RATE,
            "lr_decay_style": "cosine",
            "lr_warmup_iters": max(1, steps // 10),
            "weight_decay": 0.1,
            "adam_beta1": 0.9,
            "adam_beta2": 0.95,
            "clip_grad": 1.0,
        },
        "precision": {"dtype": "bf16"} | RUNS[name],
        "log": {"run_dir": folder},
        "launch": {"device": "cpu"},
    }
    return Config.model_validate(tree)


def train_in_new_group(name: str, *, seed: int, steps: int) -> dict[str, Any]:
    """`train` on one thread, with a process group of its own."""
    import torch
    import torch.distributed as dist

    from megatron_ext.config_file import load_config
    from megatron_ext.rank import choose_accelerator

    torch.set_num_threads(1)
    choose_accelerator(load_config("quickstart", ["launch.device=cpu"]))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return train(name, seed=seed, steps=steps)
    finally:
        dist.destroy_process_group()


def run_missing(options: argparse.Namespace) -> None:
    """In processes of their own, so many at a time."""
    done = {(run["name"], run["seed"], run["steps"]) for run in read_runs(options.json)}
    missing = [
        (name, seed)
        for seed in options.seeds
        for name in options.runs
        if (name, seed, options.steps) not in done
    ]

    def start(run: tuple[str, int]) -> None:
        name, seed = run
        command = [sys.executable, __file__, "--json", str(options.json), "--one", name]
        command += ["--seeds", str(seed), "--steps", str(options.steps)]
        subprocess.run(command, check=False, env=os.environ | _KEEP_MEMORY)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(start, missing))


def read_runs(path: Path) -> list[dict[str, Any]]:
    """A run a line."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def comparable(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those with a run of bf16 of the same seed and number of steps, and their gaps to it."""
    base = {(run["seed"], run["steps"]): run for run in runs if run["name"] == "bf16"}
    compared = []
    for run in runs:
        beside = base.get((run["seed"], run["steps"]))
        if beside is not None:
            gap = run["loss"] / beside["loss"] - 1
            train_gap = _last_quarter(run) / _last_quarter(beside) - 1
            compared.append(run | {"gap": gap, "train_gap": train_gap})
    return compared


def _last_quarter(run: dict[str, Any]) -> float:
    return float(statistics.mean(run["train_loss"][-max(1, run["steps"] // 4) :]))


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Markdown: means over seeds, the smallest gap first."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for run in comparable(runs):
        by_name.setdefault(run["name"], []).append(run)

    def mean(name: str, figure: str) -> float:
        return statistics.mean(float(run[figure]) for run in by_name[name])

    lines = ["| run | seeds | loss | bits per byte | gap, % | of single seeds | train gap, % |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name in sorted(by_name, key=lambda name: mean(name, "gap")):
        loss, bits, gap = mean(name, "loss"), mean(name, "bits_per_byte"), mean(name, "gap")
        each = ", ".join(f"{100 * run['gap']:+.2f}" for run in by_name[name])
        lines.append(
            f"| {name} | {len(by_name[name])} | {loss:.4f} | {bits:.4f} | {100 * gap:+.2f} | "
            f"{each} | {100 * mean(name, 'train_gap'):+.2f} |"
        )
    return "\n".join(lines)


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Left: distance of held-out losses from bf16's at the same step; right: at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11.5, 4.8), layout="constrained")
    curves: dict[str, list[list[float]]] = {}
    base = {run["seed"]: run["curve"] for run in runs if run["name"] == "bf16"}
    for run in runs:
        if run["name"] != "bf16" and run["seed"] in base:
            beside = base[run["seed"]]
            points = zip(run["curve"], beside, strict=True)
            curves.setdefault(run["name"], []).append(
                [100 * (point["loss"] / other["loss"] - 1) for point, other in points]
            )
    where = [point["step"] * TOKENS_PER_STEP / 1e6 for point in next(iter(base.values()))]
    means = {
        name: [statistics.mean(at) for at in zip(*each, strict=True)]
        for name, each in curves.items()
    }
    names = sorted(means, key=lambda name: means[name][-1])
    colours = pyplot.get_cmap("turbo")
    for number, name in enumerate(names):
        colour = "black" if name == "fp32" else colours(0.05 + 0.9 * number / len(names))
        left.plot(where, means[name], ".-", label=name, linewidth=1.3, color=colour)
        ends = [each[-1] for each in curves[name]]
        right.plot(ends, [number] * len(ends), "o", color=colour, markersize=4, alpha=0.6)
        right.plot(means[name][-1], number, "|", color=colour, markersize=18, markeredgewidth=3)
    left.set_xlabel("million tokens")
    left.set_ylabel("held-out loss above bf16's, %, mean over seeds")
    right.set_xlabel("above bf16's after the last step, %: each seed, and the mean")
    right.set_yticks(range(len(names)), names)
    left.legend(*(each[::-1] for each in left.get_legend_handles_labels()), fontsize=7, ncols=2)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.axhline(0.0, color="black", linewidth=0.8)
    right.axvline(0.0, color="black", linewidth=0.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="a line for each run")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234])
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--one", choices=list(RUNS), help="one run, in this process")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    if options.one:
        run = train_in_new_group(options.one, seed=options.seeds[0], steps=options.steps)
        with options.json.open("a") as stream:
            stream.write(json.dumps(run) + "\n")
        return 0
    if not options.plot:
        run_missing(options)
    runs = read_runs(options.json)
    print(table(runs))
    if options.plot:
        draw(runs, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
